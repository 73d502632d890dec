"""Weights of few bits: com.microsoft's block kernels, and tables that ORT looks weights up in when it loads a file.

MatMulNBits and GatherBlockQuantized expand their blocks while they run. Tables and blocks of other layers have no such
kernel: the file holds the packed codes with the table or the scales, and ORT with its optimizer on computes the float
weight once, when it loads the file; with its optimizer off, on each run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch

from fxopt.export.emitter import Emitter, Value, dims, rank
from fxopt.export.registry import Refused, translates
from fxopt.export.sizes import Size
from fxopt.export.translations.index import as_index
from fxopt.weight_only_ops import EXPAND_NBITS, GATHER_NBITS, LOOKUP_NBITS, MATMUL_NBITS

__all__ = ["product_with_blocks"]

_MICROSOFT = "com.microsoft"


@translates(MATMUL_NBITS)
def matmul_nbits(
    emit: Emitter,
    x: Value,
    packed: Value,
    scales: Value,
    zero_points: Value | None,
    bits: int,
    block_size: int,
    features_in: int,
    bias: Value | None,
    accuracy_level: int,
) -> Value:
    shape = (*dims(x)[:-1], dims(packed)[0])
    blocks = packed, scales, zero_points
    return product_with_blocks(emit, x, blocks, bias, bits, block_size, features_in, accuracy_level, shape)


def product_with_blocks(
    emit: Emitter,
    x: Value,
    blocks: tuple[Value, Value, Value | None],
    bias: Value | None,
    bits: int,
    block_size: int,
    features_in: int,
    accuracy_level: int,
    shape: Sequence[Size] | None,
) -> Value:
    """Return the product with a weight in blocks: integers, scales and zero points; its shape where that is known."""
    return emit(
        "MatMulNBits", x, *blocks, None, bias, domain=_MICROSOFT, dims=shape,
        K=features_in, N=dims(blocks[0])[0], bits=bits, block_size=block_size, accuracy_level=accuracy_level or None,
    )  # fmt: skip


@translates(GATHER_NBITS)
def gather_nbits(
    emit: Emitter,
    packed: Value,
    scales: Value,
    zero_points: Value | None,
    index: Value,
    bits: int,
    block_size: int,
    features_in: int,
) -> Value:
    """The rows come with the padding of their last block, which is cut off."""
    flat, (_, blocks) = _in_rows(emit, packed)
    padded = blocks * block_size
    found = emit(
        "GatherBlockQuantized", flat, as_index(emit, index), scales, zero_points,
        domain=_MICROSOFT, dims=(*dims(index), padded),
        gather_axis=0, quantize_axis=1, bits=bits, block_size=block_size,
    )  # fmt: skip
    found.type = ir.TensorType(ir.DataType.FLOAT)  # that of the scales, not of the first operand
    if padded == features_in:
        return found
    return emit("Slice", found, [0], [features_in], [-1], dims=(*dims(index), features_in))


@translates(EXPAND_NBITS)
def expand_nbits(
    emit: Emitter,
    packed: Value,
    scales: Value,
    zero_points: Value | None,
    bits: int,
    block_size: int,
    shape: Sequence[int],
) -> Value:
    bytes_in_rows, (rows, blocks) = _in_rows(emit, packed)
    each = (rows, blocks, block_size)
    codes = _unpacked(emit, bytes_in_rows, bits, blocks * block_size)
    offset: Value | float = float(2 ** (bits - 1))
    if zero_points is not None:
        offset = emit.reshape(emit.cast(_unpacked(emit, zero_points, bits, blocks), torch.float32), (rows, blocks, 1))
    centred = emit("Sub", emit.reshape(emit.cast(codes, torch.float32), each), offset, dims=each)
    floats = emit("Mul", centred, emit.reshape(scales, (rows, blocks, 1)), dims=each)
    flat = emit.reshape(floats, (rows, blocks * block_size))
    elements = math.prod(shape[1:])
    if elements < blocks * block_size:
        flat = emit("Slice", flat, [0], [elements], [1], dims=(rows, elements))
    return emit.reshape(flat, tuple(shape))


@translates(LOOKUP_NBITS)
def lookup_nbits(emit: Emitter, packed: Value, table: Value, bits: int, shape: Sequence[int]) -> Value:
    channels, elements = shape[0], math.prod(shape[1:])
    codes = emit.cast(_unpacked(emit, packed, bits, elements), torch.int32)
    if rank(table) == 2:
        groups, entries = dims(table)
        if not isinstance(groups, int) or not isinstance(entries, int):
            raise Refused("its table has dynamic sizes")
        first = torch.arange(groups, dtype=torch.int32).repeat_interleave(channels // groups) * entries
        codes = emit("Add", codes, emit.constant(first[:, None]), dims=(channels, elements))
        table = emit.reshape(table, (groups * entries,))
    found = emit("Gather", table, codes, axis=0, dims=(channels, elements))
    return emit.reshape(found, tuple(shape))


def _in_rows(emit: Emitter, packed: Value) -> tuple[Value, tuple[int, int]]:
    """Return the bytes of blocks, u8[rows, blocks, width], row by row, and the numbers of rows and blocks."""
    rows, blocks, width = (int(size) for size in dims(packed))
    return emit.reshape(packed, (rows, blocks * width)), (rows, blocks)


def _unpacked(emit: Emitter, packed: Value, bits: int, count: int) -> Value:
    """Return u8[channels, count]: every byte shifted by each place, and masked."""
    channels, width = dims(packed)
    assert isinstance(width, int)
    if bits == 8:
        return packed
    each = 8 // bits
    places = emit.constant(torch.arange(each, dtype=torch.uint8) * bits)
    column = emit("Unsqueeze", packed, [2], dims=(channels, width, 1))
    shifted = emit("BitShift", column, places, direction="RIGHT", dims=(channels, width, each))
    codes = emit("BitwiseAnd", shifted, emit.constant(torch.tensor(2**bits - 1, dtype=torch.uint8)), dims=dims(shifted))
    flat = emit.reshape(codes, (channels, width * each))
    if width * each == count:
        return flat
    return emit("Slice", flat, [0], [count], [1], dims=(channels, count))
