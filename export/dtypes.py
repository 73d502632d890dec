"""Element types: PyTorch's, ONNX's, what PyTorch promotes to, and what ORT's CPU kernels compute in."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import onnx_ir as ir
import sympy
import torch

from fxopt.export.kernels import KERNELS

__all__ = [
    "HALF_TYPES", "Runtime", "computed_dtype", "is_cast_with_care", "is_truth", "kernel_dtype", "onnx_dtype",
    "promoted", "torch_dtype",
]  # fmt: skip

Runtime = Literal["ort-cpu", "onnx"]
"""Whose kernels a file is written for: ORT's on a CPU, or those of a device that has them in bfloat16 as well."""

HALF_TYPES = frozenset({torch.float16, torch.bfloat16})

_TO_ONNX = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.bool: ir.DataType.BOOL,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
    torch.uint16: ir.DataType.UINT16,
    torch.uint32: ir.DataType.UINT32,
    torch.uint64: ir.DataType.UINT64,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
    torch.complex64: ir.DataType.COMPLEX64,
    torch.complex128: ir.DataType.COMPLEX128,
}
_TO_TORCH = {onnx: torch_ for torch_, onnx in _TO_ONNX.items()}

# Where a kernel is missing: the types to compute in instead, the first that has a kernel wins. Sums and products of
# narrow integers wrap around alike when the result is cast back.
_SUBSTITUTES = {
    torch.bool: (torch.uint8, torch.int32, torch.int64, torch.float32),
    torch.uint8: (torch.int32, torch.int64, torch.float32),
    torch.int8: (torch.int32, torch.int64, torch.float32),
    torch.int16: (torch.int32, torch.int64, torch.float32),
    torch.uint16: (torch.int32, torch.int64, torch.float32),
    torch.int32: (torch.int64, torch.float64, torch.float32),
    torch.uint32: (torch.int64, torch.float64, torch.float32),
    torch.int64: (torch.float64, torch.float32),
    torch.uint64: (torch.int64, torch.float64, torch.float32),
    torch.float64: (torch.float32,),
    torch.bfloat16: (torch.float32,),
}


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return ONNX's name of a PyTorch element type.

    Raises:
        TypeError: ONNX has no such type.
    """
    if dtype not in _TO_ONNX:
        raise TypeError(f"ONNX has no element type for {dtype}")
    return _TO_ONNX[dtype]


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """Return PyTorch's name of an ONNX element type.

    Raises:
        TypeError: PyTorch has no such type.
    """
    if dtype not in _TO_TORCH:
        raise TypeError(f"PyTorch has no element type for ONNX {dtype.name}")
    return _TO_TORCH[dtype]


@functools.cache
def kernel_dtype(op_type: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which ORT's CPU provider can compute ``op_type`` for operands of ``dtype``.

    float16 is left alone: ORT itself puts casts around kernels it lacks in half precision, on every level of
    optimization. An operator that is not in the table is taken to support everything.
    """
    supported = KERNELS.get(op_type)
    if supported is None or dtype in supported or dtype is torch.float16:
        return dtype
    return next((other for other in _SUBSTITUTES.get(dtype, ()) if other in supported), dtype)


def computed_dtype(op_type: str, dtype: torch.dtype, attributes: Mapping[str, object]) -> torch.dtype:
    """Return the type to compute a call of an operator in: that of :func:`kernel_dtype`, or one for its attributes.

    Where 16-bit floats have a kernel, some of its forms do not: ORT 1.32 refuses to scatter with a reduction, and with
    its optimizer on the process ends where it finds a cast between certain transpositions and a matrix product, which
    it puts there itself for half precision; see :func:`is_cast_with_care`.
    """
    if dtype in HALF_TYPES:
        if op_type.startswith("Scatter") and attributes.get("reduction") is not None:
            return torch.float32
        order = attributes.get("perm")
        if op_type == "Transpose" and isinstance(order, Sequence) and is_cast_with_care(order):
            return torch.float32
    return kernel_dtype(op_type, dtype)


def is_cast_with_care(order: Sequence[int]) -> bool:
    """Return whether ORT 1.32 crashes on ``Transpose(order) -> Cast -> MatMul`` with a constant matrix.

    It does, with its optimizer on, for three axes and more of which the first becomes the last or last but one, while
    the others keep their order: it wants to move the transposition into the product. A cast in front of the
    transposition is safe.
    """
    last = len(order) - 1
    return last > 1 and list(order) in ([*range(1, last + 1), 0], [*range(1, last), 0, last])


def promoted(operands: Iterable[tuple[torch.dtype, int] | object]) -> torch.dtype:
    """Return the type to which PyTorch promotes ``operands`` before it computes.

    Args:
        operands: For a tensor its (dtype, rank); for a plain or symbolic number, the number.

    Source: the three priorities of torch.result_type (tensors with axes, tensors without, numbers).
    """
    ranked: list[torch.dtype | None] = [None, None, None]
    for operand in operands:
        if isinstance(operand, tuple):
            dtype, priority = operand[0], 0 if operand[1] else 1
        else:
            dtype, priority = _number_dtype(operand), 2
        held = ranked[priority]
        ranked[priority] = dtype if held is None else torch.promote_types(held, dtype)
    result = _combine(_combine(ranked[0], ranked[1]), ranked[2])
    if result is None:
        raise ValueError("no operand to promote")
    return result


def is_truth(number: object) -> bool:
    """Return whether a symbolic number is a condition; sympy's symbols are of its class Boolean too."""
    return isinstance(number, sympy.logic.boolalg.Boolean) and not isinstance(number, sympy.Expr)


def _number_dtype(number: object) -> torch.dtype:
    if isinstance(number, bool) or is_truth(number):
        return torch.bool
    if isinstance(number, int) or (isinstance(number, sympy.Expr) and number.is_integer):
        return torch.int64
    if isinstance(number, complex):
        return torch.complex64
    return torch.get_default_dtype()


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    if higher is None or lower is None:
        return higher if lower is None else lower
    if higher.is_complex or (higher.is_floating_point and not lower.is_complex):
        return higher
    if higher.is_floating_point:
        return torch.promote_types(higher, torch.complex32)
    if higher is torch.bool or lower.is_floating_point or lower.is_complex:
        return torch.promote_types(higher, lower)
    return higher
