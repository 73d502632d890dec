"""Why ORT left a kernel in float, or a QuantizeLinear or DequantizeLinear in the graph.

ORT's optimizer says nothing about what it does not fuse. These rules are what its selectors look for, seen from the
optimized graph: every operand a DequantizeLinear of 8 bits, and one single QuantizeLinear behind.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from fxopt.export.coverage_table import KERNELS, NUMBERS_8_BIT

__all__ = [
    "CELL_IN_FLOAT",
    "NO_KERNEL",
    "SCALES_DIFFER",
    "is_constant",
    "why_dequantized",
    "why_float",
    "why_quantized",
]

CELL_IN_FLOAT = "part of a recurrent cell, which static quantization leaves in float"
NO_KERNEL = "has no integer kernel"
SCALES_DIFFER = "the scales before and after it differ"
_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_BOTH = (0, 1)
# What must be dequantized for ORT to take the integer kernel; () is all inputs.
_OPERANDS: dict[str, tuple[int, ...]] = {
    "Conv": _BOTH,
    "FusedConv": _BOTH,
    "Gemm": _BOTH,
    "FusedGemm": _BOTH,
    "MatMul": _BOTH,
    "FusedMatMul": _BOTH,  # a MatMul, and what ORT fuses with it where the operands are float
    "Add": _BOTH,
    "Mul": _BOTH,
    "Where": (1, 2),
    "Concat": (),
    "AveragePool": (0,),
    "GlobalAveragePool": (0,),
    "Sigmoid": (0,),
    "LeakyRelu": (0,),
    "Softmax": (0,),
}
# These run on the integers themselves, if the numbers mean the same before and after.
_MOVERS = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Tile"}
_MOVERS |= {"Split", "DepthToSpace", "Resize", "ReduceMax", "ReduceMin", "Identity"}
_CLAMPS = frozenset({"Relu", "Clip"})  # gone, where the quantization behind clamps as much
_WEIGHTS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})


def why_float(node: ir.Node) -> str:
    """Return why ORT runs a float kernel for ``node`` of an optimized graph."""
    op = node.op_type
    if op in _CLAMPS:
        return _why_clamp(node)
    if op in _MOVERS:
        return _why_mover(node)
    if op not in _OPERANDS:
        return NO_KERNEL
    return _why_operand(node) or _why_attribute(node) or _why_output(node) or "ORT does not fuse it"


def why_quantized(q: ir.Node) -> tuple[str, ir.Node | None]:
    """Return why a QuantizeLinear is left, and the node that is the cause."""
    value = q.inputs[0]
    maker = None if value is None else value.producer()
    if maker is None:
        is_input = value is not None and value.is_graph_input() and not value.is_initializer()
        return ("graph input" if is_input else "of a constant"), None
    if maker.op_type == _DQ:
        return SCALES_DIFFER, None
    return f"made by {_told(maker)}", maker


def why_dequantized(dq: ir.Node) -> tuple[str, ir.Node | None]:
    """Return why a DequantizeLinear is left, and the node that is the cause."""
    value, source = dq.outputs[0], dq.inputs[0]
    quantizers = [node for node in _readers(value) if node.op_type == _Q]
    readers = [node for node in _readers(value) if node.op_type != _Q]
    if not readers:
        return ("graph output", None) if value.is_graph_output() or not quantizers else (SCALES_DIFFER, quantizers[0])
    reader = min(readers, key=lambda node: node.op_type not in _WEIGHTS)
    if source is not None and is_constant(source):
        place = next(place for node, place in value.uses() if node is reader)
        name = {1: "weight", 2: "bias"}.get(place, "constant") if reader.op_type in _WEIGHTS else "constant"
        return f"{name} of {_told(reader)}", reader
    maker = None if source is None else source.producer()
    between = f"between {maker.op_type} and " if maker is not None and maker.op_type not in (_Q, _DQ) else "read by "
    return between + _told(reader), reader


def _told(node: ir.Node) -> str:
    kernel = KERNELS.get(node.op_type)
    if kernel is not None and (kernel.integer or node.op_type == "MatMulNBits"):
        return f"{node.op_type}, an integer kernel with float inputs or outputs"
    reason = why_float(node)
    return f"{node.op_type}, which {reason}" if reason == NO_KERNEL else f"{node.op_type} ({reason})"


# -- one rule each -----------------------------------------------------------------------------------------------------


def _why_operand(node: ir.Node) -> str | None:
    places = _OPERANDS[node.op_type] or tuple(range(len(node.inputs)))
    numbers = []
    for place in places:
        value = node.inputs[place]
        if value is None:
            continue
        maker = value.producer()
        if maker is None or maker.op_type != _DQ:
            return _why_not_quantized(node, place, value)
        numbers.append(_dtype(maker))
        if node.op_type in _WEIGHTS and place == 1 and (problem := _why_axis(node, maker)):
            return problem
    wide = [name for name in numbers if name not in NUMBERS_8_BIT]
    if wide:
        return f"ORT has no integer kernel for {wide[0]}"
    if len(set(numbers)) > 1 and node.op_type not in _WEIGHTS:
        return f"its inputs are {' and '.join(numbers)}"
    return None


def _why_not_quantized(node: ir.Node, place: int, value: ir.Value) -> str:
    if is_constant(value):
        return f"its {'weight' if node.op_type in _WEIGHTS and place == 1 else 'constant'} is not quantized"
    maker = value.producer()
    made = f"graph input {value.name!r}" if maker is None else f"made by {maker.op_type}"
    others = [one for one in node.inputs if one is not None and one is not value and not is_constant(one)]
    which = {0: "first ", 1: "second "}.get(place, "") if others else ""
    return f"its {which}input, {made}, is not quantized"


def _why_axis(node: ir.Node, dq: ir.Node) -> str | None:
    """Return what is wrong with the axis of a weight's scales: it must be that of the outputs."""
    weight, scale = dq.inputs[0], dq.inputs[1]
    if weight is None or scale is None or scale.shape is None or weight.shape is None or len(scale.shape) != 1:
        return None
    if scale.shape[0] == 1:
        return None
    rank = len(weight.shape)
    wanted = rank - 1
    if node.op_type in ("Conv", "FusedConv") or _integer(node, "transB", 0):
        wanted = 0
    axis = _integer(dq, "axis", 1) % rank
    return None if axis == wanted else f"the scales of its weight lie along axis {axis}, not {wanted}"


