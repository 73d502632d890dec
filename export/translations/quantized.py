"""Quantize and dequantize, as the pairs of ONNX nodes that runtimes fuse into integer kernels."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from fxopt.attributes import get_path, owner_of
from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank, tensor_of
from fxopt.export.registry import translates
from fxopt.layer_operators import RECURRENT
from fxopt.limits import limits_of
from fxopt.quantized_ops import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE

aten = torch.ops.aten
Parameters = tuple[Value, Value, Value]

_WIDE = frozenset({torch.int16, torch.uint16})
_FIRST_OPSET_WITH_WIDE = 21
_COVERED = 1e-6  # by how much, relative, the largest integer may stand for more than where a function ends


def is_quantized(emit: Emitter, *, behind_limits: bool = False) -> bool:
    """Return whether a quantizer reads the result of the current node, or of a limit such as relu behind it."""
    return emit.node is not None and _is_quantized(emit.node, behind_limits)


def _is_quantized(node: torch.fx.Node, behind_limits: bool) -> bool:
    return any(
        user.target is QUANTIZE or (behind_limits and limits_of(user) is not None and _is_quantized(user, True))
        for user in node.users
    )


def dequantized_from(value: Value, dtype: torch.dtype) -> Parameters | None:
    """Return integers of this type, their scale and zero point, if a value is dequantized from such."""
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or len(producer.inputs) != 3:
        return None
    integers, scale, zero_point = producer.inputs
    if integers is None or scale is None or zero_point is None or dtype_of(integers) != dtype:
        return None
    return integers, scale, zero_point


def saturated_sum(emit: Emitter, x: Value, factor: float, summand: float, highest: float) -> Value | None:
    """Return ``factor * x + summand`` where the quantizers that read it cut it off at 0 and at most at ``highest``.

    Of integers, ORT makes one kernel of that. None if ``x`` is not dequantized, or something else reads the result.
    """
    found = dequantized_from(x, torch.uint8)
    if emit.runtime != "ort-cpu" or emit.node is None or found is None:
        return None
    integers, scale, zero_point = found
    held = tensor_of(scale)
    if held is None or held.ndim:
        return None
    if not all(_cuts_off(user, highest) for user in emit.node.users):
        return None
    shape = dims(x)
    scaled = emit("DequantizeLinear", integers, emit.constant(held * factor), zero_point, dims=shape)
    largest = torch.tensor(255, dtype=torch.uint8)
    step = emit.constant(torch.tensor(summand / 255))
    constant = emit("DequantizeLinear", emit.constant(largest), step, emit.constant(torch.zeros_like(largest)), dims=())
    return emit("Add", scaled, constant, dims=shape)


def _cuts_off(user: torch.fx.Node, highest: float) -> bool:
    """Return whether a reader is a quantizer to 8 bits with 0 for 0 whose largest integer stands for no more."""
    if user.target is not QUANTIZE:
        return False
    _, scale, zero_point, _, _, qmax = user.args
    parameters = [_constant(node) for node in (scale, zero_point)]
    if any(held is None or held.ndim for held in parameters) or parameters[1].dtype != torch.uint8:
        return False
    step, offset = (float(held) for held in parameters)
    return bool(offset == 0 and qmax == 255 and step * 255 <= highest * (1 + _COVERED))


def _constant(node: Any) -> Any:
    """Return the tensor that a ``get_attr`` node reads; None for another node."""
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    return get_path(owner_of(node), str(node.target))


@translates(QUANTIZE)
def quantize(emit: Emitter, x: Value, scale: Value, zero_point: Value, axis: int, qmin: int, qmax: int) -> Value:
    """ONNX saturates at the ends of the integer type; a narrower range is cut off in front of it."""
    stored = torch.iinfo(dtype_of(zero_point))
    if (qmin, qmax) != (stored.min, stored.max):
        x = _clipped(emit, x, scale, zero_point, axis, qmin, qmax)
    return emit("QuantizeLinear", x, scale, zero_point, **_options(emit, x, scale, zero_point, axis))


@translates(DEQUANTIZE)
def dequantize(emit: Emitter, q: Value, scale: Value, zero_point: Value, axis: int) -> Value:
    if tensor_of(q) is not None and _is_read_as_floats(emit):
        return _floats(emit, q, scale, zero_point, axis)
    return emit("DequantizeLinear", q, scale, zero_point, **_options(emit, q, scale, zero_point, axis))


def _is_read_as_floats(emit: Emitter) -> bool:
    """Return whether no integer kernel of ORT takes the result of the current node in."""
    readers = [] if emit.node is None or emit.runtime != "ort-cpu" else list(emit.node.users)
    return bool(readers) and all(reader.target in RECURRENT for reader in readers)


def _floats(emit: Emitter, q: Value, scale: Value, zero_point: Value, axis: int) -> Value:
    """Return what integers stand for as operators that ORT computes once, when it loads the file; that one it does not.

    It leaves DequantizeLinear to the kernels that take it in, and computes what is left of it on each run.
    """
    offset, known = tensor_of(zero_point), q.meta.get("dims")
    floats = emit("Cast", q, to=ir.DataType.FLOAT, dims=known)
    if offset is None or bool(offset.any()):
        floats = emit("Sub", floats, _along(emit, emit.cast(zero_point, torch.float32), q, axis), dims=known)
    return emit("Mul", floats, _along(emit, scale, q, axis), dims=known)


@translates(FAKE_QUANTIZE)
def fake_quantize(emit: Emitter, x: Value, scale: Value, zero_point: Value, axis: int, qmin: int, qmax: int) -> Value:
    integers = quantize(emit, x, scale, zero_point, axis, qmin, qmax)
    return dequantize(emit, integers, scale, zero_point, axis)


def _options(emit: Emitter, x: Value, scale: Value, zero_point: Value, axis: int) -> dict[str, Any]:
    wide = dtype_of(zero_point) in _WIDE and emit.opset < _FIRST_OPSET_WITH_WIDE
    return {
        "axis": axis if rank(scale) else None,
        "domain": "com.microsoft" if wide else "",  # ORT's own operator has 16 bits in every version of ONNX's
        "dims": x.meta.get("dims"),
    }


def _clipped(emit: Emitter, x: Value, scale: Value, zero_point: Value, axis: int, qmin: int, qmax: int) -> Value:
    step, offset = tensor_of(scale), tensor_of(zero_point)
    if step is not None and offset is not None and step.ndim == 0:
        ends = [(bound - int(offset)) * float(step) for bound in (qmin, qmax)]
        return emit("Clip", x, *ends, dims=x.meta.get("dims"))
    middle = emit.cast(zero_point, torch.float32)
    steps = [emit("Sub", emit.number(bound, torch.float32), middle) for bound in (qmin, qmax)]
    low, high = (_along(emit, emit("Mul", count, scale, dims=dims(scale)), x, axis) for count in steps)
    return emit("Min", emit("Max", x, low), high, dims=x.meta.get("dims"))


def _along(emit: Emitter, parameter: Value, x: Value, axis: int) -> Value:
    if not rank(parameter):
        return parameter
    shape = [dims(parameter)[0] if place == axis % rank(x) else 1 for place in range(rank(x))]
    return emit.reshape(parameter, shape)
