"""Arithmetic, comparisons and logic, element by element, promoted as PyTorch promotes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from fxopt.export.dtypes import promoted
from fxopt.export.emitter import Emitter, Number, Value, dtype_of, rank, tensor_of
from fxopt.export.registry import Refused, translates

aten = torch.ops.aten
Tensor: TypeAlias = Value | Number


def common_type(*operands: Any) -> torch.dtype:
    """Return the type in which PyTorch computes with these tensors and numbers."""
    return promoted(
        [(dtype_of(operand), rank(operand)) if isinstance(operand, Value) else operand for operand in operands]
    )


def as_type(emit: Emitter, operand: Tensor, dtype: torch.dtype) -> Value:
    """Return a tensor or number as a value of type ``dtype``."""
    return emit.cast(operand, dtype) if isinstance(operand, Value) else emit.number(operand, dtype)


def out_dtype(emit: Emitter) -> torch.dtype:
    """Return the element type of what the current node yields."""
    dtype: torch.dtype = emit.out.dtype
    return dtype


# -- one operand -----------------------------------------------------------------------------------------------------

_UNARY = {
    "Abs": aten.abs, "Acos": aten.acos, "Acosh": aten.acosh, "Asin": aten.asin, "Asinh": aten.asinh, "Atan": aten.atan,
    "Atanh": aten.atanh, "Cos": aten.cos, "Cosh": aten.cosh, "Erf": aten.erf, "Exp": aten.exp, "Log": aten.log,
    "Neg": aten.neg, "Reciprocal": aten.reciprocal, "Sigmoid": aten.sigmoid, "Sin": aten.sin,
    "Sinh": aten.sinh, "Sqrt": aten.sqrt, "Tan": aten.tan, "Tanh": aten.tanh,
}  # fmt: skip
_ROUNDING = {"Ceil": aten.ceil, "Floor": aten.floor, "Round": aten.round}


def _unary(op_type: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Value) -> Value:
        return emit(op_type, emit.cast(x, out_dtype(emit)))

    return translate


def _rounding(op_type: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Value) -> Value:
        return emit(op_type, x) if dtype_of(x).is_floating_point else x

    return translate


for _op_type, _packet in _UNARY.items():
    translates(_packet.default)(_unary(_op_type))
for _op_type, _packet in _ROUNDING.items():
    translates(_packet.default)(_rounding(_op_type))
translates(aten.special_erf.default)(_unary("Erf"))
translates(aten.special_expit.default)(_unary("Sigmoid"))
translates(aten.negative.default)(_unary("Neg"))


@translates(aten.rsqrt.default)
def rsqrt(emit: Emitter, x: Value) -> Value:
    return emit("Reciprocal", emit("Sqrt", emit.cast(x, out_dtype(emit))))


@translates(aten.square.default)
def square(emit: Emitter, x: Value) -> Value:
    x = emit.cast(x, out_dtype(emit))
    return emit("Mul", x, x)


@translates(aten.sign.default, aten.sgn.default)
def sign(emit: Emitter, x: Value) -> Value:
    if dtype_of(x) is torch.bool:
        return x
    if not dtype_of(x).is_floating_point:
        return emit("Sign", x)
    return emit("Where", emit("IsNaN", x), emit.number(0.0, dtype_of(x)), emit("Sign", x))


@translates(aten.trunc.default, aten.fix.default)
def trunc(emit: Emitter, x: Value) -> Value:
    if not dtype_of(x).is_floating_point:
        return x
    return emit("Mul", emit("Sign", x), emit("Floor", emit("Abs", x)))


@translates(aten.frac.default)
def frac(emit: Emitter, x: Value) -> Value:
    return emit("Sub", x, trunc(emit, x))


def _with_log2(base: float) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Value) -> Value:
        return emit("Div", emit("Log", emit.cast(x, out_dtype(emit))), math.log(base))

    return translate


translates(aten.log2.default)(_with_log2(2.0))
translates(aten.log10.default)(_with_log2(10.0))


@translates(aten.exp2.default, aten.special_exp2.default)
def exp2(emit: Emitter, x: Value) -> Value:
    dtype = out_dtype(emit)
    return emit("Pow", emit.number(2.0, dtype), emit.cast(x, dtype))


@translates(aten.isnan.default)
def isnan(emit: Emitter, x: Value) -> Value:
    return emit("IsNaN", _as_float(emit, x))


@translates(aten.isinf.default)
def isinf(emit: Emitter, x: Value) -> Value:
    return emit("IsInf", _as_float(emit, x))


@translates(aten.isfinite.default)
def isfinite(emit: Emitter, x: Value) -> Value:
    x = _as_float(emit, x)
    return emit("Not", emit("Or", emit("IsNaN", x), emit("IsInf", x)))


@translates(aten.isposinf.default)
def isposinf(emit: Emitter, x: Value) -> Value:
    return emit("IsInf", _as_float(emit, x), detect_negative=0)


@translates(aten.isneginf.default)
def isneginf(emit: Emitter, x: Value) -> Value:
    return emit("IsInf", _as_float(emit, x), detect_positive=0)


@translates(aten.nan_to_num.default)
def nan_to_num(emit: Emitter, x: Value, nan: float | None, posinf: float | None, neginf: float | None) -> Value:
    dtype = dtype_of(x)
    if not dtype.is_floating_point:
        return x
    limits = torch.finfo(dtype)
    result = emit("Where", emit("IsNaN", x), emit.number(nan or 0.0, dtype), x)
    for bound, default, side in ((posinf, limits.max, "detect_negative"), (neginf, limits.min, "detect_positive")):
        only: dict[str, Any] = {side: 0}
        at = emit("IsInf", x, **only)
        result = emit("Where", at, emit.number(default if bound is None else bound, dtype), result)
    return result


def _as_float(emit: Emitter, x: Value) -> Value:
    return x if dtype_of(x).is_floating_point else emit.cast(x, torch.float32)


# -- arithmetic ------------------------------------------------------------------------------------------------------


@translates(aten.add.Tensor, aten.add.Scalar)
def add(emit: Emitter, x: Tensor, y: Tensor, alpha: Number) -> Value:
    dtype = out_dtype(emit)
    if dtype is torch.bool:
        return emit("Or", as_type(emit, x, dtype), as_type(emit, y, dtype))
    # ORT makes one kernel of Add and LayerNormalization, and on a CPU that takes 2 to 5 times as long as both; of Sum
    # it makes none. (f32[1, 18, 384] to f32[1, 512, 1024], one thread, ORT 1.32)
    add_or_sum = "Sum" if _is_normalized(emit) else "Add"
    return emit(add_or_sum, as_type(emit, x, dtype), _scaled(emit, y, alpha, dtype))


def _is_normalized(emit: Emitter) -> bool:
    """Return whether a layer norm reads the result of the node."""
    return emit.node is not None and any(user.target is aten.layer_norm.default for user in emit.node.users)


@translates(aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor)
def sub(emit: Emitter, x: Tensor, y: Tensor, alpha: Number) -> Value:
    dtype = out_dtype(emit)
    return emit("Sub", as_type(emit, x, dtype), _scaled(emit, y, alpha, dtype))


@translates(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(emit: Emitter, x: Tensor, y: Tensor, alpha: Number) -> Value:
    return sub(emit, y, x, alpha)


def _scaled(emit: Emitter, operand: Tensor, alpha: Number, dtype: torch.dtype) -> Value:
    value = as_type(emit, operand, dtype)
    return value if alpha == 1 else emit("Mul", value, alpha)


@translates(aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar)
def mul(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    dtype = out_dtype(emit)
    if dtype is torch.bool:
        return emit("And", as_type(emit, x, dtype), as_type(emit, y, dtype))
    if (held := _masked_weight(emit, x, y)) is not None:
        return held
    left, right = as_type(emit, x, dtype), as_type(emit, y, dtype)
    for value, factor in ((left, right), (right, left)):
        if (root := _inverse_root(factor)) is not None:  # one rounding less, and the form in which ORT finds RMS norms
            return emit("Div", value, root)
    return emit("Mul", left, right)


def _masked_weight(emit: Emitter, *factors: Tensor) -> Value | None:
    """Return a pruned weight that nothing else reads as one constant; None if this is no weight and its mask."""
    assert emit.node is not None
    held = [(value, tensor_of(value)) for value in factors if isinstance(value, Value)]
    for (value, weight), (_, mask), node in zip(held, reversed(held), emit.node.all_input_nodes, strict=False):
        if weight is None or mask is None or mask.dtype is not torch.bool or weight.shape != mask.shape:
            continue
        if len(held) == 2 and weight.is_floating_point() and len(node.users) == 1:
            return emit.initializer(str(value.meta["wanted"]), weight * mask, {"fxopt.stored": "times its mask"})
    return None


def _inverse_root(value: Value) -> Value | None:
    """Return the square root of which ``value`` is the reciprocal, if it is one."""
    reciprocal = value.producer()
    if reciprocal is None or reciprocal.op_type != "Reciprocal" or reciprocal.inputs[0] is None:
        return None
    root = reciprocal.inputs[0].producer()
    return reciprocal.inputs[0] if root is not None and root.op_type == "Sqrt" else None


@translates(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.divide.Tensor)
def div(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    dtype = out_dtype(emit)
    return emit("Div", as_type(emit, x, dtype), as_type(emit, y, dtype))


@translates(aten.div.Tensor_mode, aten.div.Scalar_mode, aten.divide.Tensor_mode)
def div_mode(emit: Emitter, x: Tensor, y: Tensor, rounding_mode: str | None) -> Value:
    if rounding_mode is None:
        return div(emit, x, y)
    return floor_divide(emit, x, y) if rounding_mode == "floor" else _divide_to_zero(emit, x, y)


def _divide_to_zero(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    dtype = out_dtype(emit)
    quotient = emit("Div", as_type(emit, x, dtype), as_type(emit, y, dtype))
    return trunc(emit, quotient)


@translates(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    """Divide and round down, exactly as PyTorch: from the remainder, so that 1.0 // 0.1 is 9."""
    dtype = out_dtype(emit)
    above, below = as_type(emit, x, dtype), as_type(emit, y, dtype)
    if not dtype.is_floating_point:
        return emit("Div", emit("Sub", above, emit("Mod", above, below)), below)
    left = emit("Mod", above, below, fmod=1)
    quotient = emit("Div", emit("Sub", above, left), below)
    adjusted = emit("Where", _crosses_zero(emit, left, below), emit("Sub", quotient, 1.0), quotient)
    floor = emit("Floor", adjusted)
    near = emit("Where", emit("Greater", emit("Sub", adjusted, floor), 0.5), emit("Add", floor, 1.0), floor)
    return emit("Where", emit("Equal", below, 0.0), emit("Div", above, below), near)


