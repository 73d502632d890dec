"""Activation functions."""

from __future__ import annotations

import math

import torch

from fxopt.export.emitter import Emitter, Number, Value, dims, dtype_of, is_symbolic, rank, tensor_of
from fxopt.export.registry import Refused, translates
from fxopt.export.translations.elementwise import out_dtype
from fxopt.export.translations.quantized import is_quantized, saturated_sum
from fxopt.export.translations.reduce import reduced
from fxopt.quantized_ops import DEQUANTIZE

aten = torch.ops.aten

_GEMM = (aten.linear.default, aten.addmm.default)
_SHORT = 32  # up to so many numbers ORT's softmax spends more on each row than on what is in it


@translates(aten.gelu.default)
def gelu(emit: Emitter, x: Value, approximate: str) -> Value:
    if emit.opset >= 20:
        return emit("Gelu", x, approximate=approximate)
    if approximate == "tanh":
        cubed = emit("Mul", emit("Mul", emit("Mul", x, x), x), 0.044715)
        inner = emit("Tanh", emit("Mul", emit("Add", x, cubed), math.sqrt(2 / math.pi)))
    else:
        inner = emit("Erf", emit("Div", x, math.sqrt(2)))
    return emit("Mul", emit("Mul", x, emit("Add", inner, 1.0)), 0.5)


@translates(aten.silu.default)
def silu(emit: Emitter, x: Value) -> Value:
    return emit("Mul", x, emit("Sigmoid", x))


@translates(aten.mish.default)
def mish(emit: Emitter, x: Value) -> Value:
    if not _fast(emit, x):
        return emit("Mul", x, emit("Tanh", emit("Softplus", x)))
    # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2), e = exp(x); from 20 on it is 1 in float32.
    power = emit("Exp", emit("Min", x, 20.0))
    numerator = emit("Mul", power, emit("Add", power, 2.0))
    return emit("Mul", x, emit("Div", numerator, emit("Add", numerator, 2.0)))


@translates(aten.hardsigmoid.default)
def hardsigmoid(emit: Emitter, x: Value) -> Value:
    saturated = saturated_sum(emit, x, 1 / 6, 0.5, 1.0)
    return emit("HardSigmoid", x, alpha=1 / 6, beta=0.5) if saturated is None else saturated


@translates(aten.hardswish.default)
def hardswish(emit: Emitter, x: Value) -> Value:
    return emit("Mul", x, hardsigmoid(emit, x))


@translates(aten.hardtanh.default)
def hardtanh(emit: Emitter, x: Value, low: Number, high: Number) -> Value:
    return emit("Clip", x, low, high)


@translates(aten.relu.default)
def relu(emit: Emitter, x: Value) -> Value:
    x = emit.cast(x, out_dtype(emit))
    return emit("Max", x, 0.0) if _ends_integers(emit) else emit("Relu", x)


def _ends_integers(emit: Emitter) -> bool:
    """Return whether a linear layer of integers stands in front of the current node, and only floats behind it.

    ORT would take Gemm and Relu for one kernel of floats before it looks for one of integers.
    """
    source = emit.node.args[0] if emit.node is not None and emit.runtime == "ort-cpu" else None
    if not isinstance(source, torch.fx.Node) or source.target not in _GEMM or is_quantized(emit):
        return False
    return all(operand.target is DEQUANTIZE for operand in source.all_input_nodes)


@translates(aten.relu6.default)
def relu6(emit: Emitter, x: Value) -> Value:
    return emit("Clip", x, 0, 6)


@translates(aten.leaky_relu.default)
def leaky_relu(emit: Emitter, x: Value, slope: Number) -> Value:
    if is_symbolic(slope):
        return emit("Where", emit("Greater", x, 0.0), x, emit("Mul", x, slope))
    return emit("LeakyRelu", x, alpha=float(slope))


@translates(aten.prelu.default)
def prelu(emit: Emitter, x: Value, weight: Value) -> Value:
    slopes, held = dims(weight), tensor_of(weight)
    if rank(x) == 0:
        weight = emit.reshape(weight, ())
    elif rank(x) > 1 and slopes and slopes[0] != 1:
        weight = emit.reshape(weight, (slopes[0], *[1] * (rank(x) - 2)))
    if emit.runtime != "ort-cpu":
        return emit("PRelu", x, weight)
    # ORT's kernel branches on every number; these are exact in every precision, so also in half.
    if held is not None and bool(((held <= 1) & (held != 0)).all()):  # a slope of 0 would make NaN of infinity
        return emit("Max", x, emit("Mul", x, weight, dims=dims(x)))
    return emit("Add", emit("Relu", x), emit("Mul", emit("Min", x, 0.0), weight))


