"""``x[i]`` and ``x[i] = v`` where i is a number that depends on a tensor."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.control_flow.scalars import TracedNumber

__all__ = ["get_item", "holds_number", "set_item"]


def holds_number(index: Any) -> bool:
    """Return whether an index holds a number that depends on a tensor, by itself or as the bound of a slice."""
    for item in index if isinstance(index, tuple) else (index,):
        parts = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
        if any(isinstance(part, TracedNumber) for part in parts):
            return True
    return False


def _split(tensor: torch.Tensor, index: Any) -> tuple[list[Any], list[tuple[int, torch.Tensor]]]:
    """Return the index with 0:1 in the place of each traced position, and (dimension, position) of these.

    Raises:
        TypeError: positions that depend on tensors stand beside index tensors.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(1 for item in items if item is not None and item is not Ellipsis)
    plain: list[Any] = []
    traced: list[tuple[int, torch.Tensor]] = []
    dimension = 0
    for item in items:
        if item is Ellipsis:
            dimension += tensor.ndim - consumed
        elif isinstance(item, TracedNumber):
            size = tensor.shape[dimension]
            position = item.as_kind(int).tensor
            traced.append((dimension, torch.where(position < 0, position + size, position)))
            item = 0
        elif isinstance(item, slice):
            parts = (item.start, item.stop, item.step)
            item = slice(*(part.symbolic() if isinstance(part, TracedNumber) else part for part in parts))
        elif isinstance(item, torch.Tensor) and any(isinstance(other, TracedNumber) for other in items):
            raise TypeError("an index mixes tensors with numbers that depend on tensors")
        if item is not None and item is not Ellipsis:
            dimension += 1
        plain.append(item)
    return plain, traced


def get_item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """Return ``tensor[index]``."""
    plain, traced = _split(tensor, index)
    for dimension, position in traced:
        tensor = tensor.index_select(dimension, position.reshape(1))
    return tensor[tuple(plain)]


def set_item(tensor: torch.Tensor, index: Any, value: Any) -> None:
    """Run ``tensor[index] = value``."""
    plain, traced = _split(tensor, index)
    if isinstance(value, TracedNumber):
        value = value.tensor.to(tensor.dtype)
    if not traced:
        tensor[tuple(plain)] = value
        return
    part = tensor
    for dimension, position in traced:
        part = part.index_select(dimension, position.reshape(1))
    part = part.clone()
    part[tuple(plain)] = value
    # From the outside in: each step writes the changed slice back into what it was taken from.
    for depth in range(len(traced) - 1, 0, -1):
        outer = tensor
        for dimension, position in traced[:depth]:
            outer = outer.index_select(dimension, position.reshape(1))
        dimension, position = traced[depth]
        part = outer.index_copy(dimension, position.reshape(1), part)
    dimension, position = traced[0]
    tensor.index_copy_(dimension, position.reshape(1), part)
