"""Scales with which the 16-bit sums of CPUs without VNNI cannot overflow, raised in the channels that need it only.

``fxopt/pair_sums.py`` says what is added in 16 bits, and in which kernels. Most channels of 8-bit weights have some
pair that does not fit, but few are twice as far: a scale raised by a third on average is enough (``python -m
tests.bench saturation_table``). A mobilenetv2 with a score of 0.920 in floats keeps 0.918 on an AMD Zen 3 without VNNI,
and 0.638 without such scales (``python -m tests.bench saturation_in_ort``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from fxopt.pair_sums import can_overflow, kernel_order, pairs
from fxopt.quantized_ops import QUANTIZE

__all__ = ["SaturationProof", "avoid_saturation", "proof"]

_SLACK = 1 - 1e-5  # for the rounding of the floats that tell which pairs may matter
_SHARE = 64  # two magnitudes of at most this cannot overflow, whatever the activations


@dataclasses.dataclass(frozen=True)
class SaturationProof:
    """What is known of the 16-bit sums of one weight.

    Attributes:
        channels: Number of output channels.
        overflowing: How many can overflow with the scales that were given.
        remaining: How many still can with the raised scales: 0, or the scales were raised for other weights.
        largest: Largest magnitude of an integer in the channels that were cut; 0 if none was.
        increase: The largest factor by which a scale was raised; 1 if none was.
    """

    channels: int
    overflowing: int
    remaining: int
    largest: int
    increase: float

    def __str__(self) -> str:
        if not self.overflowing:
            return f"none of {self.channels} channels can overflow"
        found = f"{self.overflowing} of {self.channels} channels can overflow"
        if self.remaining:
            return f"{found}; {self.remaining} still can with the new scales"
        return f"{found}; cut to at most {self.largest} (scale × {self.increase:.2f})"


def avoid_saturation(
    weight: torch.Tensor,
    scale: Sequence[float],
    axis: int,
    *,
    groups: int = 1,
    largest: int = 255,
    limits: tuple[int, int] = (-127, 127),
) -> tuple[float, ...]:
    """Return the scales, raised to the smallest float32 numbers with which no 16-bit sum overflows.

    The scale of a channel that cannot overflow stays as it is, bit for bit. Larger scales than those returned are safe,
    too, since magnitudes only fall.

    Args:
        weight: f32, as :func:`kernel_order` takes it.
        scale: Exact float32 numbers > 0: one a channel, or one for all.
        axis: Axis of the output channels.
        groups: Of the convolution.
        largest: The largest integer that the activations take, 1 to 255.
        limits: The smallest and largest integer of the weights.

    Raises:
        ValueError: the weight holds NaN or infinity, an argument is out of range, or the number of scales is wrong.
    """
    held = torch.tensor(tuple(scale), dtype=torch.float32)
    integers = _quantized(weight, held, axis, limits)
    guilty = can_overflow(integers, axis, groups=groups, largest=largest)
    if not bool(guilty.any()):
        return tuple(scale)
    # A pair that fits fits with every larger scale: only those that do not have a say. Two of opposite sign always fit.
    first, second = pairs(integers.to(torch.int16), axis)
    sums = first + second
    most = 32767 // largest  # the same below zero: 32768 has no divisor with which that pair could overflow
    wrong = (sums > most) | (sums < -(32768 // largest))
    each = held.expand(len(guilty))
    magnitudes = [side.detach().float().abs() for side in pairs(weight, axis)]
    decisive = wrong & _may_be_decisive(magnitudes, wrong, each, most, min(limits[1], -limits[0]))
    end = torch.where(sums[decisive] > 0, float(limits[1]), float(-limits[0]))
    deciding = torch.stack([side[decisive] for side in magnitudes])
    needed = torch.zeros(wrong.shape)
    needed[decisive] = _smallest_scales(deciding, each.unsqueeze(1).expand(wrong.shape)[decisive], most, end)
    raised = torch.maximum(each, needed.amax(1))
    raised = raised.amax().expand(1) if len(held) == 1 else raised
    assert not bool(can_overflow(_quantized(weight, raised, axis, limits), axis, groups=groups, largest=largest).any())
    return tuple(raised.tolist())


def proof(
    weight: torch.Tensor,
    scale: Sequence[float],
    axis: int,
    *,
    raised: Sequence[float] | None = None,
    groups: int = 1,
    largest: int = 255,
    limits: tuple[int, int] = (-127, 127),
) -> SaturationProof:
    """Return what is known of a weight; as text "7 of 64 channels can overflow; cut to at most 84 (scale × 1.51)".

    Args:
        weight: f32, as :func:`kernel_order` takes it.
        scale: Those that were meant at first: one a channel, or one for all.
        axis: Axis of the output channels.
        raised: Those that are used; what :func:`avoid_saturation` returns if not given.
        groups: Of the convolution.
        largest: The largest integer that the activations take, 1 to 255.
        limits: The smallest and largest integer of the weights.

    Raises:
        ValueError: as :func:`avoid_saturation`.
    """
    if raised is None:
        raised = avoid_saturation(weight, scale, axis, groups=groups, largest=largest, limits=limits)
    before, after = (torch.tensor(tuple(numbers), dtype=torch.float32) for numbers in (scale, raised))
    integers = _quantized(weight, after, axis, limits)
    guilty = can_overflow(_quantized(weight, before, axis, limits), axis, groups=groups, largest=largest)
    remaining = can_overflow(integers, axis, groups=groups, largest=largest)
    cut = kernel_order(integers, axis)[guilty].to(torch.int32).abs()
    factors = (after.double() / before.double()).expand(len(guilty))[guilty]
    return SaturationProof(
        channels=len(guilty),
        overflowing=int(guilty.sum()),
        remaining=int(remaining.sum()),
        largest=int(cut.max()) if cut.numel() else 0,
        increase=float(factors.max()) if factors.numel() else 1.0,
    )


def _quantized(weight: torch.Tensor, scale: torch.Tensor, axis: int, limits: tuple[int, int]) -> torch.Tensor:
    channels = kernel_order(weight, axis).shape[0]
    if len(scale) not in (1, channels):
        raise ValueError(f"{len(scale)} scales for {channels} channels; wanted one, or one a channel")
    if not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
        raise ValueError("a scale is not a finite number above 0")
    if weight.numel() and not all(bool(end.isfinite()) for end in weight.detach().aminmax()):  # NaN is both then
        raise ValueError("the weight holds NaN or infinity")
    if not -128 <= limits[0] < 0 < limits[1] <= 127:
        raise ValueError(f"the integers of the weight are {limits[0]} to {limits[1]}; wanted a part of -128 to 127")
    scale = scale[0] if len(scale) == 1 else scale
    zero_point = torch.zeros(scale.shape, dtype=torch.int8)
    integers: torch.Tensor = QUANTIZE(weight.detach().float(), scale, zero_point, axis % weight.ndim, *limits)
    return integers


def _may_be_decisive(
    magnitudes: Sequence[torch.Tensor], wrong: torch.Tensor, scale: torch.Tensor, most: int, end: int
) -> torch.Tensor:
    """Return which pairs may need the largest scale of their channel, bool[channels, pairs].

    Rounding moves two magnitudes by 1 step together at most: a pair fits with ``(a + b) / (most - 1)``, and does not
    fit with less than ``(a + b) / (most + 1)`` unless one of the two saturates, which makes it smaller.

    Args:
        magnitudes: Of the first and of the second of each pair, f32[channels, pairs].
        wrong: Those that do not fit with ``scale``.
        scale: f32[channels].
        most: The largest sum that fits.
        end: Where an integer saturates.
    """
    first, second = magnitudes
    total = torch.where(wrong, first + second, 0.0)
    saturated = torch.maximum(first, second) > (end + 0.5) * scale[:, None]
    largest = torch.where(saturated, 0.0, total).amax(1, keepdim=True)
    return total >= largest * ((most - 1) / (most + 1) * _SLACK)


def _smallest_scales(magnitudes: torch.Tensor, low: torch.Tensor, most: int, end: torch.Tensor) -> torch.Tensor:
    """Return the smallest float32 scales with which two magnitudes sum to at most ``most``, f32[n].

    Their integers never rise with the scale, rounding included, and floats above 0 are ordered as their bits are: so
    halving the interval of bits finds the exact border, in at most 31 steps.

    Args:
        magnitudes: Of two weights each, f32[2, n].
        low: f32[n], scales that are too small.
        most: At least 128.
        end: f32[n], magnitude at which an integer saturates.
    """

    def fits(scale: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.round(magnitudes / scale), end).sum(0) <= most

    high = torch.nextafter(magnitudes.amax(0) / _SHARE, torch.tensor(math.inf))
    below, above = low.view(torch.int32).long(), high.view(torch.int32).long()
    while bool((above - below > 1).any()):
        middle = (below + above) // 2
        safe = fits(middle.int().view(torch.float32))
        above, below = torch.where(safe, middle, above), torch.where(safe, below, middle)
    return above.int().view(torch.float32)
