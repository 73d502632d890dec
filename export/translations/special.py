"""Functions of one or two numbers that ONNX lacks, written so that they keep their accuracy, and torch's primitives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank
from fxopt.export.registry import TRANSLATIONS, NotTranslated, translates
from fxopt.export.translations.elementwise import Tensor, as_type, out_dtype, where_value
from fxopt.export.translations.pad import shifted
from fxopt.export.translations.reduce import reduced
from fxopt.export.translations.shape import axis_of

aten = torch.ops.aten
prims = torch.ops.prims


@translates(aten.log1p.default, aten.special_log1p.default)
def log1p(emit: Emitter, x: Value) -> Value:
    """log(u) x / (u - 1) with u = 1 + x, exact to rounding for small x.

    Source: Kahan, via Higham, Accuracy and Stability, 1.14.1.
    """
    x = emit.cast(x, out_dtype(emit))
    u = emit("Add", x, 1.0)
    logarithm = emit("Log", u)
    corrected = emit("Mul", logarithm, emit("Div", x, emit("Sub", u, 1.0)))
    small = emit("Less", emit("Abs", x), 0.5)
    return emit("Where", emit("Equal", u, 1.0), x, emit("Where", small, corrected, logarithm))


@translates(aten.expm1.default, aten.special_expm1.default)
def expm1(emit: Emitter, x: Value) -> Value:
    """(exp(x) + 1) tanh(x / 2), which has no cancellation."""
    x = emit.cast(x, out_dtype(emit))
    return emit("Mul", emit("Add", emit("Exp", x), 1.0), emit("Tanh", emit("Mul", x, 0.5)))


@translates(aten.erfc.default, aten.special_erfc.default)
def erfc(emit: Emitter, x: Value) -> Value:
    dtype = out_dtype(emit)
    return emit("Sub", emit.number(1.0, dtype), emit("Erf", emit.cast(x, dtype)))


@translates(aten.hypot.default)
def hypot(emit: Emitter, x: Value, y: Value) -> Value:
    dtype = out_dtype(emit)
    a, b = emit("Abs", emit.cast(x, dtype)), emit("Abs", emit.cast(y, dtype))
    large, small = emit("Max", a, b), emit("Min", a, b)
    ratio = emit("Div", small, emit("Where", emit("Equal", large, 0.0), emit.number(1.0, dtype), large))
    return emit("Mul", large, emit("Sqrt", emit("Add", emit("Mul", ratio, ratio), 1.0)))


@translates(aten.signbit.default)
def signbit(emit: Emitter, x: Value) -> Value:
    """Negative, or a negative zero, whose reciprocal is negative."""
    if dtype_of(x) is torch.bool:
        return emit("And", x, emit("Not", x))
    negative = emit("Less", x, 0)
    if not dtype_of(x).is_floating_point:
        return negative
    zero = emit("And", emit("Equal", x, 0.0), emit("Less", emit("Reciprocal", x), 0.0))
    return emit("Or", negative, zero)


@translates(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(emit: Emitter, x: Value, sign: Tensor) -> Value:
    dtype = out_dtype(emit)
    magnitude = emit("Abs", emit.cast(x, dtype))
    return emit("Where", signbit(emit, as_type(emit, sign, dtype)), emit("Neg", magnitude), magnitude)


@translates(aten.angle.default)
def angle(emit: Emitter, x: Value) -> Value:
    """Half a turn for negative numbers."""
    dtype = out_dtype(emit)
    x = emit.cast(x, dtype)
    turned = emit("Where", emit("Less", x, 0.0), emit.number(math.pi, dtype), emit.number(0.0, dtype))
    return emit("Where", emit("IsNaN", x), x, turned)


def _ignoring_nan(op_type: str) -> Any:
    def translate(emit: Emitter, x: Value, y: Value) -> Value:
        dtype = out_dtype(emit)
        a, b = emit.cast(x, dtype), emit.cast(y, dtype)
        if dtype is torch.bool:
            return emit("Or" if op_type == "Max" else "And", a, b)
        chosen = emit(op_type, a, b)
        if not dtype.is_floating_point:
            return chosen
        return emit("Where", emit("IsNaN", a), b, emit("Where", emit("IsNaN", b), a, chosen))

    return translate


translates(aten.fmax.default)(_ignoring_nan("Max"))
translates(aten.fmin.default)(_ignoring_nan("Min"))


@translates(aten.logaddexp.default)
def logaddexp(emit: Emitter, x: Value, y: Value) -> Value:
    dtype = out_dtype(emit)
    a, b = emit.cast(x, dtype), emit.cast(y, dtype)
    above = emit("Max", a, b)
    gap = emit("Abs", emit("Sub", a, b))
    sum_ = emit("Add", above, log1p(emit, emit("Exp", emit("Neg", gap))))
    return emit("Where", emit("Equal", a, b), emit("Add", a, math.log(2.0)), sum_)  # equal infinities have no gap


@translates(aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other)
def xlogy(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    dtype = out_dtype(emit)
    a, b = as_type(emit, x, dtype), as_type(emit, y, dtype)
    product = emit("Mul", a, emit("Log", b))
    vanishes = emit("And", emit("Equal", a, 0.0), emit("Not", emit("IsNaN", b)))
    return emit("Where", vanishes, emit.number(0.0, dtype), product)


@translates(aten.logit.default, aten.special_logit.default)
def logit(emit: Emitter, x: Value, eps: float | None) -> Value:
    dtype = out_dtype(emit)
    x = emit.cast(x, dtype)
    if eps is not None:
        x = emit("Where", emit("Less", x, eps), emit.number(eps, dtype), emit("Min", x, 1 - eps))
    return emit("Log", emit("Div", x, emit("Sub", emit.number(1.0, dtype), x)))


@translates(aten.sinc.default, aten.special_sinc.default)
def sinc(emit: Emitter, x: Value) -> Value:
    dtype = out_dtype(emit)
    scaled = emit("Mul", emit.cast(x, dtype), math.pi)
    zero = emit("Equal", scaled, 0.0)
    divisor = emit("Where", zero, emit.number(1.0, dtype), scaled)
    return emit("Where", zero, emit.number(1.0, dtype), emit("Div", emit("Sin", scaled), divisor))


@translates(aten.round.decimals)
def round_decimals(emit: Emitter, x: Value, decimals: int) -> Value:
    if decimals == 0 or not dtype_of(x).is_floating_point:
        return emit("Round", x) if dtype_of(x).is_floating_point else x
    shifted, back = ("Mul", "Div") if decimals > 0 else ("Div", "Mul")
    scale = 10.0 ** abs(decimals)
    return emit(back, emit("Round", emit(shifted, x, scale)), scale)


@translates(aten.isclose.default)
def isclose(emit: Emitter, x: Value, y: Value, rtol: float, atol: float, equal_nan: bool) -> Value:
    dtype = dtype_of(x)
    equal = emit("Equal", x, y)
    computed = dtype if dtype.is_floating_point else torch.float64
    a, b = emit.cast(x, computed), emit.cast(y, computed)
    allowed = emit("Add", emit("Mul", emit("Abs", b), rtol), atol)
    error = emit("Abs", emit("Sub", a, b))
    near = emit("And", emit("LessOrEqual", error, allowed), emit("Less", error, math.inf))
    near = emit("Or", equal, near)
    return (
        emit("Or", near, emit("And", emit("IsNaN", a), emit("IsNaN", b)))
        if equal_nan and dtype.is_floating_point
        else near
    )


@translates(aten.cosine_similarity.default)
def cosine_similarity(emit: Emitter, x: Value, y: Value, dim: int, eps: float) -> Value:
    """Both vectors are divided by their clamped norms first, as PyTorch does."""
    dtype = out_dtype(emit)
    axes = max(rank(x), rank(y))
    if axes and rank(x) == rank(y) and dims(x)[axis_of(dim, axes)] != dims(y)[axis_of(dim, axes)]:
        raise NotTranslated("one operand is broadcast along the axis")

    def unit(value: Value) -> Value:
        value = emit.cast(value, dtype)
        axis = axis_of(dim, axes) - (axes - rank(value))
        if axis < 0 or axes == 0:
            raise NotTranslated("the axis exists in one operand only")
        norm = reduced(emit, "ReduceL2", value, axis, True)
        return emit("Div", value, emit("Max", norm, eps))

    return emit("ReduceSum", emit("Mul", unit(x), unit(y)), [axis_of(dim, axes)], keepdims=0)


@translates(aten.logcumsumexp.default)
def logcumsumexp(emit: Emitter, x: Value, dim: int) -> Value:
    if rank(x) == 0:
        return x
    axis = axis_of(dim, rank(x))
    size = dims(x)[axis]
    if not isinstance(size, int):
        raise NotTranslated("the size of the axis is dynamic")
    step = 1
    while step < size:  # element i takes in element i - step, logarithmically many times
        earlier = shifted(emit, x, step, axis, -math.inf)
        above = emit("Max", x, earlier)
        gap = emit(
            "Where", emit("Equal", x, earlier), emit.number(0.0, dtype_of(x)), emit("Abs", emit("Sub", x, earlier))
        )
        x = emit("Add", above, log1p(emit, emit("Exp", emit("Neg", gap))), dims=dims(x))
        step *= 2
    return x


def _running_extreme(op_type: str) -> Any:
    def translate(emit: Emitter, x: Value, dim: int) -> tuple[Value, Value]:
        """Compare with everything before: the last of equal elements is the one PyTorch names."""
        if rank(x) == 0:
            return x, emit.constant(torch.tensor(0))
        axis = axis_of(dim, rank(x))
        size = dims(x)[axis]
        if not isinstance(size, int):
            raise NotTranslated("the size of the axis is dynamic")
        shape = [1] * rank(x)
        shape[axis] = size
        from fxopt.export.translations.shape import expand_to

        position = expand_to(emit, emit.constant(torch.arange(size).reshape(shape)), dims(x))
        compare, step = "GreaterOrEqual" if op_type == "max" else "LessOrEqual", 1
        while step < size:
            kept = [emit("Slice", value, [step], [size], [axis]) for value in (x, position)]
            earlier = [emit("Slice", value, [0], [size - step], [axis]) for value in (x, position)]
            stays = emit(compare, kept[0], earlier[0])
            if dtype_of(x).is_floating_point:
                stays = emit("Or", emit("IsNaN", kept[0]), emit("And", stays, emit("Not", emit("IsNaN", earlier[0]))))
            head = [emit("Slice", value, [0], [step], [axis]) for value in (x, position)]
            x, position = (
                emit("Concat", h, where_value(emit, stays, k, e), axis=axis)
                for h, k, e in zip(head, kept, earlier, strict=True)
            )
            step *= 2
        return x, position

    return translate


translates(aten.cummax.default)(_running_extreme("max"))
translates(aten.cummin.default)(_running_extreme("min"))


@translates(aten.nansum.default)
def nansum(emit: Emitter, x: Value, dim: Sequence[int] | None, keepdim: bool, _dtype: object) -> Value:
    x = emit.cast(x, out_dtype(emit))
    if dtype_of(x).is_floating_point:
        x = emit("Where", emit("IsNaN", x), emit.number(0.0, dtype_of(x)), x, dims=dims(x))
    return reduced(emit, "ReduceSum", x, dim, keepdim)


@translates(aten.nanmean.default)
def nanmean(emit: Emitter, x: Value, dim: Sequence[int] | None, keepdim: bool, _dtype: object) -> Value:
    counted = emit.cast(emit("Not", emit("IsNaN", x)), out_dtype(emit))
    counted.meta.setdefault("dims", dims(x))
    return emit("Div", nansum(emit, x, dim, keepdim, None), reduced(emit, "ReduceSum", counted, dim, keepdim))


@translates(aten.median.default)
def median(emit: Emitter, x: Value) -> Value:
    """The lower of the two middle elements, or NaN if there is one."""
    if any(not isinstance(size, int) for size in dims(x)):
        raise NotTranslated("the number of elements is dynamic")
    count = math.prod(int(size) for size in dims(x))
    flat = emit.reshape(x, (count,))
    if count == 0:
        raise NotTranslated("there are no elements")
    smallest = emit.many("TopK", flat, [(count + 1) // 2], outputs=2, largest=0, axis=0)[0]
    middle = emit("Gather", smallest, emit.number((count - 1) // 2, torch.int64), axis=0)
    if not dtype_of(x).is_floating_point:
        return middle
    return emit("Where", emit("IsNaN", reduced(emit, "ReduceSum", x)), emit.number(math.nan, dtype_of(x)), middle)


@translates(aten.median.dim)
def median_dim(emit: Emitter, x: Value, dim: int, keepdim: bool) -> tuple[Value, Value]:
    size = dims(x)[axis_of(dim, rank(x))] if rank(x) else 1
    if not isinstance(size, int):
        raise NotTranslated("the size of the axis is dynamic")
    return kthvalue(emit, x, (size + 1) // 2, dim, keepdim)


@translates(aten.kthvalue.default)
def kthvalue(emit: Emitter, x: Value, k: int, dim: int, keepdim: bool) -> tuple[Value, Value]:
    if rank(x) == 0:
        return x, emit.constant(torch.tensor(0))
    axis = axis_of(dim, rank(x))
    found = emit.many("TopK", x, [k], outputs=2, axis=axis, largest=0)
    last = [emit("Gather", value, emit.number(k - 1, torch.int64), axis=axis) for value in found]
    if keepdim:
        last = [emit("Unsqueeze", value, [axis]) for value in last]
    return last[0], last[1]


@translates(aten.searchsorted.Tensor)
def searchsorted(
    emit: Emitter, sequence: Value, values: Value, out_int32: bool, right: bool, side: str | None, sorter: Value | None
) -> Value:
    """Count the elements that are smaller (or not larger, from the right)."""
    if sorter is not None:
        raise NotTranslated("the sequence is not sorted already")
    compare = "LessOrEqual" if right or side == "right" else "Less"
    if rank(sequence) > 1:
        sequence = emit("Unsqueeze", sequence, [rank(sequence) - 1])
    smaller = emit(compare, sequence, emit("Unsqueeze", emit.cast(values, dtype_of(sequence)), [rank(values)]))
    counted = emit("ReduceSum", emit.cast(smaller, torch.int64), [rank(values)], keepdims=0)
    return emit.cast(counted, out_dtype(emit))


@translates(aten.bucketize.Tensor)
def bucketize(emit: Emitter, values: Value, boundaries: Value, out_int32: bool, right: bool) -> Value:
    return searchsorted(emit, boundaries, values, out_int32, right, None, None)


def _register_primitives() -> None:
    """Let torch's primitives, which decompositions are made of, be translated like the operators of the same name."""
    unary = "abs acos acosh asin asinh atan atanh cos cosh ceil erf erfc exp exp2 expm1 floor isfinite"
    unary += " log log1p log2 log10 neg"
    unary += " reciprocal round rsqrt sign signbit sin sinh sqrt tan tanh trunc"
    binary = (
        "atan2 bitwise_and bitwise_or bitwise_xor eq fmax fmin fmod ge gt hypot le lt maximum minimum mul ne remainder"
    )
    for name in (*unary.split(), *binary.split()):
        packet = getattr(aten, name)
        source = packet.default if "default" in packet.overloads() else packet.Tensor
        if hasattr(prims, name) and source in TRANSLATIONS:
            translates(getattr(prims, name).default)(TRANSLATIONS[source])
    translates(prims.add.default)(lambda emit, x, y: TRANSLATIONS[aten.add.Tensor](emit, x, y, 1))
    translates(prims.sub.default)(lambda emit, x, y: TRANSLATIONS[aten.sub.Tensor](emit, x, y, 1))
    translates(prims.pow.default)(TRANSLATIONS[aten.pow.Tensor_Tensor])
    translates(prims.where.default)(TRANSLATIONS[aten.where.self])


_register_primitives()


@translates(prims.div.default)
def prims_div(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    """Divide; integers towards zero."""
    dtype = out_dtype(emit)
    return emit("Div", as_type(emit, x, dtype), as_type(emit, y, dtype))
