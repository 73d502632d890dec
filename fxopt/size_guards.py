"""Guards on dynamic sizes: which torch.export names where it refuses a range, and which hold for all of it."""

from __future__ import annotations

import itertools
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxopt.dimensions import dynamic_axes

__all__ = [
    "LARGEST", "checks_always_hold", "drop_checks", "example_sizes", "guards_always_hold", "holds", "told_guards",
]  # fmt: skip

_ASSERT, _SIZE = torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_size.int
LARGEST = 4096  # sizes up to this are tried; what holds for all of them is taken to hold above
_GUARD = re.compile(
    r"Not all values of (?P<name>\w+) = (?P<source>.+?) in the specified range.*? "
    r"satisfy the generated guard (?P<guard>.+?)\.?(?:Specializations unexpectedly required.*)?$",
    re.MULTILINE,
)
_PROBLEM = re.compile(r"^\s+- ", re.MULTILINE)
_OF_MANY: dict[Any, Any] = {
    torch.sym_not: np.logical_not,
    torch.sym_max: np.maximum,
    torch.sym_min: np.minimum,
    torch.sym_float: np.float64,
    torch.sym_int: np.trunc,
    math.trunc: np.trunc,
}  # of arrays
_SYMBOLIC = types.SimpleNamespace(sym_max=max, sym_min=min, sym_float=float, _sym_sqrt=math.sqrt)


def told_guards(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield ``(name of the dimension, where it stands, guard)`` of each guard named in an error of torch.export.

    The guard calls the size by the name of its dimension: ``("width", "L['x'].size()[3]", "(width // 4) != 1")``.
    """
    for found in _GUARD.finditer(text):
        name, guard = found["name"], found["guard"].replace(found["source"], found["name"])
        yield name, found["source"], guard.removesuffix(f" and {name} <= IntInfinity()")


def guards_always_hold(text: str, shapes: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether a trace was refused for nothing but guards that hold for all sizes, which torch cannot prove.

    It cannot for ``(width // 2) <= width``, for one.

    Args:
        text: The error of torch.export.
        shapes: Dynamic shapes that it refused, with ``Dim`` objects.
        arguments: The example inputs by parameter name.
    """
    examples, guards = example_sizes(shapes, arguments), list(told_guards(text))
    if not guards or len(guards) != len(_PROBLEM.findall(text.partition("Suggested fixes:")[0])):
        return False
    for name, _, guard in guards:
        _, dim = examples.get(name, (0, None))
        if not hasattr(dim, "min") or hasattr(dim, "root"):
            return False
        compiled = [compile(guard, "<guard>", "eval")]
        sizes = range(max(dim.min, 1), min(dim.max, LARGEST) + 1)
        if not all(holds(compiled, name, size, alone=True) for size in sizes):
            return False
    return True


def checks_always_hold(program: torch.export.ExportedProgram) -> bool:
    """Return whether the assertions on sizes that torch left in a program, having proved none, hold for all sizes.

    An assertion may speak of one dynamic size of the inputs or of two, at any place, and of nothing else.
    """
    inner = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    checks = {module: [node for node in module.graph.nodes if node.target is _ASSERT] for module in inner}
    outer = checks.pop(program.graph_module)
    return not any(checks.values()) and all(_holds_in(program, check) for check in outer)


def drop_checks(program: torch.export.ExportedProgram) -> None:
    """Remove these assertions."""
    for node in reversed(program.graph.nodes):
        if node.target is _ASSERT:
            program.graph.erase_node(node)


def _holds_in(program: torch.export.ExportedProgram, check: torch.fx.Node) -> bool:
    steps: dict[torch.fx.Node, None] = {}
    waiting = list(check.all_input_nodes)
    while waiting:
        node = waiting.pop()
        steps[node] = None
        waiting += [] if node.target is _SIZE else node.all_input_nodes
    sizes = [node for node in steps if node.target is _SIZE]
    computed = [node for node in program.graph.nodes if node in steps and node.target is not _SIZE]
    if any(node.op != "call_function" for node in computed):
        return False
    if not all(isinstance(node.meta.get("val"), torch.SymInt) for node in sizes):
        return False
    symbols = {node: node.meta["val"].node.expr for node in sizes}
    ranges = {symbol: _range(program, symbol) for symbol in dict.fromkeys(symbols.values())}
    if not 1 <= len(ranges) <= 2 or None in ranges.values():
        return False
    *first, last = ranges
    tried = itertools.product(*(ranges[symbol] or () for symbol in first))
    every = np.array(ranges[last])
    try:
        with np.errstate(all="raise"):
            known = ({**dict(zip(first, values, strict=True)), last: every} for values in tried)
            return all(_value(check, {node: at[symbols[node]] for node in sizes}, computed) for at in known)
    except (ArithmeticError, TypeError, ValueError):  # not defined for some size, or not for many at once
        return False


def _range(program: torch.export.ExportedProgram, symbol: Any) -> range | None:
    """Return the sizes to try, or None where torch knows no limits."""
    limits = program.range_constraints.get(symbol)
    if limits is None:
        return None
    last = min(int(limits.upper), LARGEST) if limits.upper.is_Integer else LARGEST
    return range(max(int(limits.lower), 1), last + 1)


def _value(check: torch.fx.Node, sizes: Mapping[torch.fx.Node, Any], computed: Sequence[torch.fx.Node]) -> bool:
    """Return whether an assertion holds for all of some sizes, computed as the program would."""
    known: dict[torch.fx.Node, Any] = dict(sizes)
    for node in computed:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
        target: Any = node.target
        known[node] = _OF_MANY.get(target, target)(*args, **kwargs)
    holds: Any = torch.fx.map_arg(check.args[0], known.__getitem__)
    return bool(np.all(holds))


def example_sizes(shapes: Any, arguments: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    """Return, by name, the size of each dimension in the examples, and its ``Dim``."""
    return {
        getattr(dim, "__name__", ""): (tensor.shape[axis], dim)
        for tensor, axes in dynamic_axes(dict(arguments), shapes)
        for axis, dim in axes.items()
    }


def holds(guards: list[types.CodeType], name: str, size: int, *, alone: bool = False) -> bool:
    """Return whether all guards that speak of this size alone hold for it; with ``alone``, none may speak of others."""
    known = {"__builtins__": {"round": round}, "torch": _SYMBOLIC, "math": math, name: size}
    for guard in guards:
        try:
            if not eval(guard, known):  # an expression that torch wrote, with no names but these
                return False
        except ZeroDivisionError:
            return False
        except (NameError, AttributeError):
            if alone:
                return False
            continue  # it speaks of other sizes too; the trace will tell
    return True
