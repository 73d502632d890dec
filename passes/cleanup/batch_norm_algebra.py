"""The arithmetic of folding a batch norm, in float64 and apart from any graph."""

from __future__ import annotations

import torch

__all__ = ["fold_after", "fold_before", "fold_into_norm", "scale_and_shift"]


def scale_and_shift(
    gamma: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s and t with ``batch_norm(x) = s x + t`` in each channel; float64[channels] each.

    Args:
        gamma: float64[channels], or None for 1.
        beta: float64[channels], or None for 0.
        mean: float64[channels], in units of x.
        deviation: float64[channels], ``sqrt(var + eps)``, in units of x.
    """
    scale = deviation.reciprocal() if gamma is None else gamma / deviation
    shift = -mean * scale if beta is None else beta - mean * scale
    return scale, shift


def fold_after(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the layer that equals ``scale * layer(x) + shift``.

    Args:
        weight: [out, in / groups, ...]; of a transposed convolution [in, out / groups, ...].
        bias: [out], or None.
        scale: float64[out].
        shift: float64[out].
        transposed: Whether the weight is that of a transposed convolution.
        groups: Number of groups; output channels are numbered group by group.
    """
    precise = weight.detach().double()
    if transposed:
        per_group = precise.unflatten(0, (groups, -1))
        factors = scale.reshape(groups, 1, -1, *([1] * (weight.ndim - 2)))
        folded = (per_group * factors).flatten(0, 1)
    else:
        folded = precise * scale.reshape(-1, *([1] * (weight.ndim - 1)))
    moved = shift if bias is None else bias.detach().double() * scale + shift
    return folded.to(weight.dtype), moved.to(weight.dtype)


def fold_before(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the layer that equals ``layer(scale * x + shift)``, no padding taken into account.

    Args:
        weight: [out, in / groups, ...]; of a transposed convolution [in, out / groups, ...].
        bias: [out], or None.
        scale: float64[in].
        shift: float64[in]; of a transposed convolution zero, as no bias stands for it.
        transposed: Whether the weight is that of a transposed convolution.
        groups: Number of groups.
    """
    precise = weight.detach().double()
    kernel = [1] * (weight.ndim - 2)
    if transposed:
        folded = precise * scale.reshape(-1, 1, *kernel)
        added = precise.new_zeros(weight.shape[1] * groups)
    else:
        per_group = precise.unflatten(0, (groups, -1))
        factors, offsets = (item.reshape(groups, 1, -1, *kernel) for item in (scale, shift))
        folded = (per_group * factors).flatten(0, 1)
        added = (per_group * offsets).flatten(0, 1).flatten(1).sum(1)
    moved = added if bias is None else bias.detach().double() + added
    return folded.to(weight.dtype), moved.to(weight.dtype)


def fold_into_norm(
    scale: torch.Tensor,
    shift: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    first_scale: torch.Tensor,
    first_shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gamma and beta of the batch norm that equals two in sequence, with the statistics of the second.

    All arguments and results are float64[channels].

    Args:
        scale: s of the second, ``norm(x) = s x + t``.
        shift: t of the second.
        mean: Mean of the second.
        deviation: ``sqrt(var + eps)`` of the second.
        first_scale: s of the first.
        first_shift: t of the first.
    """
    both = scale * first_scale
    return both * deviation, scale * first_shift + shift + both * mean