def _why_attribute(node: ir.Node) -> str | None:
    for name in ("alpha", "beta"):
        attribute = node.attributes.get(name)
        if node.op_type in ("Gemm", "FusedGemm") and attribute is not None and attribute.as_float() != 1.0:
            return f"its {name} is {attribute.as_float():g}, not 1"
    return None


def _why_output(node: ir.Node) -> str | None:
    """Return why nothing behind ``node`` makes its output an integer."""
    value = node.outputs[0]
    readers = _readers(value)
    quantizers = [reader for reader in readers if reader.op_type == _Q]
    others = [reader for reader in readers if reader.op_type != _Q]
    if quantizers and (others or value.is_graph_output()):
        also = others[0].op_type if others else "the caller: it is a graph output"
        return f"its output is quantized, and read as float by {also}"
    if len(quantizers) > 1:
        return f"its output is quantized {len(quantizers)} times"
    activation = node.attributes.get("activation")
    if activation is not None:
        if quantizers and activation.as_string() in _CLAMPS:
            return f"the {activation.as_string()} behind it stays: {_cuts(quantizers[0])}"
        return f"nothing quantizes its output before the {activation.as_string()} behind it"
    if quantizers:
        return _why_numbers(node, quantizers[0])
    if len(readers) == 1 and readers[0].op_type in _CLAMPS:
        behind = [reader for reader in _readers(readers[0].outputs[0]) if reader.op_type == _Q]
        if behind:
            return f"the {readers[0].op_type} behind it stays: {_cuts(behind[0])}"
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    made = None if bias is None else bias.producer()
    if bias is not None and (made is None or made.op_type != _DQ):
        return "nothing quantizes its output, and its bias is float"
    if not readers:
        return "nothing quantizes its output, a graph output"
    return f"nothing quantizes its output, read by {_listed(reader.op_type for reader in readers)}"


