"""fxopt's operators of graphs whose weights are stored in few bits and whose arithmetic stays float.

``fxopt::matmul_nbits(x, packed, scales, zero_points, bits, block_size, features_in, bias, accuracy_level)``
    ``x @ w.T + bias`` with a weight ``w`` f32[out, features_in] stored in blocks of ``block_size`` numbers of a row.
``fxopt::grouped_matmul_nbits(x, packed, scales, zero_points, offsets, bits, block_size, features_in, accuracy_level)``
    The same without a bias for groups of rows with a weight each, which ``fxopt::grouped_mm`` says: the blocks of all
    have an axis more in front.
``fxopt::gather_nbits(packed, scales, zero_points, index, bits, block_size, features_in)``
    The rows of such a weight at ``index``: an embedding.
``fxopt::expand_nbits(packed, scales, zero_points, bits, block_size, shape)``
    A weight of any shape from such blocks, its first axis being the rows: for layers that have no kernel of blocks.
``fxopt::lookup_nbits(packed, table, bits, shape)``
    A weight of any shape whose elements are numbers of a table: ``table[code]``, or ``table[group, code]`` where each
    group of output channels has a table of its own. Differentiable in ``table``: the gradient of an entry is the sum
    over the elements that hold it (Han, Mao, Dally: Deep Compression, ICLR 2016).
``fxopt::binarize_ste(weight)``, ``fxopt::ternarize_ste(weight)``
    A float weight as the binary or ternary one that it stands for, for training: ``alpha sign(w)`` with the mean
    magnitude of each output channel as ``alpha`` (Rastegari et al., XNOR-Net, ECCV 2016); ``alpha t`` with ``t`` 0 up
    to 0.7 mean magnitudes, and ``alpha`` the mean of the magnitudes above that (Li, Liu: Ternary Weight Networks,
    2016). The gradient goes straight through, and stops where ``|w| > 1`` (Courbariaux et al., 2016).

Blocks are stored as com.microsoft's MatMulNBits reads them: ``packed`` u8[out, blocks, block_size bits / 8], the first
number of a byte in its lowest bits, the last block of a row padded; ``scales`` f32[out, blocks]; ``zero_points``
u8[out, ceil(blocks bits / 8)], packed alike, or None for ``2**(bits - 1)``. A number is ``(q - zero_point) scale``.
``packed`` of a table is u8[out, ceil(elements of a channel times bits / 8)]. ``accuracy_level`` is an attribute of
MatMulNBits and does nothing here.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fxopt.grouped_ops import GROUPED_MM

__all__ = [
    "BINARIZE_STE", "EXPAND_NBITS", "GATHER_NBITS", "GROUPED_MATMUL_NBITS", "LOOKUP_NBITS", "MATMUL_NBITS",
    "TERNARIZE_STE", "TERNARY_THRESHOLD", "dequantize_blocks", "pack_bits", "unpack_bits",
]  # fmt: skip

TERNARY_THRESHOLD = 0.7
"""In mean magnitudes of a channel: what is not above becomes 0 in a ternary weight."""

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(
    "matmul_nbits(Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, int bits, int block_size, "
    "int features_in, Tensor? bias=None, int accuracy_level=0) -> Tensor"
)
_LIBRARY.define(
    "grouped_matmul_nbits(Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, Tensor offsets, int bits, "
    "int block_size, int features_in, int accuracy_level=0) -> Tensor"
)
_LIBRARY.define(
    "gather_nbits(Tensor packed, Tensor scales, Tensor? zero_points, Tensor index, int bits, int block_size, "
    "int features_in) -> Tensor"
)
_LIBRARY.define(
    "expand_nbits(Tensor packed, Tensor scales, Tensor? zero_points, int bits, int block_size, int[] shape) -> Tensor"
)
_LIBRARY.define("lookup_nbits(Tensor packed, Tensor table, int bits, int[] shape) -> Tensor")
_LIBRARY.define("binarize_ste(Tensor weight) -> Tensor")
_LIBRARY.define("ternarize_ste(Tensor weight) -> Tensor")


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return integers of 1, 2, 4 or 8 bits as bytes, u8[..., ceil(n bits / 8)], the first one in the lowest bits.

    Args:
        codes: Integers in [0, 2**bits), [..., n].
        bits: Width of each.

    Raises:
        ValueError: a code does not fit, or the width is another one.
    """
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits is {bits}; wanted 1, 2, 4 or 8")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    if bits == 8:
        return codes.to(torch.uint8)
    each = 8 // bits
    padded = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % each))
    grouped = padded.unflatten(-1, (padded.shape[-1] // each, each))
    packed = torch.zeros_like(grouped[..., 0])
    for place in range(each):
        packed |= grouped[..., place] << (place * bits)
    return packed


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` integers of each row that :func:`pack_bits` packed, u8[..., count]."""
    if bits == 8:
        return packed[..., :count]
    parts = [(packed >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :count]


def dequantize_blocks(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    block_size: int,
    features_in: int,
) -> torch.Tensor:
    """Return the rows that blocks stand for, f32[..., features_in]; differentiable in ``scales``.

    Args:
        packed: u8[..., blocks, block_size bits / 8].
        scales: f32[..., blocks].
        zero_points: u8[..., ceil(blocks bits / 8)], or None for ``2**(bits - 1)``.
        bits: 2, 4 or 8.
        block_size: Numbers in a block.
        features_in: Numbers in a row; at most ``blocks block_size``.
    """
    codes = unpack_bits(packed, bits, block_size).to(scales.dtype)
    offset: torch.Tensor | int = 2 ** (bits - 1)
    if zero_points is not None:
        offset = unpack_bits(zero_points, bits, scales.shape[-1]).to(scales.dtype)[..., None]
    return ((codes - offset) * scales[..., None]).flatten(-2)[..., :features_in]


def _matmul_nbits(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    block_size: int,
    features_in: int,
    bias: torch.Tensor | None = None,
    accuracy_level: int = 0,
) -> torch.Tensor:
    return F.linear(x, dequantize_blocks(packed, scales, zero_points, bits, block_size, features_in), bias)


def _grouped_matmul_nbits(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    offsets: torch.Tensor,
    bits: int,
    block_size: int,
    features_in: int,
    accuracy_level: int = 0,
) -> torch.Tensor:
    weight = dequantize_blocks(packed, scales, zero_points, bits, block_size, features_in)
    product: torch.Tensor = GROUPED_MM(x, weight.transpose(-2, -1), offsets)
    return product


def _gather_nbits(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    index: torch.Tensor,
    bits: int,
    block_size: int,
    features_in: int,
) -> torch.Tensor:
    # Not by indexing with a tensor, which would count negative numbers from the end where an embedding raises.
    places = index.flatten()
    offsets = None if zero_points is None else zero_points.index_select(0, places)
    chosen, factors = packed.index_select(0, places), scales.index_select(0, places)
    rows = dequantize_blocks(chosen, factors, offsets, bits, block_size, features_in)
    return rows.reshape(*index.shape, features_in)


def _expand_nbits(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    block_size: int,
    shape: Sequence[int],
) -> torch.Tensor:
    return dequantize_blocks(packed, scales, zero_points, bits, block_size, math.prod(shape[1:])).reshape(list(shape))


def _lookup_nbits(packed: torch.Tensor, table: torch.Tensor, bits: int, shape: Sequence[int]) -> torch.Tensor:
    codes = unpack_bits(packed, bits, math.prod(shape[1:])).long()
    if table.ndim == 2:
        groups, entries = table.shape
        first = torch.arange(groups, device=codes.device) * entries
        codes = codes + first.repeat_interleave(shape[0] // groups)[:, None]
    # An index_select, and no indexing with a tensor: its gradient is the sum over equal codes in one scatter.
    return table.flatten().index_select(0, codes.flatten()).reshape(list(shape))


def _others(weight: torch.Tensor) -> list[int]:
    return list(range(1, weight.ndim))


def _mean(weight: torch.Tensor) -> torch.Tensor:
    return weight.mean(_others(weight), keepdim=True) if weight.ndim > 1 else weight


def _straight_through(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return ``value`` exactly, with the gradient of ``clamp(weight, -1, 1)``."""
    clipped = weight.clamp(-1, 1)
    return value.detach() + (clipped - clipped.detach())


def _binarize_ste(weight: torch.Tensor) -> torch.Tensor:
    alpha = _mean(weight.detach().abs())
    return _straight_through(weight, torch.where(weight.detach() >= 0, alpha, -alpha))


def _ternarize_ste(weight: torch.Tensor) -> torch.Tensor:
    held = weight.detach()
    size = held.abs()
    kept = size > TERNARY_THRESHOLD * _mean(size)
    count = kept.sum(_others(held), keepdim=True) if held.ndim > 1 else kept
    total = (size * kept).sum(_others(held), keepdim=True) if held.ndim > 1 else size * kept
    alpha = total / count.clamp_min(1)
    return _straight_through(weight, torch.where(kept, held.sign() * alpha, 0.0))


# Composite over differentiable ops: autograd derives the gradients, and fake tensors run them as they are.
_LIBRARY.impl("matmul_nbits", _matmul_nbits, "CompositeImplicitAutograd")
_LIBRARY.impl("grouped_matmul_nbits", _grouped_matmul_nbits, "CompositeImplicitAutograd")
_LIBRARY.impl("gather_nbits", _gather_nbits, "CompositeImplicitAutograd")
_LIBRARY.impl("expand_nbits", _expand_nbits, "CompositeImplicitAutograd")
_LIBRARY.impl("lookup_nbits", _lookup_nbits, "CompositeImplicitAutograd")
_LIBRARY.impl("binarize_ste", _binarize_ste, "CompositeImplicitAutograd")
_LIBRARY.impl("ternarize_ste", _ternarize_ste, "CompositeImplicitAutograd")

MATMUL_NBITS = torch.ops.fxopt.matmul_nbits.default
GROUPED_MATMUL_NBITS = torch.ops.fxopt.grouped_matmul_nbits.default
GATHER_NBITS = torch.ops.fxopt.gather_nbits.default
EXPAND_NBITS = torch.ops.fxopt.expand_nbits.default
LOOKUP_NBITS = torch.ops.fxopt.lookup_nbits.default
BINARIZE_STE = torch.ops.fxopt.binarize_ste.default
TERNARIZE_STE = torch.ops.fxopt.ternarize_ste.default
