"""Trace tensors that are made of a list of numbers, some of which are tensors or sizes.

    torch.tensor([x.sum(), 1.0])   ->   torch.stack([x.sum().detach(), torch.scalar_tensor(1.0)])

Run eagerly, ``torch.tensor`` reads the value of each tensor in the list, and a trace has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["TensorsOfScalars"]

_NUMBERS: tuple[tuple[Any, torch.dtype | None], ...] = (
    ((bool, torch.SymBool), torch.bool),
    ((int, torch.SymInt), torch.int64),
    ((float, torch.SymFloat), None),  # the default type
)


class TensorsOfScalars(TorchFunctionMode):
    """While active, ``torch.tensor``, ``torch.as_tensor`` and ``new_tensor`` keep what they read in the graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and args:
            made = _made(*args, **kwargs)
        elif func is torch.Tensor.new_tensor and len(args) == 2:
            own: dict[str, Any] = {"dtype": args[0].dtype, "device": args[0].device}
            asked = {name: given for name, given in kwargs.items() if given is not None}
            made = _made(args[1], sizes=True, **own | asked)
        else:
            made = None
        return func(*args, **kwargs) if made is None else made


def _made(
    data: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
    *,
    sizes: bool = False,
) -> torch.Tensor | None:
    """Return the tensor, or None where torch makes it well alone, or refuses it.

    Args:
        data: Numbers, sizes and tensors of one element, in lists of lists.
        dtype: Of the result; that of the elements together if None.
        device: Of the result; that of the first tensor in the list if None.
        requires_grad: As for ``torch.tensor``; such a tensor is left to it.
        pin_memory: Has no meaning while tracing.
        sizes: Whether sizes alone, without a tensor, are no work for torch.
    """
    if not isinstance(data, list | tuple) or requires_grad:
        return None
    leaves, shape = list(_leaves(data)), _shape(data)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    dynamic = tensors or (sizes and any(isinstance(leaf, torch.SymInt) for leaf in leaves))
    kinds = [_dtype(leaf) for leaf in leaves]
    if not dynamic or shape is None or None in kinds or any(tensor.numel() != 1 for tensor in tensors):
        return None
    found = functools.reduce(torch.promote_types, [kind for kind in kinds if kind is not None])
    wanted = found if dtype is None else dtype
    if found.is_floating_point and not wanted.is_floating_point and not wanted.is_complex:
        return None  # a TypeError of torch
    place = device if device is not None else tensors[0].device if tensors else None
    elements = [
        leaf.detach().reshape(()).to(place, wanted)
        if isinstance(leaf, torch.Tensor)
        else torch.scalar_tensor(leaf, dtype=wanted, device=place)
        for leaf in leaves
    ]
    return torch.stack(elements).reshape(shape)


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, list | tuple):
        for item in data:
            yield from _leaves(item)
    else:
        yield data


def _shape(data: Any) -> tuple[int, ...] | None:
    """Return the sizes of lists of lists, or None if they differ within one axis."""
    if not isinstance(data, list | tuple):
        return ()
    inner = {_shape(item) for item in data}
    (only,) = inner if len(inner) == 1 else (None,)
    return None if only is None else (len(data), *only)


def _dtype(leaf: Any) -> torch.dtype | None:
    """Return the type that an element has by itself, or None for what is no number."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype
    for kinds, dtype in _NUMBERS:
        if isinstance(leaf, kinds):
            return dtype or torch.get_default_dtype()
    return None
