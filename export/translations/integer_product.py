"""Products of dequantized integers whose result stays a float: of matrices, and convolutions as such products.

    u8[n, c, h, w] -> pad -> channels last -> along each axis what lies at each position of the kernel, side by side
    -> u8[n, h', w', kernel * c] x s8[kernel * c, out] -> float[n, h', w', out] -> channels first

ORT has no kernel from integers to floats for a convolution: QLinearConv rounds its result to 8 bits, with one scale for
all channels, and ConvInteger takes up to three times as long. ``python -m tests.bench float_results`` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank, tensor_of
from fxopt.export.origins import WRITTEN_FOR
from fxopt.export.sizes import Size
from fxopt.export.translations.pad import padded
from fxopt.export.translations.quantized import Parameters, dequantized_from
from fxopt.export.translations.shape import INT_MAX, out_dims

__all__ = ["integer_convolution", "integer_product"]


def integer_product(emit: Emitter, x: Value, weight: Value, bias: Value | None) -> Value | None:
    """Return ``x @ weight + bias`` of dequantized integers as the one node that ORT has for it; None if unfit.

    Args:
        emit: What the node is emitted to.
        x: u8[..., k], dequantized.
        weight: s8[k, n], dequantized.
        bias: f32[n], a constant.
    """
    left, right = dequantized_from(x, torch.uint8), dequantized_from(weight, torch.int8)
    if emit.runtime != "ort-cpu" or left is None or right is None or not _is_float_constant(bias):
        return None
    return _product(emit, left, right, bias)


def integer_convolution(
    emit: Emitter,
    x: Value,
    weight: Value,
    bias: Value | None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> Value | None:
    """Return a convolution of one group as a product of its windows; None if its operands do not fit.

    Args:
        emit: What the nodes are emitted to.
        x: u8[n, c, sizes...], dequantized with one scale.
        weight: s8[out, c, kernel...], dequantized, a constant.
        bias: f32[out], a constant.
        strides: One number for each spatial axis.
        dilations: The same.
        pads: Zeros in front of each spatial axis, then behind each, as ONNX has them.
    """
    left, right = dequantized_from(x, torch.uint8), dequantized_from(weight, torch.int8)
    if emit.runtime != "ort-cpu" or left is None or right is None or not _is_float_constant(bias):
        return None
    offset, held = tensor_of(left[2]), tensor_of(right[0])
    if offset is None or offset.ndim or held is None:
        return None
    start = len(emit.scope.nodes)
    integers = _padded(emit, left[0], pads, int(offset))
    windows = emit.transpose(integers, [0, *range(2, rank(x)), 1])
    for axis in reversed(range(rank(x) - 2)):  # the last one first, so that its positions lie within those before it
        windows = _shifted_side_by_side(
            emit, windows, axis + 1, held.shape[axis + 2], strides[axis], dilations[axis], out_dims(emit)[axis + 2]
        )
    matrix = emit.constant(held.movedim((0, 1), (-1, -2)).reshape(-1, held.shape[0]))
    product = _product(emit, (windows, *left[1:]), (matrix, *right[1:]), bias)
    for node in emit.scope.nodes[start:]:
        node.metadata_props[WRITTEN_FOR] = "conv"
    return emit.transpose(product, [0, rank(x) - 1, *range(1, rank(x) - 1)])


def _is_float_constant(bias: Value | None) -> bool:
    return bias is None or (tensor_of(bias) is not None and dtype_of(bias) == torch.float32)


def _product(emit: Emitter, left: Parameters, right: Parameters, bias: Value | None) -> Value:
    (a, a_scale, a_zero), (b, b_scale, b_zero) = left, right
    operands = (a, b, a_scale, b_scale, a_zero, b_zero, bias)
    shape = (*dims(a)[:-1], dims(b)[-1]) if "dims" in a.meta else None
    product = emit("MatMulIntegerToFloat", *operands, domain="com.microsoft", dims=shape)
    product.type = ir.TensorType(ir.DataType.FLOAT)
    return product


def _padded(emit: Emitter, integers: Value, pads: Sequence[int], zero_point: int) -> Value:
    axes = len(pads) // 2
    amounts = {axis + 2: (pads[axis], pads[axes + axis]) for axis in range(axes)}
    if not any(pads):
        return integers
    sizes = [size + sum(amounts.get(axis, (0, 0))) for axis, size in enumerate(dims(integers))]
    result = padded(emit, integers, amounts, fill=zero_point)
    emit.set_dims(result, sizes)
    return result


def _shifted_side_by_side(
    emit: Emitter, x: Value, axis: int, positions: int, stride: int, dilation: int, size: Size
) -> Value:
    """Return, for each place that the kernel goes to along an axis, what is at its positions, along the last axis."""
    if positions == 1 and stride == 1:
        return x
    known = dims(x)
    shape = [*known[:axis], size, *known[axis + 1 :]]
    last = (positions - 1) * dilation
    pieces = [
        emit("Slice", x, [start], [start - last if start < last else INT_MAX], [axis], [stride], dims=shape)
        for start in range(0, last + 1, dilation)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return emit("Concat", *pieces, axis=rank(x) - 1, dims=[*shape[:-1], positions * shape[-1]])
