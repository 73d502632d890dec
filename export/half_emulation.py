"""Run a model in true half precision on ORT's CPU provider, which has few kernels for it.

ORT computes a float16 file in float32 on a CPU: it puts casts around the kernels that it lacks and removes those in
between, so an overflow that any other device has is not seen. It refuses most bfloat16 files. Here every operator is
computed in float32 from operands in half precision, and its result is rounded to half precision: what a device does
that adds up in float32, operator by operator. The casts in between lose digits, so no optimizer of ORT may remove them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import onnx_ir as ir

from fxopt.export import schemas
from fxopt.export.dtypes import HALF_TYPES, onnx_dtype
from fxopt.export.files import OnnxFile, load_model

__all__ = ["emulated"]

_HALF = frozenset(map(onnx_dtype, HALF_TYPES))

# What only passes values on, and has kernels for all types.
_MOVES = frozenset(
    {"Cast", "CastLike", "Constant", "Identity", "If", "Loop", "Reshape", "Scan", "Shape", "Size", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)


def emulated(model: OnnxFile | ir.Model | str | os.PathLike[str] | bytes) -> ir.Model:
    """Return a copy of a model in which every operator on half precision is computed in float32 and rounded.

    Args:
        model: Any ONNX model, not only one that was made here.

    Raises:
        ExportError: the file cannot be read.
    """
    copy = load_model(model)
    if copy.functions:
        ir.passes.common.InlinePass()(copy)
    if any(value.dtype is None for node in copy.graph.all_nodes() for value in node.outputs):
        ir.passes.common.ShapeInferencePass()(copy)
    numbers = itertools.count()
    for graph in [copy.graph, *copy.graph.subgraphs()]:
        _widen(graph, numbers)
    return copy


def _widen(graph: ir.Graph, numbers: Iterator[int]) -> None:
    """Put casts around the operators of one graph, one cast for each value that they read.

    ``numbers`` make names: a branch and what is around it may cast the same value, each for itself.
    """
    wide: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        _complete_types(node)
        halves = list(dict.fromkeys(value for value in node.inputs if value is not None and value.dtype in _HALF))
        if node.op_type in _MOVES or not halves:
            continue
        for half in halves:
            if half not in wide:
                cast = _cast(half, ir.DataType.FLOAT, next(numbers))
                wide[half] = cast.outputs[0]
                graph.insert_before(node, cast)
        for index, value in enumerate(node.inputs):
            if value is not None and value in halves:
                node.replace_input_with(index, wide[value])
        for output in [output for output in node.outputs if output.dtype in _HALF]:
            _round(graph, node, output, next(numbers))


def _complete_types(node: ir.Node) -> None:
    """Give the results of an operator that shape inference does not know the type of its main operand."""
    for value, dtype in zip(node.outputs, schemas.output_dtypes(node), strict=True):
        if value.dtype is None and dtype is not None:
            value.type = ir.TensorType(dtype)


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value, number: int) -> None:
    """Let ``node`` yield a float32, and everybody else its value in half precision under the name it had."""
    assert output.dtype is not None
    cast = _cast(output, output.dtype, number)
    graph.insert_after(node, cast)
    rounded = cast.outputs[0]
    rounded.type, rounded.shape = output.type, output.shape
    ir.convenience.replace_all_uses_with(output, rounded, replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    rounded.name, output.name = output.name, f"{output.name}/wide"
    output.type = ir.TensorType(ir.DataType.FLOAT)


def _cast(value: ir.Value, dtype: ir.DataType, number: int) -> ir.Node:
    kind = "wide" if dtype is ir.DataType.FLOAT else "half"
    result = ir.Value(name=f"{value.name}/{kind}/{number}", type=ir.TensorType(dtype), shape=value.shape)
    return ir.Node("", "Cast", [value], {"to": ir.AttrInt64("to", int(dtype))}, outputs=[result], name=result.name)
