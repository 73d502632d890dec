"""What ONNX says of its operators: which operands share a type, and of which type the results are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir

__all__ = ["allows", "cast_alike", "main_operand", "output_dtypes", "outputs_alike"]

_BOOL = ir.DataType.BOOL
_INT64 = ir.DataType.INT64
# operator: the type of each result where it is not that of the main operand (None: of the main operand)
_RESULTS: dict[str, tuple[ir.DataType | None, ...]] = {
    **dict.fromkeys(
        ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf"),
        (_BOOL,),
    ),
    **dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), (_INT64,)),
    **dict.fromkeys(("TopK", "MaxPool"), (None, _INT64)),
    "Unique": (None, _INT64, _INT64, _INT64),
    "Dropout": (None, _BOOL),
    "DynamicQuantizeLinear": (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
    "MatMulInteger": (ir.DataType.INT32,),
    "ConvInteger": (ir.DataType.INT32,),
}
_MAIN = {"Where": 1, "DequantizeLinear": 1, "CastLike": 1, "OneHot": 2, "QuantizeLinear": 2}


def main_operand(operands: Sequence[ir.Value | None], op_type: str) -> ir.Value | None:
    """Return the operand whose type is that of the computation."""
    index = _MAIN.get(op_type, 0)
    return operands[index] if index < len(operands) else None


def output_dtypes(node: ir.Node) -> list[ir.DataType | None]:
    """Return the element type of each result of ``node``; None where it cannot be told from the operands."""
    count = len(node.outputs)
    if node.op_type in ("If", "Loop", "Scan"):
        return [None] * count
    if (target := node.attributes.get("to")) is not None:
        return [ir.DataType(target.as_int())] * count
    if (target := node.attributes.get("output_dtype")) is not None:
        return [ir.DataType(target.as_int())] * count
    if node.op_type == "ConstantOfShape":
        held = node.attributes.get("value")
        return [held.as_tensor().dtype if held is not None else ir.DataType.FLOAT]
    if (target := node.attributes.get("dtype")) is not None:
        return [ir.DataType(target.as_int())] * count
    main = main_operand(node.inputs, node.op_type)
    own = main.dtype if main is not None else None
    fixed = _RESULTS.get(node.op_type, ())
    return [fixed[i] if i < len(fixed) and fixed[i] is not None else own for i in range(count)]


@functools.cache
def _types(op_type: str, opset: int) -> tuple[tuple[str, ...], bool, tuple[str, ...]]:
    """Return type variables of the operands, whether the last is variadic, and type variables of the results."""
    schema = onnx.defs.get_schema(op_type, opset, "")
    variadic = bool(schema.inputs) and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    operands = tuple(i.type_str for i in schema.inputs)
    if op_type in ("Pow", "BatchNormalization"):  # ONNX lets types differ, and ORT has kernels for few types of any
        operands = (operands[0],) * len(operands)
    return operands, variadic, tuple(o.type_str for o in schema.outputs)


@functools.cache
def allows(op_type: str, opset: int, dtype: ir.DataType) -> bool:
    """Return whether ONNX defines an operator for a main operand of an element type."""
    schema = onnx.defs.get_schema(op_type, opset, "")
    main = schema.inputs[min(_MAIN.get(op_type, 0), len(schema.inputs) - 1)]
    return f"tensor({dtype.name.lower()})" in main.types


def cast_alike(
    op_type: str, opset: int, operands: Sequence[ir.Value | None], cast: Callable[[ir.Value], ir.Value]
) -> list[ir.Value | None]:
    """Return ``operands``, with ``cast`` applied to those that must have the main operand's type."""
    inputs, _, _ = _types(op_type, opset)
    main = inputs[min(_MAIN.get(op_type, 0), len(inputs) - 1)]
    return [
        cast(value) if value is not None and inputs[min(i, len(inputs) - 1)] == main else value
        for i, value in enumerate(operands)
    ]


def outputs_alike(op_type: str, opset: int, count: int) -> list[bool]:
    """Return for each result whether it has the main operand's type."""
    inputs, _, outputs = _types(op_type, opset)
    main = inputs[min(_MAIN.get(op_type, 0), len(inputs) - 1)]
    return [outputs[min(i, len(outputs) - 1)] == main for i in range(count)]
