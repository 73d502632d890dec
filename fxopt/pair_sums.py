"""Sums of two products in 16 bits, with which x86 CPUs without VNNI multiply 8-bit integers.

Unsigned activations and signed weights are multiplied by ``vpmaddubsw``: two neighbouring products are added in 16
bits, and a sum outside [-32768, 32767] becomes the end of that range. One product always fits. Two of opposite sign do,
too. So a channel is safe if the positive weights of each pair sum to at most ``32767 // largest``, and the negative
ones to at least ``-(32768 // largest)``, for the largest activation that occurs. For 255 both are 128, which is what
makes 7 bits safe.

Which integers are neighbours, and in which kernels, for ONNX Runtime 1.32. Found on an AMD Zen 3 (AVX2, no VNNI) with
one output channel for each two of the K weights, those two 127 (and -128) and the others 0, and activations of 255;
``tests/passes/quantize/test_saturation_in_ort.py`` holds each row against the installed version:

- QLinearMatMul, QGemm (either ``transB``), MatMulInteger, MatMulIntegerToFloat, DynamicQuantizeMatMul: weights
  ``(0, 1), (2, 3), ...`` along the input features; the last of an odd number is alone. The same for one row as for
  many, for weights that are constant or not, per tensor or per channel, with any zero points (subtracted later).
- QLinearConv of 1, 2 or 3 axes, pointwise, strided, grouped, in either layout: the same along (position of the kernel,
  input channel of the group), channels fastest. With an odd number of channels a pair spans two positions.
- QLinearConv where each group has one input and one output channel: exact, on AVX-512 as well. It adds no pairs.
- Exact in all of these: signed activations, unsigned weights. Exact in itself: ConvInteger. But ORT's optimizer makes
  the signed activations of quantizers unsigned from its extended level on, so a file of signed ones is no way out.

A CPU with AVX-512 and no VNNI was not at hand. The source of its kernels (MLAS, ``QgemvU8S8KernelAvx512Common.inc``,
``ConvSymKernelAvx512Core.asm``, and the packing shared with AVX2) adds the same pairs. ORT's session option
``session.x64quantprecision=1`` makes it exact on such CPUs in another way, by unsigned weights and a slower kernel.
"""

from __future__ import annotations

import torch

__all__ = ["can_overflow", "kernel_order", "pair_sums", "pairs"]


def kernel_order(weight: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """Return the weights of each output channel in the order in which kernels add them, [channels, K].

    Args:
        weight: [out, in] of a linear, or [out, in / groups, kernel sizes...] of a convolution, with ``axis`` 0;
            [in, out] of a matrix product, with ``axis`` 1.
        axis: Axis of the output channels.

    Raises:
        ValueError: the weight is of no such form.
    """
    if weight.ndim < 2 or not -weight.ndim <= axis < weight.ndim:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no output channels along axis {axis}")
    axis %= weight.ndim
    if axis == 0:
        return weight.movedim(1, -1).flatten(1)
    if axis == 1 and weight.ndim == 2:
        return weight.t()
    raise ValueError(f"output channels along axis {axis} of {weight.ndim}; wanted 0, or 1 of 2")


def pair_sums(weight: torch.Tensor, axis: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest sum that neighbouring weights of one sign have, i32[channels] each.

    Times the largest activation, they bound every 16-bit sum: activations are not negative, so that the sum of two
    products is largest where those of positive weights are, and those of negative weights are 0.

    Args:
        weight: i8, as :func:`kernel_order` takes it.
        axis: Axis of the output channels.
    """
    first, second = pairs(weight.to(torch.int16), axis)
    lowest = first.clamp(max=0) + second.clamp(max=0)
    highest = first.clamp(min=0) + second.clamp(min=0)
    if not first.shape[1]:
        return torch.zeros(len(first), dtype=torch.int32), torch.zeros(len(first), dtype=torch.int32)
    return lowest.amin(1).int(), highest.amax(1).int()


def can_overflow(weight: torch.Tensor, axis: int = 0, *, groups: int = 1, largest: int = 255) -> torch.Tensor:
    """Return which output channels have activations for which a 16-bit sum overflows, bool[channels].

    Not a bound but exact: the activations that do it are ``largest`` at one pair, and 0 elsewhere.

    Args:
        weight: i8, the integers that the kernel gets, as :func:`kernel_order` takes them.
        axis: Axis of the output channels.
        groups: Of the convolution; a depthwise kernel adds no pairs.
        largest: The largest integer that the activations take, 1 to 255. A narrower calibrated range does not make it
            smaller: the largest integer is what saturates.

    Raises:
        ValueError: ``largest`` is out of range, or the weight of no such form.
    """
    if not 1 <= largest <= 255:
        raise ValueError(f"the largest activation is {largest}; wanted 1 to 255")
    lowest, highest = pair_sums(weight, axis)
    if _is_depthwise(weight, axis, groups):
        return torch.zeros_like(highest, dtype=torch.bool)
    return (largest * highest > 32767) | (largest * lowest < -32768)


def pairs(weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the second of each two weights that are added, [channels, K / 2]; a missing one is 0.

    Args:
        weight: As :func:`kernel_order` takes it.
        axis: Axis of the output channels.
    """
    ordered = kernel_order(weight, axis)
    if ordered.shape[1] % 2:
        ordered = torch.cat([ordered, ordered.new_zeros(len(ordered), 1)], 1)
    return ordered[:, 0::2], ordered[:, 1::2]


def _is_depthwise(weight: torch.Tensor, axis: int, groups: int) -> bool:
    """Return whether each group has one input and one output channel; ``groups`` 1 of a linear is no such case."""
    return weight.ndim > 2 and axis % weight.ndim == 0 and weight.shape[1] == 1 and weight.shape[0] == groups
