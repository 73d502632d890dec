"""Quantize the rows of a matrix in blocks, each with a scale of its own: arithmetic alone, no graph.

A symmetric block has the integers ``-2**(bits - 1) .. 2**(bits - 1) - 1``; its scale may be negative, so that the
largest magnitude of a block lies on the side that has one integer more. A block with a zero point reaches from its
smallest to its largest number, 0 included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F

from fxopt.weight_only_ops import dequantize_blocks, pack_bits

__all__ = ["BITS", "SMALLEST_BLOCK", "BlockWeight", "Search", "block_size_problem", "quantize_blocks"]

Search = Literal["absmax", "mse"]
SMALLEST_BLOCK = 16
"""Numbers in a block that MatMulNBits and GatherBlockQuantized have at least."""
BITS = (2, 4, 8)
"""Widths that MatMulNBits has on a CPU."""
_SHRINK = torch.linspace(1.0, 0.5, 16, dtype=torch.float64)  # of the range of a block, tried by "mse"
_TOGETHER = 2**16  # numbers
_SMALLEST = 2.0**-100  # a scale below underflows in products
_Choice = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class BlockWeight:
    """A matrix in blocks, as MatMulNBits stores it.

    Attributes:
        packed: u8[out, blocks, block_size bits / 8].
        scales: f32[out, blocks].
        zero_points: u8[out, ceil(blocks bits / 8)], or None where all are ``2**(bits - 1)``.
        bits: Width of an integer.
        block_size: Integers in a block.
        features_in: Length of a row.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bits: int
    block_size: int
    features_in: int

    def floats(self) -> torch.Tensor:
        """Return the matrix that it stands for, f32[out, in]."""
        return dequantize_blocks(
            self.packed, self.scales, self.zero_points, self.bits, self.block_size, self.features_in
        )

    def in_groups(self, groups: int) -> BlockWeight:
        """Return the rows of all groups with an axis of the groups in front."""
        shape = (groups, -1)
        offsets = None if self.zero_points is None else self.zero_points.unflatten(0, shape)
        packed, scales = self.packed.unflatten(0, shape), self.scales.unflatten(0, shape)
        return dataclasses.replace(self, packed=packed, scales=scales, zero_points=offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        held = (self.packed, self.scales, self.zero_points)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def quantize_blocks(
    weight: torch.Tensor, *, bits: int, block_size: int, symmetric: bool = True, search: Search = "mse"
) -> BlockWeight:
    """Return a matrix quantized in blocks along its rows.

    Args:
        weight: f32[out, in], finite.
        bits: 2, 4 or 8.
        block_size: Numbers of a row that share a scale: a power of two, 16 or more.
        symmetric: Leave out zero points.
        search: ``"absmax"`` covers the whole range of a block. ``"mse"`` tries 16 ranges down to half of it, fits the
            scale to the integers by least squares, and takes what has the smallest squared error.

    Raises:
        ValueError: the matrix is none, is empty, or holds NaN or infinity; a width or size is not one of these.

    Error: with ``"absmax"`` and zero points at most one scale for each number; mean squared error of ``"mse"`` is at
    most that of ``"absmax"``.
    """
    _check(weight, bits, block_size)
    rows = weight.detach().float()
    blocks = F.pad(rows, (0, -rows.shape[1] % block_size)).unflatten(1, (-1, block_size))
    # A few blocks at a time: the search goes over the same numbers again and again, and they stay in the cache.
    parts = [_chosen(part, bits, symmetric, search) for part in blocks.flatten(0, 1).split(_TOGETHER // block_size)]
    codes, scales, zero_points = (
        torch.cat(tensors).unflatten(0, blocks.shape[:2]) for tensors in zip(*parts, strict=True)
    )
    return BlockWeight(
        pack_bits(codes, bits),
        scales[..., 0],
        None if symmetric else pack_bits(zero_points[..., 0], bits),
        bits,
        block_size,
        rows.shape[1],
    )


def block_size_problem(block_size: int) -> str | None:
    """Return what is wrong with the size of a block, or None."""
    if block_size < SMALLEST_BLOCK or block_size & (block_size - 1):
        return f"block_size is {block_size}; wanted a power of two of {SMALLEST_BLOCK} or more"
    return None


def _check(weight: torch.Tensor, bits: int, block_size: int) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix with elements")
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; wanted {', '.join(map(str, BITS))}")
    if (problem := block_size_problem(block_size)) is not None:
        raise ValueError(problem)
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity")


def _chosen(
    blocks: torch.Tensor, bits: int, symmetric: bool, search: Search
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return integers [blocks, block_size], and scale and zero point [blocks, 1] of each block."""
    candidates = _candidates(blocks, bits, symmetric, search)
    scale, zero_point = next(candidates)
    if search == "mse":
        best = (scale, zero_point, _error(blocks, scale, zero_point, bits))
        for candidate in candidates:
            best = _better(blocks, best, *candidate, bits)
        scale, zero_point, _ = _better(blocks, best, _fitted_scale(blocks, *best[:2], bits), best[1], bits)
    return _codes(blocks, scale, zero_point, bits).to(torch.uint8), scale, zero_point.to(torch.uint8)


def _better(blocks: torch.Tensor, best: _Choice, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> _Choice:
    """Return scale, zero point and squared error of what is better for each block."""
    found = (scale, zero_point, _error(blocks, scale, zero_point, bits))
    better = found[2] < best[2]
    scale, zero_point, error = (torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return scale, zero_point, error


def _candidates(
    blocks: torch.Tensor, bits: int, symmetric: bool, search: Search
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scale and zero point of all blocks, the whole range first."""
    shrinks = _SHRINK.tolist() if search == "mse" else [1.0]
    if not symmetric:
        low, high = blocks.amin(-1, keepdim=True).clamp_max(0), blocks.amax(-1, keepdim=True).clamp_min(0)
        for shrink in shrinks:
            scale = _usable((high - low) * shrink / (2**bits - 1))
            yield scale, torch.round(-low * shrink / scale).clamp(0, 2**bits - 1)
        return
    half = 2 ** (bits - 1)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    middle = torch.full_like(largest, half)
    for shrink in shrinks:
        yield _usable(largest * shrink / -half), middle
    if search == "mse":  # both ends in range, at the price of one integer
        yield _usable(largest / (half - 1)), middle


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """Return scales that are not too small; 1 for a block of zeros."""
    large = torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp_min(_SMALLEST)
    return torch.where(scale == 0, 1.0, large)


def _codes(blocks: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    return (blocks / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)


def _error(blocks: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    codes = _codes(blocks, scale, zero_point, bits)
    return codes.sub_(zero_point).mul_(scale).sub_(blocks).square_().sum(-1, keepdim=True)


def _fitted_scale(blocks: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the scale that suits the integers best: that of the least squares."""
    steps = _codes(blocks, scale, zero_point, bits).sub_(zero_point)
    power = steps.square().sum(-1, keepdim=True)
    return _usable(torch.where(power > 0, (steps * blocks).sum(-1, keepdim=True) / power.clamp_min(1), scale))
