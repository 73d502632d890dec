"""Comparisons and logic, element by element, in the type that PyTorch compares in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.export.emitter import Emitter, Value, dtype_of
from fxopt.export.registry import translates
from fxopt.export.translations.elementwise import Tensor, as_type, common_type, out_dtype

aten = torch.ops.aten

_COMPARISONS = {
    "Equal": (aten.eq,),
    "Less": (aten.lt, aten.less),
    "LessOrEqual": (aten.le, aten.less_equal),
    "Greater": (aten.gt, aten.greater),
    "GreaterOrEqual": (aten.ge, aten.greater_equal),
}


def _compared(emit: Emitter, op_type: str, x: Tensor, y: Tensor) -> Value:
    dtype = common_type(x, y)
    return emit(op_type, as_type(emit, x, dtype), as_type(emit, y, dtype))


def _comparison(op_type: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Tensor, y: Tensor) -> Value:
        return _compared(emit, op_type, x, y)

    return translate


for _op_type, _packets in _COMPARISONS.items():
    for _packet in _packets:
        translates(_packet.Tensor, _packet.Scalar)(_comparison(_op_type))


@translates(aten.ne.Tensor, aten.ne.Scalar, aten.not_equal.Tensor, aten.not_equal.Scalar)
def not_equal(emit: Emitter, x: Tensor, y: Tensor) -> Value:
    return emit("Not", _compared(emit, "Equal", x, y))


def _logical(op_type: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Value, y: Value) -> Value:
        return emit(op_type, emit.cast(x, torch.bool), emit.cast(y, torch.bool))

    return translate


translates(aten.logical_and.default)(_logical("And"))
translates(aten.logical_or.default)(_logical("Or"))
translates(aten.logical_xor.default)(_logical("Xor"))


@translates(aten.logical_not.default)
def logical_not(emit: Emitter, x: Value) -> Value:
    return emit("Not", emit.cast(x, torch.bool))


def _bitwise(on_bool: str, on_integer: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Tensor, y: Tensor) -> Value:
        dtype = out_dtype(emit)
        return emit(on_bool if dtype is torch.bool else on_integer, as_type(emit, x, dtype), as_type(emit, y, dtype))

    return translate


for _name, _on_bool, _on_integer in (
    ("and", "And", "BitwiseAnd"),
    ("or", "Or", "BitwiseOr"),
    ("xor", "Xor", "BitwiseXor"),
):
    _function = _bitwise(_on_bool, _on_integer)
    for _packet in (getattr(aten, f"bitwise_{_name}"), getattr(aten, f"__{_name}__")):
        translates(_packet.Tensor, _packet.Scalar)(_function)


@translates(aten.bitwise_not.default)
def bitwise_not(emit: Emitter, x: Value) -> Value:
    return emit("Not" if dtype_of(x) is torch.bool else "BitwiseNot", x)
