"""What a Python name holds at the end of both sides of a branch, or after one more turn of a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fxopt.args import shape_text
from fxopt.control_flow.scalars import Number, TracedNumber, as_number

__all__ = [
    "UNDEFINED",
    "Differ",
    "Undefined",
    "common_type",
    "describe_value",
    "map_leaves",
    "pair_leaves",
    "same_sizes",
    "same_value",
]


class Undefined:
    """What a local name holds before it is bound."""

    def __repr__(self) -> str:
        return "undefined"


UNDEFINED = Undefined()


class Differ(Exception):  # noqa: N818  (it steers capture; the user sees a CaptureError with its text)
    """Two values that one value in the graph cannot stand for; the text says how they differ."""


def describe_value(value: Any) -> str:
    """Return a short text of a value for messages: ``f32[2, 3]``, ``a float``, ``None``, ``a list of 2``."""
    if isinstance(value, torch.Tensor):
        return shape_text(value)
    if isinstance(value, TracedNumber):
        return f"a {value.kind.__name__} that depends on a tensor"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:80]


def same_value(a: Any, b: Any) -> bool:
    """Return whether nothing has to choose between ``a`` and ``b``."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor | TracedNumber) or isinstance(b, torch.Tensor | TracedNumber):
        return False
    if isinstance(a, list | tuple | dict):
        return type(a) is type(b) and _same_items(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.SymInt):
        return statically_known_true(a == b)
    try:
        return bool(a == b)
    except Exception:  # an object that cannot be compared is not known to be the same
        return False


def _same_items(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_value(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))


def _is_container(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return len(leaves) != 1 or leaves[0] is not value


def pair_leaves(a: Any, b: Any, choose: Callable[[Any, Any, str], Any], where: str) -> Any:
    """Return the value that stands for ``a`` on one side and ``b`` on the other.

    Args:
        a: Value of the one side; tensors, numbers and containers of these.
        b: Value of the other.
        choose: Called with two leaves and their place; returns what to go on with, or raises Differ.
        where: What to call the value in a message.

    Raises:
        Differ: one value cannot stand for both.
    """
    if same_value(a, b):
        return a
    if isinstance(a, Undefined) or isinstance(b, Undefined):
        return _half_defined(a, b, choose, where)
    if _is_container(a) and _is_container(b):
        return _paired_items(a, b, choose, where)
    return choose(a, b, where)


def _paired_items(a: Any, b: Any, choose: Callable[[Any, Any, str], Any], where: str) -> Any:
    items, spec = pytree.tree_flatten(a)
    others, other_spec = pytree.tree_flatten(b)
    if spec != other_spec:
        raise Differ(f"{where} is {describe_value(a)} on one side and {describe_value(b)} on the other")
    merged = [pair_leaves(x, y, choose, f"{where}[{i}]") for i, (x, y) in enumerate(zip(items, others, strict=True))]
    return pytree.tree_unflatten(merged, spec)


def _half_defined(a: Any, b: Any, choose: Callable[[Any, Any, str], Any], where: str) -> Any:
    """Fill in what the side that does not define a name leaves open; only code that raises in eager could read it."""
    known = b if isinstance(a, Undefined) else a

    def both(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor | TracedNumber):
            return leaf
        filler = _filler(leaf)
        return choose(filler, leaf, where) if known is b else choose(leaf, filler, where)

    return map_leaves(both, known)


def _filler(leaf: torch.Tensor | TracedNumber) -> torch.Tensor | TracedNumber:
    like = leaf.tensor if isinstance(leaf, TracedNumber) else leaf
    # NaN where there is one: a mistake that reads it is seen.
    value: Any = (
        float("nan") if like.is_floating_point() or like.is_complex() else False if like.dtype is torch.bool else 0
    )
    filler = torch.full(like.shape, value, dtype=like.dtype, device=like.device)
    return TracedNumber(filler) if isinstance(leaf, TracedNumber) else filler


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to the leaves of a value; the value itself if that changes none of them."""
    leaves, spec = pytree.tree_flatten(value)
    mapped = [function(leaf) for leaf in leaves]
    if all(new is old for new, old in zip(mapped, leaves, strict=True)):
        return value
    return pytree.tree_unflatten(mapped, spec)


def common_type(a: Any, b: Any, where: str) -> tuple[Any, Any]:
    """Return both as tensors of one shape and element type, or both as numbers of one kind.

    Raises:
        Differ: they have no common type.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        _check_tensors(a, b, where)
        return a, b
    numbers = (TracedNumber, *Number.__args__, torch.SymInt, torch.SymFloat, torch.SymBool)
    if isinstance(a, numbers) and isinstance(b, numbers):
        x, y = as_number(a), as_number(b)
        kind = max(x.kind, y.kind, key=[bool, int, float].index)
        return x.as_kind(kind), y.as_kind(kind)
    for tensor, number in ((a, b), (b, a)):
        if isinstance(tensor, torch.Tensor) and isinstance(number, numbers) and tensor.ndim == 0:
            filled = as_number(number).tensor.to(tensor.dtype)
            return (tensor, filled) if tensor is a else (filled, tensor)
    raise Differ(f"{where} is {describe_value(a)} on one side and {describe_value(b)} on the other")


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Return whether two shapes are the same for all dynamic sizes."""
    return len(a) == len(b) and all(statically_known_true(p == q) for p, q in zip(a, b, strict=True))


def _check_tensors(a: torch.Tensor, b: torch.Tensor, where: str) -> None:
    if not same_sizes(a.shape, b.shape) or a.dtype != b.dtype or a.device != b.device:
        raise Differ(f"{where} is {shape_text(a)} on one side and {shape_text(b)} on the other")
