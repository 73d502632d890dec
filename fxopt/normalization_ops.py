"""fxopt's operators for normalization over some channels alone, by a mask.

``fxopt::masked_layer_norm(input, mask, weight, bias, eps)``
    Layer norm over the last axis, with mean and variance of the channels where ``mask`` is true: for these, what
    ``aten::layer_norm`` computes of them alone. input f32[..., C], mask bool[C], weight and bias f32[C] or None.
``fxopt::masked_group_norm(input, mask, groups, weight, bias, eps)``
    Group norm, with mean and variance of each group over all places of its channels where ``mask`` is true. input
    f32[N, C, ...], mask bool[C], weight and bias f32[C] or None; ``groups`` divides C.

The normalized value of a channel that is masked is 0, whatever its input is, so that ``bias`` is what comes out of it;
the same for all channels of a group that has none left. Half-precision inputs are computed with in single precision.

Source: Ba et al., Layer Normalization, 2016; Wu and He, Group Normalization, ECCV 2018.
"""

from __future__ import annotations

import math

import torch

__all__ = ["MASKED_GROUP_NORM", "MASKED_LAYER_NORM", "widened"]

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(
    "masked_layer_norm(Tensor input, Tensor mask, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
_LIBRARY.define(
    "masked_group_norm(Tensor input, Tensor mask, int groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)


def _masked_layer_norm(
    input: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    _check(mask, input.shape[-1])
    result = _standardized(widened(input), mask, mask.sum(), [-1], eps)
    return _scaled(result, weight, bias, 1).to(input.dtype)


def _masked_group_norm(
    input: torch.Tensor,
    mask: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    _check(mask, input.shape[1])
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide {input.shape[1]} channels")
    grouped = widened(input).unflatten(1, (groups, input.shape[1] // groups))
    behind = [1] * (input.ndim - 2)
    kept = mask.reshape(groups, -1, *behind)
    places = math.prod(input.shape[2:])
    count = kept.sum(1, keepdim=True) * places
    result = _standardized(grouped, kept, count, list(range(2, grouped.ndim)), eps).flatten(1, 2)
    return _scaled(result, weight, bias, input.ndim - 1).to(input.dtype)


def _check(mask: torch.Tensor, channels: int) -> None:
    if mask.dtype is not torch.bool or mask.ndim != 1 or mask.shape[0] != channels:
        raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}; wanted torch.bool [{channels}]")


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in half precision as float32, any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _standardized(
    x: torch.Tensor, mask: torch.Tensor, count: torch.Tensor, dims: list[int], eps: float
) -> torch.Tensor:
    """Return ``x`` with mean 0 and variance 1 over ``dims`` of what the mask keeps, and 0 elsewhere.

    Choosing instead of multiplying, so that infinity and NaN in what is masked, and their gradients, stay out.
    """
    number = count.clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum(dims, keepdim=True) / number
    centred = torch.where(mask, x - mean, 0.0)
    variance = (centred * centred).sum(dims, keepdim=True) / number
    return centred * torch.rsqrt(variance + eps)


def _scaled(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, axes: int) -> torch.Tensor:
    """Return ``x`` scaled and shifted; channels lie ``axes`` axes from the end."""
    column = [-1] + [1] * (axes - 1)
    if weight is not None:
        x = x * weight.reshape(column)
    return x if bias is None else x + bias.reshape(column)


# Composite over differentiable ops: autograd derives the gradients.
_LIBRARY.impl("masked_layer_norm", _masked_layer_norm, "CompositeImplicitAutograd")
_LIBRARY.impl("masked_group_norm", _masked_group_norm, "CompositeImplicitAutograd")

MASKED_LAYER_NORM = torch.ops.fxopt.masked_layer_norm.default
MASKED_GROUP_NORM = torch.ops.fxopt.masked_group_norm.default