@translates(aten.elu.default)
def elu(emit: Emitter, x: Value, alpha: Number, scale: Number, input_scale: Number) -> Value:
    if input_scale != 1 or is_symbolic(alpha):
        negative = emit("Mul", emit("Sub", emit("Exp", emit("Mul", x, input_scale)), 1.0), alpha * scale)
        positive = x if scale == 1 else emit("Mul", x, scale)
        return emit("Where", emit("Greater", x, 0.0), positive, negative)
    result = emit("Elu", x, alpha=float(alpha))
    return result if scale == 1 else emit("Mul", result, scale)


@translates(aten.selu.default)
def selu(emit: Emitter, x: Value) -> Value:
    return emit("Selu", x)


@translates(aten.celu.default)
def celu(emit: Emitter, x: Value, alpha: Number) -> Value:
    if is_symbolic(alpha):
        negative = emit("Mul", emit("Sub", emit("Exp", emit("Div", x, alpha)), 1.0), alpha)
        return emit("Where", emit("Greater", x, 0.0), x, negative)
    return emit("Celu", x, alpha=float(alpha))


@translates(aten.softplus.default)
def softplus(emit: Emitter, x: Value, beta: Number, threshold: Number) -> Value:
    scaled = x if beta == 1 else emit("Mul", x, beta)
    smooth = emit("Softplus", scaled)
    smooth = smooth if beta == 1 else emit("Div", smooth, beta)
    if not is_symbolic(threshold) and threshold >= 20:  # from there on both sides agree to the last bit of float32
        return smooth
    return emit("Where", emit("Greater", scaled, threshold), x, smooth)


@translates(aten.log_sigmoid.default)
def log_sigmoid(emit: Emitter, x: Value) -> Value:
    return emit("Neg", emit("Softplus", emit("Neg", x)))


@translates(aten.softshrink.default)
def softshrink(emit: Emitter, x: Value, lambd: float) -> Value:
    return emit("Sub", x, emit("Clip", x, -lambd, lambd))


@translates(aten.hardshrink.default)
def hardshrink(emit: Emitter, x: Value, lambd: float) -> Value:
    return emit("Where", emit("LessOrEqual", emit("Abs", x), lambd), emit.number(0.0, dtype_of(x)), x)


@translates(aten.threshold.default)
def threshold(emit: Emitter, x: Value, limit: Number, value: Number) -> Value:
    # Written so that NaN, which compares false, is kept.
    return emit("Where", emit("LessOrEqual", x, limit), emit.number(value, dtype_of(x)), x)


@translates(aten.glu.default)
def glu(emit: Emitter, x: Value, dim: int) -> Value:
    first, second = emit.many("Split", x, outputs=2, axis=dim % rank(x), num_outputs=2)
    return emit("Mul", first, emit("Sigmoid", second))


@translates(aten.softmax.int, aten._softmax.default)
def softmax(emit: Emitter, x: Value, dim: int, _dtype: object) -> Value:
    return _normalized(emit, "Softmax", x, dim)


@translates(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(emit: Emitter, x: Value, dim: int, _dtype: object) -> Value:
    return _normalized(emit, "LogSoftmax", x, dim)


def _normalized(emit: Emitter, op_type: str, x: Value, dim: int) -> Value:
    x = emit.cast(x, out_dtype(emit))
    if rank(x) == 0:
        return emit("Reshape", emit(op_type, emit("Reshape", x, [1]), axis=0), [])
    axis = dim % rank(x)
    if _fast(emit, x) and axis < rank(x) - 1 and dims(x)[axis] in range(1, _SHORT + 1):
        return _normalized_across(emit, op_type, x, axis)
    return emit(op_type, x, axis=axis)


def _normalized_across(emit: Emitter, op_type: str, x: Value, axis: int) -> Value:
    """Normalize along an axis that is not the last, by kernels that run along the last."""
    shifted = emit("Sub", x, reduced(emit, "ReduceMax", x, axis, keepdim=True))
    powers = emit("Exp", shifted, dims=dims(x))
    total = reduced(emit, "ReduceSum", powers, axis, keepdim=True)
    return emit("Div", powers, total) if op_type == "Softmax" else emit("Sub", shifted, emit("Log", total))


def _fast(emit: Emitter, x: Value) -> bool:
    """Return whether ``x`` may be computed by several operators where ORT's one kernel is slow.

    Not in half precision, which would round between them. ``python -m tests.bench ort_forms`` shows both.
    """
    return emit.runtime == "ort-cpu" and dtype_of(x) is torch.float32


@translates(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default
)
def dropout(emit: Emitter, x: Value, p: float, train: bool) -> Value:
    if train and p > 0:
        raise Refused("dropout is active: the graph is in train mode")
    return x


@translates(aten.rrelu.default)
def rrelu(emit: Emitter, x: Value, lower: float, upper: float, training: bool, generator: object) -> Value:
    if training:
        raise Refused("rrelu draws random slopes: the graph is in train mode")
    return emit("LeakyRelu", x, alpha=(lower + upper) / 2)
