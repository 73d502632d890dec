"""Which integer kernels give other results on CPUs without VNNI, told from the weights of the optimized graph."""

from __future__ import annotations

import onnx_ir as ir
import torch

from fxopt.export.coverage_reasons import is_constant
from fxopt.pair_sums import can_overflow

__all__ = ["overflowing_channels"]

# Of each kernel that adds pairs of products in 16 bits: the inputs that are its weights, and the zero point of its
# activations, which has their type; None where the kernel itself makes unsigned integers of floats.
_PAIRED: dict[str, tuple[tuple[int, ...], int | None]] = {
    "QLinearConv": ((3,), 2),
    "QLinearMatMul": ((3,), 2),
    "QGemm": ((3,), 2),
    "MatMulInteger": ((1,), 2),
    "MatMulIntegerToFloat": ((1,), 4),
    "DynamicQuantizeMatMul": ((1,), None),
    "DynamicQuantizeLSTM": ((1, 2), None),
}


def overflowing_channels(node: ir.Node) -> int:
    """Return of how many output channels 16-bit sums can overflow on CPUs without VNNI; see ``fxopt/pair_sums.py``.

    Only weights that are constants are looked at. What is computed, or is multiplied exactly everywhere, counts 0.

    Args:
        node: Of a graph that ORT's optimizer has left at level "extended".
    """
    weights, zero_point = _PAIRED.get(node.op_type, ((), None))
    if zero_point is not None and _is_signed(node, zero_point):
        return 0
    return sum(_overflowing(node, node.inputs[place]) for place in weights if place < len(node.inputs))


def _is_signed(node: ir.Node, zero_point: int) -> bool:
    """Return whether the activations are int8; without a zero point they are what their producer makes."""
    told = node.inputs[zero_point] if zero_point < len(node.inputs) else None
    held = node.inputs[0] if told is None else told
    return held is not None and held.dtype is ir.DataType.INT8


def _overflowing(node: ir.Node, weight: ir.Value | None) -> int:
    if weight is None or not is_constant(weight) or weight.const_value is None:
        return 0
    if weight.const_value.dtype is not ir.DataType.INT8:
        return 0
    held = torch.from_numpy(weight.const_value.numpy().copy())
    if node.op_type == "QLinearConv":
        group = node.attributes.get("group")
        return int(can_overflow(held, groups=1 if group is None else group.as_int()).sum())
    matrices = held.reshape(1, -1, 1) if held.ndim == 1 else held.reshape(-1, *held.shape[-2:])
    transposed = node.attributes.get("transB")
    axis = 0 if transposed is not None and transposed.as_int() else 1
    return sum(int(can_overflow(matrix, axis).sum()) for matrix in matrices)
