"""fxopt's product of groups of rows with a matrix each: what the experts of a mixture compute.

``fxopt::grouped_mm(x, weight, offsets)``
    ``x`` f[rows, k], whose rows ``offsets[i - 1] : offsets[i]`` are multiplied by ``weight[i]``; ``weight`` f[groups,
    k, n], ``offsets`` int[groups], ascending: where each group ends. Yields f[rows, n]; rows behind the last group
    are 0. (``aten::_grouped_mm`` leaves these undefined, and takes float32 neither with any width nor while it is
    traced.) Source: Gale et al., MegaBlocks, MLSys 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["GROUPED_MM", "as_grouped_mm", "group_bounds"]

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define("grouped_mm(Tensor x, Tensor weight, Tensor offsets) -> Tensor")

_SAME = {"transformers::grouped_mm_fallback"}
"""Operators of other libraries that compute the same of the same operands, by name: they need not be installed."""


def group_bounds(offsets: Tensor) -> list[tuple[int, int]]:
    """Return where each group starts and ends."""
    ends = [int(end) for end in offsets.tolist()]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    product = x.new_zeros(x.shape[0], weight.shape[2])
    for group, (start, end) in enumerate(group_bounds(offsets)):
        torch.mm(x[start:end], weight[group], out=product[start:end])
    return product


def _shape(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    torch._check(x.ndim == 2 and weight.ndim == 3 and offsets.ndim == 1, lambda: "grouped_mm takes 2, 3 and 1 axes")
    torch._check(x.shape[1] == weight.shape[1], lambda: f"{x.shape[1]} columns times {weight.shape[1]} rows")
    torch._check(offsets.shape[0] == weight.shape[0], lambda: f"{offsets.shape[0]} ends of {weight.shape[0]} groups")
    return x.new_empty(x.shape[0], weight.shape[2])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = ctx.saved_tensors
    of_x, of_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for group, (start, end) in enumerate(group_bounds(offsets)):
        of_x[start:end] = outer[start:end] @ weight[group].t()
        of_weight[group] = x[start:end].t() @ outer[start:end]
    return of_x, of_weight, None


_LIBRARY.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::grouped_mm", _shape)
torch.library.register_autograd("fxopt::grouped_mm", _gradient, setup_context=_keep)

GROUPED_MM = torch.ops.fxopt.grouped_mm.default


def as_grouped_mm(target: Any) -> Any:
    """Return ``fxopt::grouped_mm`` for an operator of another library that is the same, else ``target``."""
    return GROUPED_MM if isinstance(target, OpOverload) and target._schema.name in _SAME else target
