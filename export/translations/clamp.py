"""Minimum, maximum and clamp, element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.export.emitter import Emitter, Number, Value
from fxopt.export.registry import translates
from fxopt.export.translations.elementwise import out_dtype

aten = torch.ops.aten


def _extreme(op_type: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Value, y: Value) -> Value:
        dtype = out_dtype(emit)
        if dtype is torch.bool:
            return emit("Or" if op_type == "Max" else "And", x, y)
        return emit(op_type, emit.cast(x, dtype), emit.cast(y, dtype))

    return translate


translates(aten.maximum.default, aten.max.other)(_extreme("Max"))
translates(aten.minimum.default, aten.min.other)(_extreme("Min"))


@translates(aten.clamp.default, aten.clip.default)
def clamp(emit: Emitter, x: Value, low: Number | None, high: Number | None) -> Value:
    dtype = out_dtype(emit)
    x = emit.cast(x, dtype)
    if low is None or high is None:  # ORT's Clip with a single bound loses NaN
        if low is None and high is None:
            return x
        return emit("Min" if low is None else "Max", x, emit.number(high if low is None else low, dtype))
    if low != low or high != high:  # a bound that is NaN makes everything NaN
        return emit("Min", emit("Max", x, emit.number(low, dtype)), emit.number(high, dtype))
    return emit("Clip", x, emit.number(low, dtype), emit.number(high, dtype))


@translates(aten.clamp.Tensor, aten.clip.Tensor)
def clamp_tensor(emit: Emitter, x: Value, low: Value | None, high: Value | None) -> Value:
    dtype = out_dtype(emit)
    result = emit.cast(x, dtype)
    if low is not None:
        result = emit("Max", result, emit.cast(low, dtype))
    return result if high is None else emit("Min", result, emit.cast(high, dtype))


@translates(aten.clamp_min.default)
def clamp_min(emit: Emitter, x: Value, low: Number) -> Value:
    return clamp(emit, x, low, None)


@translates(aten.clamp_max.default)
def clamp_max(emit: Emitter, x: Value, high: Number) -> Value:
    return clamp(emit, x, None, high)


@translates(aten.clamp_min.Tensor)
def clamp_min_tensor(emit: Emitter, x: Value, low: Value) -> Value:
    return clamp_tensor(emit, x, low, None)


@translates(aten.clamp_max.Tensor)
def clamp_max_tensor(emit: Emitter, x: Value, high: Value) -> Value:
    return clamp_tensor(emit, x, None, high)