@translates(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def remainder(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    dtype = out_dtype(emit)
    above, below = as_type(emit, x, dtype), as_type(emit, y, dtype)
    if not dtype.is_floating_point:
        return emit("Mod", above, below)
    left = emit("Mod", above, below, fmod=1)
    return emit("Where", _crosses_zero(emit, left, below), emit("Add", left, below), left)


@translates(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    dtype = out_dtype(emit)
    return emit("Mod", as_type(emit, x, dtype), as_type(emit, y, dtype), fmod=1)


def _crosses_zero(emit: Emitter, left: Value, below: Value) -> Value:
    """Return where a remainder is not zero and has another sign than the divisor."""
    signs = emit("Xor", emit("Less", left, 0.0), emit("Less", below, 0.0))
    return emit("And", emit("Not", emit("Equal", left, 0.0)), signs)


@translates(aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar)
def power(emit: Emitter, x: Tensor, exponent: Tensor) -> Value:
    dtype = out_dtype(emit)
    base = as_type(emit, x, dtype)
    if isinstance(exponent, int | float) and dtype.is_floating_point:
        if exponent == 0.5:
            return emit("Sqrt", base)
        if exponent == -0.5:
            return emit("Reciprocal", emit("Sqrt", base))
        if exponent in (1, -1):
            return base if exponent == 1 else emit("Reciprocal", base)
    return emit("Pow", base, as_type(emit, exponent, dtype))


@translates(aten.addcmul.default)
def addcmul(emit: Emitter, x: Value, first: Value, second: Value, value: Number) -> Value:
    dtype = out_dtype(emit)
    product = emit("Mul", emit.cast(first, dtype), emit.cast(second, dtype))
    return emit("Add", emit.cast(x, dtype), _scaled(emit, product, value, dtype))


@translates(aten.addcdiv.default)
def addcdiv(emit: Emitter, x: Value, first: Value, second: Value, value: Number) -> Value:
    dtype = out_dtype(emit)
    quotient = emit("Div", emit.cast(first, dtype), emit.cast(second, dtype))
    return emit("Add", emit.cast(x, dtype), _scaled(emit, quotient, value, dtype))


@translates(aten.lerp.Tensor, aten.lerp.Scalar)
def lerp(emit: Emitter, start: Value, end: Value, weight: Tensor) -> Value:
    weight = as_type(emit, weight, dtype_of(start))
    return emit("Add", start, emit("Mul", weight, emit("Sub", end, start)))


@translates(aten.atan2.default, aten.arctan2.default)
def atan2(emit: Emitter, y: Value, x: Value) -> Value:
    dtype = out_dtype(emit)
    y, x = emit.cast(y, dtype), emit.cast(x, dtype)
    angle = emit("Atan", emit("Div", y, x))
    half_turn = emit("Where", emit("Less", y, 0.0), emit.number(-math.pi, dtype), emit.number(math.pi, dtype))
    turned = emit("Where", emit("Less", x, 0.0), emit("Add", angle, half_turn), angle)
    both_zero = emit("And", emit("Equal", x, 0.0), emit("Equal", y, 0.0))
    return emit("Where", both_zero, emit.number(0.0, dtype), turned)


# -- choice ----------------------------------------------------------------------------------------------------------


def where_value(emit: Emitter, condition: Value, x: Value, y: Value) -> Value:
    """Return ``x`` where ``condition`` holds and ``y`` elsewhere; ORT has no such kernel for booleans."""
    if dtype_of(x) is not torch.bool:
        return emit("Where", condition, x, y)
    return emit("Or", emit("And", condition, x), emit("And", emit("Not", condition), y))


@translates(aten.where.self, aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther)
def where(emit: Emitter, condition: Value, x: Tensor, y: Tensor) -> Value:
    dtype = out_dtype(emit)
    return where_value(emit, emit.cast(condition, torch.bool), as_type(emit, x, dtype), as_type(emit, y, dtype))


@translates(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(emit: Emitter, x: Value, mask: Value, value: Tensor) -> Value:
    dtype = dtype_of(x)
    return where_value(emit, mask, as_type(emit, value, dtype), x)


# -- types and copies ------------------------------------------------------------------------------------------------


def _copy(emit: Emitter, x: Value, *_: Any) -> Value:
    """Return the value itself, in the type that the node yields: copies and devices mean nothing in ONNX."""
    return emit.cast(x, out_dtype(emit))


translates(
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default,
    aten.lift_fresh.default, aten.lift.default, aten.positive.default, aten.real.default, aten.resolve_conj.default,
    aten.resolve_neg.default, aten._conj.default, aten.conj.default,
)(_copy)  # fmt: skip
translates(torch.ops.prims.convert_element_type.default, torch.ops.prims.device_put.default)(_copy)


@translates(torch.ops.fxopt.select_mode.default)
def select_mode(emit: Emitter, train: Value, evaluation: Value, training: bool) -> Value:
    if training:
        raise Refused("the graph is in train mode")
    return evaluation


@translates(aten.copy.default)
def copy(emit: Emitter, x: Value, source: Value, non_blocking: bool) -> Value:
    from fxopt.export.translations.shape import expand_to

    return expand_to(emit, emit.cast(source, dtype_of(x)), x.meta["dims"])


def same_type(emit: Emitter, values: Sequence[Value], dtype: torch.dtype) -> list[Value]:
    """Return ``values`` cast to ``dtype``."""
    return [emit.cast(value, dtype) for value in values]