def _why_numbers(node: ir.Node, q: ir.Node) -> str | None:
    """Return what is wrong with the types of the integers: activations must be the same on both sides."""
    value = node.inputs[(*_OPERANDS[node.op_type], 0)[0]]
    maker = None if value is None else value.producer()
    dtype = _dtype(q)
    wanted = dtype if maker is None else _dtype(maker)
    if dtype not in NUMBERS_8_BIT:
        return f"ORT has no integer kernel for {dtype}"
    return None if dtype == wanted else f"its input is {wanted} and its output {dtype}"


def _why_clamp(node: ir.Node) -> str:
    maker = None if node.inputs[0] is None else node.inputs[0].producer()
    quantizers = [reader for reader in _readers(node.outputs[0]) if reader.op_type == _Q]
    if not quantizers:
        return "nothing quantizes its output"
    if maker is not None and maker.op_type not in (_DQ, *_OPERANDS):
        return f"its input, made by {maker.op_type}, is not quantized"
    return _cuts(quantizers[0])


def _cuts(q: ir.Node) -> str:
    """Return how a clamp does more than the quantization ``q`` behind it."""
    zero_point, lowest = _numbers(q, 2), -128 if _dtype(q) == "int8" else 0
    if zero_point is not None and zero_point.size == 1 and int(zero_point.reshape(())) != lowest:
        return f"the quantization behind it has zero point {int(zero_point.reshape(()))}, not {lowest}"
    return "it cuts off more than the quantization behind it"


def _why_mover(node: ir.Node) -> str:
    value = node.inputs[0]
    maker = None if value is None else value.producer()
    if node.op_type == "Resize" and "mode" in node.attributes and node.attributes["mode"].as_string() != "nearest":
        return NO_KERNEL
    if maker is None or maker.op_type != _DQ:
        return "its input is not quantized"
    readers = [reader for output in node.outputs for reader in _readers(output)]
    if not readers or any(reader.op_type != _Q for reader in readers):
        return "nothing quantizes its output"
    dtype = _dtype(maker)
    if dtype not in NUMBERS_8_BIT:
        return f"ORT has no integer kernel for {dtype}"
    if other := next((_dtype(reader) for reader in readers if _dtype(reader) != dtype), None):
        return f"its input is {dtype} and its output {other}"
    return "ORT does not fuse it" if all(_same(maker, reader) for reader in readers) else SCALES_DIFFER


# -- reading the graph -----------------------------------------------------------------------------------------------


def _readers(value: ir.Value) -> list[ir.Node]:
    return list(dict.fromkeys(node for node, _ in value.uses()))


def is_constant(value: ir.Value) -> bool:
    """Return whether a value is made of initializers alone, by what stands before a weight."""
    maker = value.producer()
    if maker is None:
        return value.is_initializer() or value.const_value is not None
    first = maker.inputs[0] if maker.inputs else None
    return maker.op_type in (_DQ, "Cast", "Transpose") and first is not None and is_constant(first)


def _numbers(node: ir.Node, place: int) -> np.ndarray | None:
    value = node.inputs[place] if len(node.inputs) > place else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _same(one: ir.Node, other: ir.Node) -> bool:
    """Return whether two nodes quantize with the same scale and zero point."""
    pairs = [(_numbers(one, place), _numbers(other, place)) for place in (1, 2)]
    return all(
        a is b or (a is not None and b is not None and a.shape == b.shape and bool((a == b).all())) for a, b in pairs
    )


def _dtype(node: ir.Node) -> str:
    """Return the integers that a QuantizeLinear makes or a DequantizeLinear reads, as "uint8"."""
    for place in (2, 0) if node.op_type == _DQ else (2,):  # what is left out of the first is uint8
        value = node.inputs[place] if len(node.inputs) > place else None
        if value is not None and value.const_value is not None:
            return value.const_value.dtype.name.lower()
        if value is not None and value.dtype is not None:
            return value.dtype.name.lower()
    return "uint8"


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _listed(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))
