"""Find the dynamic sizes that a model takes, where those that were asked for are refused.

torch.export names every guard that the asked range breaks, such as ``(width // 4) != 1``, and suggests a range that
heeds only those that it can solve for the size. Here the guards are evaluated size by size instead, and what is found
is traced before anyone is told of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.export import Dim
from torch.utils import _pytree as pytree

from fxopt.dimensions import Dimension, parse_dimension
from fxopt.size_guards import LARGEST, example_sizes, holds, told_guards

__all__ = ["sizes_that_work"]

_EQUAL = re.compile(r"^\s*(?P<name>\w+) = (?P<value>\d+|[A-Za-z]\w*(?: [+-] \d+)?)$", re.MULTILINE)
_MULTIPLE = re.compile(r"^\s*(?P<name>\w+) = (?P<step>\d+)\*_(?P=name)$", re.MULTILINE)
_STEPS = 64
_ROUNDS = 3


def sizes_that_work(
    text: str, shapes: Any, arguments: Mapping[str, Any], attempt: Callable[[Any], str | None]
) -> str | None:
    """Return what to write in place of which dimension, or None if nothing was found that the model takes.

    Args:
        text: The error of torch.export.
        shapes: Dynamic shapes that it refused, with ``Dim`` objects.
        arguments: The example inputs by parameter name.
        attempt: Traces the model with other dynamic shapes; returns None, or the text of the error.
    """
    # Torch may solve a guard for multiples where that guard holds for all sizes: what it names comes first.
    for multiples in (False, True) if _MULTIPLE.search(text) else (True,):
        if (found := _sizes(text, shapes, arguments, attempt, multiples=multiples)) is not None:
            return found
    return None


def _sizes(
    text: str, shapes: Any, arguments: Mapping[str, Any], attempt: Callable[[Any], str | None], *, multiples: bool
) -> str | None:
    told: dict[str, str] = {}
    for _ in range(_ROUNDS):
        equal = dict(_equalities(text, shapes))
        ranges = dict(_ranges(text, shapes, arguments, multiples=multiples))
        if not equal and not ranges:
            return None
        told |= {name: advice for name, (_, advice) in (ranges | equal).items()}
        # In this order, so that what equals a dimension gets the new range of that one.
        shapes = _replaced(_replaced(shapes, equal), ranges)
        refused = attempt(shapes)
        if refused is None:
            return "in dynamic_shapes, " + "; ".join(told.values())
        text = refused
    return None


def _replaced(shapes: Any, found: Mapping[str, tuple[Any, str]]) -> Any:
    return pytree.tree_map(lambda dim: found[_name(dim)][0] if _name(dim) in found else dim, shapes)


def _name(dim: Any) -> str:
    return getattr(dim, "__name__", "")


def _equalities(text: str, shapes: Any) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yield, by dimension, what torch says that it must be: one size, or another dimension."""
    dims = {_name(leaf): leaf for leaf in pytree.tree_leaves(shapes) if _name(leaf)}
    for found in _EQUAL.finditer(text.partition("Suggested fixes:")[2]):
        name, value = found["name"], found["value"]
        other, sign, offset = [*value.split(), "", ""][:3]
        if name not in dims:
            continue
        if value.isdigit():
            yield name, (None, f"leave {name!r} out: {name} = {value} is its only size")
        elif other in dims and not sign:
            yield name, (dims[other], f"{other!r} in place of {name!r}: the two are always equal")
        elif other in dims:
            derived = dims[other] + int(offset) if sign == "+" else dims[other] - int(offset)
            yield name, (derived, f"torch.export.Dim({other!r}) {sign} {offset} in place of {name!r}")


def _ranges(
    text: str, shapes: Any, arguments: Mapping[str, Any], *, multiples: bool
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yield, by dimension, the sizes around that of the example for which all its guards hold."""
    examples = example_sizes(shapes, arguments)
    guards: dict[str, list[str]] = {}
    for name, _, guard in told_guards(text):
        guards.setdefault(name, []).append(guard)
    solved = text.partition("Suggested fixes:")[2] if multiples else ""
    for found in _MULTIPLE.finditer(solved):  # a guard that torch solved is not named
        guards.setdefault(found["name"], []).append(f"{found['name']} % {found['step']} == 0")
    for name, conditions in guards.items():
        example, dim = examples.get(name, (0, None))
        if not hasattr(dim, "min") or hasattr(dim, "root"):
            continue
        low, high = max(dim.min, 1), min(dim.max, LARGEST)
        compiled = [compile(guard, "<guard>", "eval") for guard in conditions]
        fits = [low <= size <= high and holds(compiled, name, size) for size in range(LARGEST + 1)]
        step, first, last = max(_runs(fits, example), key=lambda run: ((run[2] - run[1]) // run[0], -run[0]))
        if first == last or not fits[example]:  # an example of size 1 is traced at size 2
            continue
        most = last if last + step <= high or high < LARGEST else None
        if step == 1:
            bounded = Dimension(name, "", first, most)
            yield name, (parse_dimension(str(bounded)), f"{str(bounded)!r} in place of {name!r}")
        else:
            bounds = f"min={first // step}" + (f", max={most // step}" if most else "")
            root = Dim(f"_{name}", min=first // step, max=most // step if most else None)
            yield name, (step * root, f"{step} * torch.export.Dim('_{name}', {bounds}) in place of {name!r}")


def _runs(fits: list[bool], example: int) -> Iterator[tuple[int, int, int]]:
    """Yield the step, first and last of each longest run of sizes around ``example``, a multiple of the step."""
    for step in range(1, _STEPS + 1):
        if example % step:
            continue
        first = last = example
        while first - step > 0 and fits[first - step]:
            first -= step
        while last + step < len(fits) and fits[last + step]:
            last += step
        yield step, first, last
