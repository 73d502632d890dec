"""Read what a node holds: arguments by their schema name, the value's type, the user's source line."""

from __future__ import annotations

import functools
import linecache
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.errors import InvariantError, PassError, describe

__all__ = [
    "arg",
    "check_same_type",
    "dtype",
    "location_in",
    "module_path",
    "plain_number",
    "put_arg",
    "shape",
    "shape_text",
    "source_line",
    "source_location",
    "spread",
    "tensor_arg",
    "value",
]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_LIBRARY = re.compile(r"[/\\](site-packages|dist-packages|lib[/\\]python3[^/\\]*)[/\\]")
_CORE = str(Path(__file__).parent)
_DTYPE_TEXT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "bool",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


@functools.cache
def argument_positions(target: OpOverload) -> dict[str, tuple[int | None, Any, bool]]:
    """Return ``{name: (position or None if keyword-only, default, has a default)}`` of an operator's schema."""
    table: dict[str, tuple[int | None, Any, bool]] = {}
    for position, argument in enumerate(target._schema.arguments):
        has_default = argument.has_default_value()
        table[argument.name] = (
            None if argument.kwarg_only else position,
            argument.default_value if has_default else None,
            has_default,
        )
    return table


def arg(node: torch.fx.Node, name: str) -> Any:
    """Return the argument ``name`` of the operator call ``node``: positional, keyword or defaulted alike.

    Raises:
        TypeError: ``node`` does not call an ATen-style operator, or the operator has no such argument.
    """
    if not isinstance(node.target, OpOverload):
        raise TypeError(f"{node.name} calls {node.target}, which has no operator schema")
    table = argument_positions(node.target)
    if name not in table:
        raise TypeError(f"{node.target} has no argument {name!r}; it has {', '.join(table)}")
    position, default, has_default = table[name]
    if name in node.kwargs:
        return node.kwargs[name]
    if position is not None and position < len(node.args):
        return node.args[position]
    if not has_default:
        raise InvariantError(f"{node.name}: {node.target} is called without its argument {name!r}")
    return default


def put_arg(node: torch.fx.Node, name: str, new: Any) -> None:
    """Give the operator call ``node`` another argument ``name``; what the node yields is not brought up to date."""
    position = argument_positions(node.target)[name][0]
    if position is not None and name not in node.kwargs and position < len(node.args):
        node.update_arg(position, new)
    else:
        node.update_kwarg(name, new)


def tensor_arg(node: torch.fx.Node, name: str) -> torch.fx.Node:
    """Return the node that gives the tensor argument ``name``.

    Raises:
        TypeError: the argument is not the value of a node.
    """
    found = arg(node, name)
    if not isinstance(found, torch.fx.Node):
        raise TypeError(f"argument {name!r} of {node.name} is {found!r}, not the value of a node")
    return found


def plain_number(held: Any) -> float | None:
    """Return a number that an argument holds; None where it holds a size of the graph, or anything else, instead."""
    return float(held) if isinstance(held, int | float) and not isinstance(held, bool) else None


def spread(numbers: int | Sequence[int], count: int) -> list[int]:
    """Return one number for each of ``count`` axes, which operators let a single number stand for."""
    if isinstance(numbers, int):
        return [numbers] * count
    return [int(number) for number in numbers] * (count if len(numbers) == 1 else 1)


def value(node: torch.fx.Node) -> Any:
    """Return what the node yields: a FakeTensor, a SymInt or number, or a tuple of these.

    Raises:
        InvariantError: the node carries no value.
    """
    if "val" not in node.meta:
        raise InvariantError(f"{node.name} ({node.op} {node.target}) has no meta['val']")
    return node.meta["val"]


def dtype(node: torch.fx.Node) -> torch.dtype:
    """Return the element type of the tensor that ``node`` yields.

    Raises:
        TypeError: the node does not yield one tensor.
    """
    return _tensor(node).dtype


def shape(node: torch.fx.Node) -> torch.Size:
    """Return the shape of the tensor that ``node`` yields; dynamic sizes are SymInts.

    Raises:
        TypeError: the node does not yield one tensor.
    """
    return _tensor(node).shape


def _tensor(node: torch.fx.Node) -> torch.Tensor:
    found = value(node)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"{node.name} yields {type(found).__name__}, not one tensor")
    return found


def check_same_type(pass_name: str, old: torch.fx.Node, new: torch.fx.Node) -> None:
    """Check that ``new`` can take the place of ``old``.

    Raises:
        PassError: element type, rank or a fixed size differ.
    """
    a, b = old.meta.get("val"), new.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return
    sizes_differ = a.ndim != b.ndim or any(
        isinstance(p, int) and isinstance(q, int) and p != q for p, q in zip(a.shape, b.shape, strict=False)
    )
    if a.dtype != b.dtype or sizes_differ:
        raise PassError(
            describe(
                f"{pass_name} replaces {old.name} by a value of another type",
                source=source_line(old),
                got=f"{new.name}: {shape_text(b)}",
                wanted=shape_text(a),
            )
        )


def shape_text(of: Any, names: dict[str, str] | None = None) -> str:
    """Return the short text of a value's type: ``f32[batch, 10]`` for a tensor, ``int`` for a number.

    Args:
        of: A tensor, a number, or a tuple or list of these.
        names: What to call the symbolic sizes: ``{"s77": "batch"}``.
    """
    if isinstance(of, torch.Tensor):
        name = _DTYPE_TEXT.get(of.dtype, str(of.dtype).removeprefix("torch."))
        return f"{name}[{', '.join(size_text(size, names) for size in of.shape)}]"
    if isinstance(of, tuple | list):
        return f"({', '.join(shape_text(item, names) for item in of)})"
    return type(of).__name__.lower().removeprefix("sym")


def size_text(size: Any, names: dict[str, str] | None = None) -> str:
    """Return a size as text, its symbols renamed by ``names``."""
    text = str(size)
    if names and not isinstance(size, int):
        text = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), text)
    return text


def source_location(node: torch.fx.Node) -> tuple[str, int, str] | None:
    """Return file, line and function of the user's code that made ``node``, or None where it is unknown.

    The innermost frame outside installed libraries is the user's; if there is none, the innermost of all.
    """
    return location_in(node.meta.get("stack_trace") or "")


def location_in(trace: str) -> tuple[str, int, str] | None:
    """Return file, line and function of the user's frame in the text of a stack trace; see :func:`source_location`."""
    frames = [(found["file"], int(found["line"]), found["function"].strip()) for found in _FRAME.finditer(trace)]
    own = [frame for frame in frames if not _LIBRARY.search(frame[0]) and not frame[0].startswith(_CORE)]
    known = own or frames
    return known[-1] if known else None


def source_line(node: torch.fx.Node) -> str | None:
    """Return the user's line behind ``node`` as ``net.py:23, in forward: x.clamp(2.0, 3.0)``, or None."""
    location = source_location(node)
    if location is None:
        return None
    file, line, function = location
    text = linecache.getline(file, line).strip()
    where = f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}, in {function}"
    return f"{where}: {text}" if text else where


def module_path(node: torch.fx.Node) -> str:
    """Return the dotted path of the module whose forward made ``node``; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
