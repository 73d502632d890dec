"""Numbers that depend on tensors, given to functions of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.control_flow.scalars import TracedNumber, result_tensor

__all__ = ["call_with_numbers", "holds_numbers"]

_BY_VALUE = {
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "truediv", "true_divide", "floordiv", "floor_divide",
    "mod", "remainder", "fmod", "pow", "eq", "ne", "lt", "le", "gt", "ge", "less", "greater", "where", "maximum",
    "minimum", "logical_and", "logical_or", "and", "or", "xor", "clamp", "clip", "lerp", "masked_fill",
    "fill_", "fill",
}  # fmt: skip


def holds_numbers(value: Any) -> bool:
    """Return whether there is a number that depends on a tensor among some arguments."""
    return any(isinstance(leaf, TracedNumber) for leaf in pytree.tree_leaves(value))


def call_with_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of torch on numbers that depend on tensors: as tensors where it computes, as sizes elsewhere."""
    name = getattr(func, "__name__", "")
    if name in ("tensor", "as_tensor") and isinstance(args[0], TracedNumber):
        return _as_tensor(args[0], **kwargs)
    bare = name.strip("_")
    by_value = name in _BY_VALUE or bare in _BY_VALUE or bare[1:] in _BY_VALUE
    owner = getattr(func, "__self__", None)  # of a method that is bound
    tensors = [owner] if isinstance(owner, torch.Tensor) else []
    tensors += [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, TracedNumber):
            return leaf
        return result_tensor(leaf, *tensors) if by_value and tensors else leaf.symbolic()

    args, kwargs = pytree.tree_map(plain, (args, kwargs))
    return func(*args, **kwargs)


def _as_tensor(number: TracedNumber, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    default = torch.get_default_dtype() if number.kind is float else number.tensor.dtype
    return number.tensor.to(dtype or default)
