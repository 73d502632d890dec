"""Scatter: writing slices and elements to positions known only at run time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.export.emitter import Emitter, Number, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, Refused, translates
from fxopt.export.translations.elementwise import as_type, where_value
from fxopt.export.translations.index import as_index, index_columns
from fxopt.export.translations.shape import axis_of, expand_to

aten = torch.ops.aten
_REDUCTIONS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min", "add": "add", "multiply": "mul"}


def _scattered(
    emit: Emitter, x: Value, dim: int, index: Value, source: Value | Number, reduction: str | None = None
) -> Value:
    dtype = dtype_of(x)
    source = as_type(emit, source, dtype)
    index = as_index(emit, index)
    if rank(x) == 0:
        shape = dims(x)
        return emit.reshape(
            _scattered(
                emit, emit.reshape(x, (1,)), 0, emit.reshape(index, (1,)), emit.reshape(source, (1,)), reduction
            ),
            shape,
        )
    if rank(source) == 0 and rank(index):
        source = expand_to(emit, source, dims(index))
    elif dims(source) != dims(index):
        count = rank(index)
        source = emit("Slice", source, [0] * count, list(dims(index)), list(range(count)))
    return emit("ScatterElements", x, index, source, axis=axis_of(dim, rank(x)), reduction=reduction)


@translates(aten.scatter.src, aten.scatter.value)
def scatter(emit: Emitter, x: Value, dim: int, index: Value, source: Value | Number) -> Value:
    return _scattered(emit, x, dim, index, source)


@translates(aten.scatter_add.default)
def scatter_add(emit: Emitter, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _scattered(emit, x, dim, index, source, "add")


@translates(aten.scatter.reduce, aten.scatter.value_reduce)
def scatter_with(emit: Emitter, x: Value, dim: int, index: Value, source: Value | Number, reduce: str) -> Value:
    return _scattered(emit, x, dim, index, source, _REDUCTIONS[reduce])


@translates(aten.scatter_reduce.two)
def scatter_reduce(
    emit: Emitter, x: Value, dim: int, index: Value, source: Value, reduce: str, include_self: bool
) -> Value:
    """Without ``include_self``, what is written to starts from the neutral element; a mean is a sum over a count."""
    dtype = dtype_of(x)
    kind = "sum" if reduce == "mean" else reduce
    if rank(x) == 0 or dtype is torch.bool or (reduce == "mean" and not dtype.is_floating_point):
        raise Refused(f"scatter_reduce to a {dtype} with {rank(x)} axes and reduce={reduce!r}")
    start, counts = x, None
    if not include_self or reduce == "mean":
        zeros = expand_to(emit, emit.number(0, torch.int64), dims(x))
        counts = _scattered(emit, zeros, dim, index, 1, "add")
    if not include_self and counts is not None:
        start = where_value(emit, emit("Greater", counts, 0), emit.number(_neutral(kind, dtype), dtype), x)
        emit.set_dims(start, dims(x))
    result = _scattered(emit, start, dim, index, source, _REDUCTIONS[kind])
    if reduce != "mean" or counts is None:
        return result
    members = emit("Add", counts, 1) if include_self else emit("Max", counts, 1)
    return emit("Div", result, emit.cast(members, dtype))


def _neutral(kind: str, dtype: torch.dtype) -> Number:
    """Return the number that changes nothing."""
    if kind in ("sum", "prod"):
        return 0 if kind == "sum" else 1
    if dtype.is_floating_point:
        return -torch.inf if kind == "amax" else torch.inf
    limits = torch.iinfo(dtype)
    return limits.min if kind == "amax" else limits.max


@translates(aten.put.default)
def put(emit: Emitter, x: Value, index: Value, source: Value, accumulate: bool) -> Value:
    flat = [emit("Reshape", value, [-1]) for value in (x, as_index(emit, index), source)]
    return emit.reshape(emit("ScatterElements", *flat, axis=0, reduction="add" if accumulate else None), dims(x))


@translates(aten.index_reduce.default)
def index_reduce(
    emit: Emitter, x: Value, dim: int, index: Value, source: Value, reduce: str, include_self: bool
) -> Value:
    if reduce not in _REDUCTIONS or not include_self:
        raise NotTranslated(f"index_reduce with reduce={reduce!r} and include_self={include_self}")
    return _scatter_slices(emit, x, dim, index, source, _REDUCTIONS[reduce])


@translates(aten.index_add.default)
def index_add(emit: Emitter, x: Value, dim: int, index: Value, source: Value, alpha: Number) -> Value:
    source = emit.cast(source, dtype_of(x))
    source.meta.setdefault("dims", dims(x))
    scaled = source if alpha == 1 else emit("Mul", source, alpha, dims=dims(source))
    return _scatter_slices(emit, x, dim, index, scaled, "add")


@translates(aten.index_copy.default)
def index_copy(emit: Emitter, x: Value, dim: int, index: Value, source: Value) -> Value:
    return _scatter_slices(emit, x, dim, index, source, None)


@translates(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(emit: Emitter, x: Value, dim: int, index: Value, value: Value | Number) -> Value:
    if rank(x) == 0:
        return as_type(emit, value, dtype_of(x))
    axis = axis_of(dim, rank(x))
    shape = list(dims(x))
    shape[axis] = dims(index)[0] if rank(index) else 1
    return _scatter_slices(emit, x, dim, index, expand_to(emit, as_type(emit, value, dtype_of(x)), shape), None)


def _scatter_slices(emit: Emitter, x: Value, dim: int, index: Value, source: Value, reduction: str | None) -> Value:
    """Return ``x`` with slices of ``source`` written to, or added to, the positions ``index`` along ``dim``."""
    if rank(x) == 0:
        return emit.reshape(
            _scatter_slices(emit, emit.reshape(x, (1,)), 0, index, emit.reshape(source, (1,)), reduction), ()
        )
    axis = axis_of(dim, rank(x))
    order = [axis, *(a for a in range(rank(x)) if a != axis)]
    back = [order.index(a) for a in range(rank(x))]
    rows = emit("Reshape", as_index(emit, index), [-1, 1])
    updated = emit(
        "ScatterND",
        emit.transpose(x, order),
        emit.cast(rows, torch.int64),
        emit.transpose(source, order),
        reduction=reduction,
    )
    return emit.transpose(updated, back)


@translates(aten.index_put.default)
def index_put(emit: Emitter, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool) -> Value:
    given = [i for i in indices if i is not None]
    values = emit.cast(values, dtype_of(x))
    if len(given) == 1 and dtype_of(given[0]) is torch.bool and rank(values) == 0 and not accumulate:
        mask, axis = given[0], next(a for a, i in enumerate(indices) if i is not None)
        return where_value(emit, emit.reshape(mask, (*dims(mask), *[1] * (rank(x) - axis - rank(mask)))), values, x)
    axes, columns, shape = index_columns(emit, x, indices)
    rest = [axis for axis in range(rank(x)) if axis not in axes]
    order = [*axes, *rest]
    kept = [dims(x)[axis] for axis in rest]
    contiguous = axes == list(range(axes[0], axes[0] + len(axes)))
    if contiguous and axes[0] and rank(values) > 0:
        first = axes[0]
        values = expand_to(emit, values, [*kept[:first], *shape, *kept[first:]])
        lead = range(first, first + len(shape))
        values = emit.transpose(values, [*lead, *range(first), *range(first + len(shape), len(kept) + len(shape))])
    else:
        values = expand_to(emit, values, [*shape, *kept])
    updated = emit("ScatterND", emit.transpose(x, order), columns, values, reduction="add" if accumulate else None)
    return emit.transpose(updated, [order.index(axis) for axis in range(rank(x))])
