"""Scales of weights: by channel, symmetric, large enough for the bias beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxopt.attributes import get_path, owner_of
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.quantized_ops import QUANTIZE

__all__ = ["bias_integers", "channel_scales", "constant_of", "parameters_of", "scales_for_bias", "weight_integers"]

_SMALLEST = 2.0**-100  # products with scales of activations must not become 0
_LARGEST_BIAS = 2**31 - 1
_HEADROOM = 0.999  # of the 32 bits: rounding of the scale's product must not push a bias over the end


def channel_scales(weight: torch.Tensor, spec: QuantSpec) -> tuple[float, ...]:
    """Return the scales with which the largest magnitude of each channel becomes the largest integer.

    Args:
        weight: f32, any shape.
        spec: A symmetric spec; its axis is that of the channels, None for one scale.

    Returns:
        One float32 number a channel, > 0. That of a channel of zeros is tiny: its bias is counted in units of it.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    largest = weight.detach().abs().float()
    if spec.axis is None:
        bounds = largest.max().reshape(1) if largest.numel() else torch.zeros(1)
    else:
        other = [axis for axis in range(weight.ndim) if axis != spec.axis % weight.ndim]
        bounds = largest.amax(other) if other else largest
    if not bool(bounds.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity")
    scale = bounds / max(spec.limits[1], 1)
    return tuple(scale.clamp_min(_SMALLEST).tolist())


def scales_for_bias(scales: Sequence[float], bias: torch.Tensor | None, input_scale: float) -> tuple[float, ...]:
    """Return the scales, raised where the bias in units of input scale times weight scale would not fit 32 bits.

    A channel whose weights are almost zero has a tiny scale, and a bias that is not tiny; a larger scale costs nothing
    there, since such weights round to zero anyway beside the bias.

    Args:
        scales: One a channel.
        bias: f32[channels], or None.
        input_scale: Of the activations that the weight is multiplied by.
    """
    if bias is None:
        return tuple(scales)
    needed = bias.detach().double().abs() / (input_scale * _HEADROOM * _LARGEST_BIAS)
    raised = torch.maximum(torch.tensor(scales, dtype=torch.float64), needed)
    up = torch.nextafter(raised.float(), torch.tensor(math.inf))
    kept = torch.tensor(scales, dtype=torch.float32)
    return tuple(torch.where(raised > kept.double(), up, kept).tolist())


def constant_of(node: torch.fx.Node) -> torch.Tensor:
    """Return the tensor that a ``get_attr`` node reads, without its gradient."""
    found: torch.Tensor = get_path(owner_of(node), str(node.target)).detach()
    return found


def parameters_of(spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale (f32) and zero point (of the integers' type) as the operators take them, [] or [channels]."""
    scale = torch.tensor(spec.scale, dtype=torch.float32)
    zero_point = torch.tensor(spec.zero_point, dtype=spec.dtype)
    return (scale, zero_point) if spec.axis is not None else (scale[0].clone(), zero_point[0].clone())


def weight_integers(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the integers of a weight, of its shape and of the type of ``spec``."""
    scale, zero_point = parameters_of(spec)
    axis = 0 if spec.axis is None else spec.axis
    return QUANTIZE(weight.detach().float(), scale, zero_point, axis, *spec.limits)  # type: ignore[no-any-return]  # torch declares no type


def bias_integers(
    bias: torch.Tensor, input_scale: float, weight: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a bias as i32[out], and its scales f32[out]: those of the products that it is added to.

    None if some element does not fit 32 bits: a weight scale is too small for its bias.
    """
    product = torch.tensor(input_scale, dtype=torch.float32) * torch.tensor(weight.scale, dtype=torch.float32)
    scale = product.expand(bias.numel()).contiguous()
    steps = torch.round(bias.detach().double() / scale.double())
    if not bool(steps.isfinite().all()) or float(steps.abs().max() if steps.numel() else 0.0) > _LARGEST_BIAS:
        return None
    return steps.to(torch.int32), scale
