"""Which integer kernels give other results on CPUs without VNNI, told from the weights of the optimized graph."""

from __future__ import annotations

import onnx_ir as ir
import torch

from fxopt.export.coverage_table import KERNELS
from fxopt.pair_sums import can_overflow

__all__ = ["overflowing_channels"]

# The kernels that add pairs of products in 16 bits, and the input that is the zero point of their activations, and so
# of their type; None where the kernel itself makes unsigned integers of floats.
_PAIRED: dict[str, int | None] = {
    "QLinearConv": 2,
    "QLinearMatMul": 2,
    "QGemm": 2,
    "MatMulInteger": 2,
    "MatMulIntegerToFloat": 4,
    "DynamicQuantizeMatMul": None,
    "DynamicQuantizeLSTM": None,
}


def overflowing_channels(node: ir.Node) -> int:
    """Return of how many output channels 16-bit sums can overflow on CPUs without VNNI; see ``fxopt/pair_sums.py``.

    Only weights that are constants are looked at. What is computed, or is multiplied exactly everywhere, counts 0.

    Args:
        node: Of a graph that ORT's optimizer has left at level "extended".
    """
    if node.op_type not in _PAIRED or _is_signed(node, _PAIRED[node.op_type]):
        return 0
    return sum(_overflowing(node, node.inputs[place]) for place in KERNELS[node.op_type].operands[1:])


def _is_signed(node: ir.Node, zero_point: int | None) -> bool:
    """Return whether the activations are int8; without a zero point they are what their producer makes."""
    if zero_point is None:
        return False
    told = node.inputs[zero_point] if zero_point < len(node.inputs) else None
    held = node.inputs[0] if told is None else told
    return held is not None and held.dtype is ir.DataType.INT8


def _overflowing(node: ir.Node, weight: ir.Value | None) -> int:
    tensor = None if weight is None else weight.const_value
    if tensor is None or tensor.dtype is not ir.DataType.INT8:
        return 0
    held = torch.from_numpy(tensor.numpy().copy())
    if node.op_type == "QLinearConv":
        return int(can_overflow(held, groups=node.attributes.get_int("group", 1)).sum())
    matrices = held.reshape(1, -1, 1) if held.ndim == 1 else held.reshape(-1, *held.shape[-2:])
    axis = 0 if node.attributes.get_int("transB", 0) else 1
    return sum(int(can_overflow(matrix, axis).sum()) for matrix in matrices)
