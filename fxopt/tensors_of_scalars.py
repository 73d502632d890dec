"""Trace tensors that are made of a list of numbers, some of which are tensors or sizes.

    torch.tensor([x.sum(), 1.0])   ->   torch.stack([x.sum().detach(), torch.scalar_tensor(1.0)])
    x[:, [0, x.shape[1] - 1]]      ->   x[:, torch.stack([torch.scalar_tensor(0), torch.scalar_tensor(n - 1)])]

Run eagerly, ``torch.tensor`` reads the value of each tensor in the list, and a trace has none; indexing makes plain
numbers of the sizes in a list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxopt.control_flow.scalars import TracedNumber

__all__ = ["TensorsOfScalars"]

_NUMBERS: tuple[tuple[Any, torch.dtype | None], ...] = (
    ((bool, torch.SymBool), torch.bool),
    ((int, torch.SymInt), torch.int64),
    ((float, torch.SymFloat), None),  # the default type
)
_POSITIONS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class TensorsOfScalars(TorchFunctionMode):
    """While active, ``torch.tensor``, ``as_tensor``, ``new_tensor`` and indexing keep what they read in the graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            return func(args[0], _index(args[1], args[0].device), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and args:
            made = _made(*args, **kwargs)
        elif func is torch.Tensor.new_tensor and len(args) == 2:
            own: dict[str, Any] = {"dtype": args[0].dtype, "device": args[0].device}
            asked = {name: given for name, given in kwargs.items() if given is not None}
            made = _made(args[1], **own | asked)
        else:
            made = None
        return func(*args, **kwargs) if made is None else made


def _made(
    data: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
) -> torch.Tensor | None:
    """Return the tensor, or None where torch makes it well alone, or refuses it.

    Args:
        data: Numbers, sizes and tensors of one element, in lists of lists.
        dtype: Of the result; that of the elements together if None.
        device: Of the result; that of the first tensor in the list if None.
        requires_grad: As for ``torch.tensor``; such a tensor is left to it.
        pin_memory: Has no meaning while tracing.
    """
    if not isinstance(data, list | tuple) or requires_grad:
        return None
    leaves, shape = list(_leaves(data)), _shape(data)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    dynamic = tensors or any(isinstance(leaf, torch.SymInt) for leaf in leaves)
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


def _index(index: Any, device: torch.device) -> Any:
    """Return the index with a tensor in place of each list of numbers with a size among them."""
    if isinstance(index, tuple):
        return tuple(_numbers(item, device) for item in index)
    # A list of lists by itself is a tuple of indices to torch, as it once was to numpy.
    flat = isinstance(index, list) and not any(isinstance(item, list | tuple) for item in index)
    return _numbers(index, device) if flat else index


def _numbers(item: Any, device: torch.device) -> Any:
    """Return positions as a tensor if torch would read one of them; masks and all others are left to it."""
    kinds = {_dtype(leaf) for leaf in _leaves(item)} if isinstance(item, list | tuple) else set()
    if not kinds or not kinds <= _POSITIONS or all(isinstance(leaf, int) for leaf in _leaves(item)):
        return item
    made = _made(item, torch.int64, device)
    return item if made is None else made


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, list | tuple):
        for item in data:
            yield from _leaves(item)
    elif isinstance(data, TracedNumber):
        yield data.tensor.to(torch.get_default_dtype()) if data.kind is float else data.tensor
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
