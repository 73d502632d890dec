"""fxopt's products of groups of rows with a matrix each: what the experts of a mixture compute.

``fxopt::grouped_mm(x, weight, offsets)``
    ``x`` f[rows, k], whose rows ``offsets[i - 1] : offsets[i]`` are multiplied by ``weight[i]``; ``weight`` f[groups,
    k, n], ``offsets`` int[groups], ascending: where each group ends. Yields f[rows, n]; rows behind the last group
    are 0. (``aten::_grouped_mm`` leaves these undefined, and takes float32 neither with any width nor while it is
    traced.) Source: Gale et al., MegaBlocks, MLSys 2023.
``fxopt::split_groups(x, offsets)``, ``fxopt::join_groups(parts, rows)``
    The rows of each group, f[rows of the group, k] each; and f[rows, n] of such parts one after the other, 0 behind
    them. Between them each group is computed by operators of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["GROUPED_MM", "JOIN_GROUPS", "SPLIT_GROUPS", "as_grouped_mm", "group_bounds"]

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define("grouped_mm(Tensor x, Tensor weight, Tensor offsets) -> Tensor")
_LIBRARY.define("split_groups(Tensor x, Tensor offsets) -> Tensor[]")
_LIBRARY.define("join_groups(Tensor[] parts, SymInt rows) -> Tensor")

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


def _split_groups(x: Tensor, offsets: Tensor) -> list[Tensor]:
    return [x[start:end].clone() for start, end in group_bounds(offsets)]


def _shapes_of_groups(x: Tensor, offsets: Tensor) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [x.new_empty(context.new_dynamic_size(), x.shape[1]) for _ in range(offsets.shape[0])]


def _keep_rows(ctx: Any, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    ctx.rows = inputs[0].shape[0]


def _gradient_of_split(ctx: Any, outer: list[Tensor]) -> tuple[Tensor, None]:
    return _join_groups(outer, ctx.rows), None


def _join_groups(parts: list[Tensor], rows: int) -> Tensor:
    joined = torch.cat(parts)
    return torch.cat([joined, joined.new_zeros(rows - joined.shape[0], joined.shape[1])])


def _shape_of_join(parts: list[Tensor], rows: int) -> Tensor:
    return parts[0].new_empty(rows, parts[0].shape[1])


def _keep_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sizes = [part.shape[0] for part in inputs[0]]


def _gradient_of_join(ctx: Any, outer: Tensor) -> tuple[list[Tensor], None]:
    return list(outer[: sum(ctx.sizes)].split(ctx.sizes)), None


_LIBRARY.impl("split_groups", _split_groups, "CompositeExplicitAutograd")
_LIBRARY.impl("join_groups", _join_groups, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::split_groups", _shapes_of_groups)
torch.library.register_fake("fxopt::join_groups", _shape_of_join)
torch.library.register_autograd("fxopt::split_groups", _gradient_of_split, setup_context=_keep_rows)
torch.library.register_autograd("fxopt::join_groups", _gradient_of_join, setup_context=_keep_sizes)
_LIBRARY.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::grouped_mm", _shape)
torch.library.register_autograd("fxopt::grouped_mm", _gradient, setup_context=_keep)

GROUPED_MM = torch.ops.fxopt.grouped_mm.default
SPLIT_GROUPS = torch.ops.fxopt.split_groups.default
JOIN_GROUPS = torch.ops.fxopt.join_groups.default


def as_grouped_mm(target: Any) -> Any:
    """Return ``fxopt::grouped_mm`` for an operator of another library that is the same, else ``target``."""
    return GROUPED_MM if isinstance(target, OpOverload) and target._schema.name in _SAME else target
