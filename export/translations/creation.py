"""New tensors: filled, counted, triangular. Constants where the shape is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.creation_ops import LINSPACE
from fxopt.export.dtypes import onnx_dtype
from fxopt.export.emitter import Emitter, Number, Value
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.sizes import Size, as_size, is_static, product
from fxopt.export.translations.elementwise import as_type, out_dtype
from fxopt.export.translations.shape import expand_to, out_dims

aten = torch.ops.aten
_STORED = 1 << 16  # larger ranges are counted at run time, not stored


def filled(emit: Emitter, number: Number | Value) -> Value:
    """Return a tensor of the node's type and shape in which every element is ``number``."""
    return expand_to(emit, as_type(emit, number, out_dtype(emit)), out_dims(emit))


def _filler(position: int | None, number: Number = 0) -> Callable[..., Value]:
    """Return a translation that fills with the argument at ``position``, or with ``number``."""

    def translate(emit: Emitter, *arguments: Any) -> Value:
        return filled(emit, number if position is None else arguments[position])

    return translate


translates(aten.full.default)(_filler(1))
translates(aten.full_like.default, aten.fill.Scalar, aten.fill.Tensor)(_filler(1))
translates(aten.new_full.default)(_filler(2))
translates(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.zero.default)(_filler(None, 0))
translates(aten.ones.default, aten.ones_like.default, aten.new_ones.default)(_filler(None, 1))
translates(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default,
           aten.empty_strided.default, aten.empty_permuted.default)(_filler(None, 0))  # fmt: skip
translates(aten.scalar_tensor.default)(_filler(0))


def _range(emit: Emitter, start: Number, end: Number, step: Number) -> Value:
    dtype, (length,) = out_dtype(emit), out_dims(emit)
    if (
        is_static([length])
        and int(length) <= _STORED
        and all(isinstance(number, int | float) for number in (start, end, step))
    ):
        return emit.constant(torch.arange(start, end, step, dtype=dtype))
    # ORT makes a Slice of a Gather whose indices are a Range, also where that falls or starts below 0: other elements.
    rises = isinstance(start, int) and start >= 0 and isinstance(step, int) and step > 0
    if rises and not dtype.is_floating_point:
        return emit("Range", emit.number(start, dtype), emit.number(end, dtype), emit.number(step, dtype))
    counted = emit.cast(_count(emit, length), dtype)
    scaled = counted if step == 1 else emit("Mul", counted, emit.number(step, dtype))
    return scaled if start == 0 else emit("Add", scaled, emit.number(start, dtype))


def _count(emit: Emitter, length: Size) -> Value:
    """Return int64[length]: 0, 1, 2, and so on."""
    return emit("Range", emit.number(0, torch.int64), emit.number(length, torch.int64), emit.number(1, torch.int64))


@translates(aten.arange.default)
def arange(emit: Emitter, end: Number, *_: Any) -> Value:
    return _range(emit, 0, end, 1)


@translates(aten.arange.start)
def arange_start(emit: Emitter, start: Number, end: Number, *_: Any) -> Value:
    return _range(emit, start, end, 1)


@translates(aten.arange.start_step)
def arange_step(emit: Emitter, start: Number, end: Number, step: Number, *_: Any) -> Value:
    return _range(emit, start, end, step)


@translates(aten.linspace.default, LINSPACE)
def linspace(emit: Emitter, start: Number, end: Number, steps: Size, *_: Any) -> Value:
    if is_static([steps]) and all(isinstance(number, int | float) for number in (start, end)):
        return emit.constant(torch.linspace(start, end, int(steps), dtype=out_dtype(emit)))
    if not out_dtype(emit).is_floating_point:
        raise NotTranslated("integers between sizes")

    def number(value: Number) -> Value:
        return emit.number(value, torch.float64)

    gaps = emit("Max", emit("Sub", number(steps), number(1)), number(1))  # one number alone is the first
    step = emit("Div", emit("Sub", number(end), number(start)), gaps)
    spaced = emit("Add", emit("Mul", emit.cast(_count(emit, steps), torch.float64), step), number(start))
    return emit.cast(spaced, out_dtype(emit))


@translates(aten.eye.default, aten.eye.m)
def eye(emit: Emitter, *_: Any) -> Value:
    rows, columns = out_dims(emit)
    if is_static([rows, columns]):
        return emit.constant(torch.eye(int(rows), int(columns), dtype=out_dtype(emit)))
    return emit(
        "EyeLike",
        expand_to(emit, emit.number(0, torch.float32), (rows, columns)),
        dtype=int(onnx_dtype(out_dtype(emit))),
    )


def _triangle_indices(make: Callable[..., torch.Tensor]) -> Callable[..., Value]:
    def translate(emit: Emitter, rows: Size, columns: Size, offset: Size, *_: Any) -> Value:
        if not is_static([rows, columns, offset]):
            raise NotTranslated("the size of the triangle is dynamic")
        return emit.constant(make(int(rows), int(columns), offset=int(offset), dtype=out_dtype(emit)))

    return translate


translates(aten.tril_indices.default)(_triangle_indices(torch.tril_indices))
translates(aten.triu_indices.default)(_triangle_indices(torch.triu_indices))


@translates(aten.meshgrid.default)
def meshgrid(emit: Emitter, tensors: Sequence[Value]) -> list[Value]:
    return meshgrid_indexing(emit, tensors, "ij")


@translates(aten.meshgrid.indexing)
def meshgrid_indexing(emit: Emitter, tensors: Sequence[Value], indexing: str) -> list[Value]:
    count = len(tensors)
    place = list(range(count))
    if indexing == "xy" and count > 1:
        place[0], place[1] = 1, 0
    shape = [as_size(size) for size in emit.out[0].shape]
    return [
        expand_to(emit, _along(emit, vector, axis, count), shape) for vector, axis in zip(tensors, place, strict=True)
    ]


def _along(emit: Emitter, vector: Value, axis: int, count: int) -> Value:
    shape: list[Size] = [1] * count
    shape[axis] = product(vector.meta["dims"])
    return emit.reshape(vector, shape)
