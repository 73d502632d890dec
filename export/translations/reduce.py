"""Reductions, norms, sorting and running sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.export.emitter import Emitter, Number, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.sizes import Size, product
from fxopt.export.translations.elementwise import out_dtype
from fxopt.export.translations.pad import shifted
from fxopt.export.translations.shape import axis_of

aten = torch.ops.aten
Axes = int | Sequence[int] | None

LONG_SUM = 2**17
"""How many numbers ORT may add up: it does so in a row, in single precision, but one axis after the other if asked."""

_SUMS = frozenset({"ReduceSum", "ReduceMean"})


def reduced(emit: Emitter, op_type: str, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
    """Return ``x`` reduced over ``dim``, or over all axes if it names none."""
    axes = axes_of(x, dim)
    if rank(x) == 0:
        return _reduced_scalar(emit, op_type, x)
    count = count_of(emit, x, dim)
    if op_type in _SUMS and isinstance(count, int) and count > LONG_SUM:
        return axis_by_axis(emit, op_type, x, axes, keepdim)
    return _over(emit, op_type, x, None if len(axes) == rank(x) else axes, keepdim)


def axis_by_axis(emit: Emitter, op_type: str, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
    """Return ``x`` reduced over one axis after the other, counted from the front: ORT adds up a reduction in a row."""
    for axis in sorted(axes, reverse=True):
        x = _over(emit, op_type, x, [axis], keepdim)
    return x


def _over(emit: Emitter, op_type: str, x: Value, axes: list[int] | None, keepdim: bool) -> Value:
    if emit.opset < 18 and op_type != "ReduceSum":
        return emit(op_type, x, axes=axes, keepdims=int(keepdim))
    return emit(op_type, x, axes, keepdims=int(keepdim))


def axes_of(x: Value, dim: Axes) -> list[int]:
    """Return the axes that ``dim`` names, all of them for None and for an empty list."""
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(rank(x)))
    return sorted(axis_of(axis, rank(x)) for axis in ([dim] if isinstance(dim, int) else dim))


def _reduced_scalar(emit: Emitter, op_type: str, x: Value) -> Value:
    widened = emit("Reshape", x, [1], dims=(1,))
    return emit(op_type, widened, keepdims=0)


def count_of(emit: Emitter, x: Value, dim: Axes) -> Size:
    """Return how many elements are reduced over ``dim``."""
    return product([dims(x)[axis] for axis in axes_of(x, dim)])


# -- sum, mean, product, extremes ------------------------------------------------------------------------------------


@translates(aten.sum.default)
def sum_all(emit: Emitter, x: Value, _dtype: object) -> Value:
    return reduced(emit, "ReduceSum", emit.cast(x, out_dtype(emit)))


@translates(aten.sum.dim_IntList)
def sum_(emit: Emitter, x: Value, dim: Axes, keepdim: bool, _dtype: object) -> Value:
    return reduced(emit, "ReduceSum", emit.cast(x, out_dtype(emit)), dim, keepdim)


@translates(aten.mean.default)
def mean_all(emit: Emitter, x: Value, _dtype: object) -> Value:
    return reduced(emit, "ReduceMean", emit.cast(x, out_dtype(emit)))


@translates(aten.mean.dim)
def mean(emit: Emitter, x: Value, dim: Axes, keepdim: bool, _dtype: object) -> Value:
    return reduced(emit, "ReduceMean", emit.cast(x, out_dtype(emit)), dim, keepdim)


@translates(aten.prod.default)
def prod_all(emit: Emitter, x: Value, _dtype: object) -> Value:
    return reduced(emit, "ReduceProd", emit.cast(x, out_dtype(emit)))


@translates(aten.prod.dim_int)
def prod(emit: Emitter, x: Value, dim: int, keepdim: bool, _dtype: object) -> Value:
    return reduced(emit, "ReduceProd", emit.cast(x, out_dtype(emit)), dim, keepdim)


@translates(aten.amax.default)
def amax(emit: Emitter, x: Value, dim: Axes, keepdim: bool) -> Value:
    return reduced(emit, "ReduceMax", x, dim, keepdim)


@translates(aten.amin.default)
def amin(emit: Emitter, x: Value, dim: Axes, keepdim: bool) -> Value:
    return reduced(emit, "ReduceMin", x, dim, keepdim)


@translates(aten.max.default)
def max_all(emit: Emitter, x: Value) -> Value:
    return reduced(emit, "ReduceMax", x)


@translates(aten.min.default)
def min_all(emit: Emitter, x: Value) -> Value:
    return reduced(emit, "ReduceMin", x)


def _extreme_along(value_op: str, index_op: str) -> Callable[..., tuple[Value, Value]]:
    def translate(emit: Emitter, x: Value, dim: int, keepdim: bool) -> tuple[Value, Value]:
        return reduced(emit, value_op, x, dim, keepdim), _index(emit, index_op, x, dim, keepdim)

    return translate


translates(aten.max.dim)(_extreme_along("ReduceMax", "ArgMax"))
translates(aten.min.dim)(_extreme_along("ReduceMin", "ArgMin"))


def _index(emit: Emitter, op_type: str, x: Value, dim: int, keepdim: bool) -> Value:
    if rank(x) == 0:
        return emit.constant(torch.tensor(0))
    return emit(op_type, x, axis=axis_of(dim, rank(x)), keepdims=int(keepdim))


def _position(op_type: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Value, dim: int | None, keepdim: bool) -> Value:
        if dim is not None:
            return _index(emit, op_type, x, dim, keepdim)
        flat = emit("Reshape", x, [-1], dims=(product(dims(x)),))
        found = _index(emit, op_type, flat, 0, False)
        return emit("Reshape", found, [1] * rank(x)) if keepdim else found

    return translate


translates(aten.argmax.default)(_position("ArgMax"))
translates(aten.argmin.default)(_position("ArgMin"))


@translates(aten.aminmax.default)
def aminmax(emit: Emitter, x: Value, dim: int | None, keepdim: bool) -> tuple[Value, Value]:
    return reduced(emit, "ReduceMin", x, dim, keepdim), reduced(emit, "ReduceMax", x, dim, keepdim)


def _over_truth(op_type: str) -> Callable[..., Value]:
    def translate(emit: Emitter, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
        truth = emit.cast(x, torch.bool)
        if emit.opset < 20:
            truth = emit.cast(truth, torch.int32)
        return emit.cast(emit.cast(reduced(emit, op_type, truth, dim, keepdim), torch.bool), out_dtype(emit))

    return translate


translates(aten.any.default, aten.any.dim, aten.any.dims)(_over_truth("ReduceMax"))
translates(aten.all.default, aten.all.dim, aten.all.dims)(_over_truth("ReduceMin"))


@translates(aten.count_nonzero.dim_IntList, aten.count_nonzero.default)
def count_nonzero(emit: Emitter, x: Value, dim: Axes) -> Value:
    return reduced(emit, "ReduceSum", emit.cast(emit.cast(x, torch.bool), torch.int64), dim)


@translates(aten.logsumexp.default)
def logsumexp(emit: Emitter, x: Value, dim: Axes, keepdim: bool) -> Value:
    return reduced(emit, "ReduceLogSumExp", emit.cast(x, out_dtype(emit)), dim, keepdim)


# -- variance --------------------------------------------------------------------------------------------------------


def variance(emit: Emitter, x: Value, dim: Axes, correction: Number | None, keepdim: bool) -> tuple[Value, Value]:
    """Return variance and mean over ``dim``."""
    mean_value = reduced(emit, "ReduceMean", x, dim, True)
    centred = emit("Sub", x, mean_value, dims=dims(x))
    squares = emit("Mul", centred, centred, dims=dims(x))
    correction = 1 if correction is None else correction
    if correction == 0:
        spread = reduced(emit, "ReduceMean", squares, dim, keepdim)
    else:
        count = count_of(emit, x, dim)
        divisor = (
            max(count - correction, 0)
            if isinstance(count, int) and not hasattr(correction, "free_symbols")
            else count - correction
        )
        total = reduced(emit, "ReduceSum", squares, dim, keepdim)
        spread = emit("Div", total, divisor)
    return spread, mean_value if keepdim else reduced(emit, "ReduceMean", x, dim, False)


@translates(aten.var.correction)
def var(emit: Emitter, x: Value, dim: Axes, correction: Number | None, keepdim: bool) -> Value:
    return variance(emit, x, dim, correction, keepdim)[0]


@translates(aten.std.correction)
def std(emit: Emitter, x: Value, dim: Axes, correction: Number | None, keepdim: bool) -> Value:
    return emit("Sqrt", variance(emit, x, dim, correction, keepdim)[0])


@translates(aten.var_mean.correction)
def var_mean(emit: Emitter, x: Value, dim: Axes, correction: Number | None, keepdim: bool) -> tuple[Value, Value]:
    return variance(emit, x, dim, correction, keepdim)


@translates(aten.std_mean.correction)
def std_mean(emit: Emitter, x: Value, dim: Axes, correction: Number | None, keepdim: bool) -> tuple[Value, Value]:
    spread, mean_value = variance(emit, x, dim, correction, keepdim)
    return emit("Sqrt", spread), mean_value


@translates(aten.var.default, aten.var.dim)
def var_unbiased(emit: Emitter, x: Value, *how: Any) -> Value:
    return variance(emit, x, *_unbiased(how))[0]


@translates(aten.std.default, aten.std.dim)
def std_unbiased(emit: Emitter, x: Value, *how: Any) -> Value:
    return emit("Sqrt", variance(emit, x, *_unbiased(how))[0])


def _unbiased(how: Sequence[Any]) -> tuple[Axes, int, bool]:
    dim, unbiased, keepdim = how if len(how) == 3 else (None, how[0], False)
    return dim, int(unbiased), keepdim


# -- norms -----------------------------------------------------------------------------------------------------------


def norm_value(emit: Emitter, x: Value, order: Number, dim: Axes, keepdim: bool) -> Value:
    """Return the vector norm of ``x`` over ``dim``."""
    if order in (1, 2):
        return reduced(emit, f"ReduceL{int(order)}", x, dim, keepdim)
    magnitude = emit("Abs", x, dims=dims(x))
    if order in (math.inf, -math.inf):
        return reduced(emit, "ReduceMax" if order > 0 else "ReduceMin", magnitude, dim, keepdim)
    if order == 0:
        nonzero = emit.cast(emit.cast(x, torch.bool), dtype_of(x))
        nonzero.meta.setdefault("dims", dims(x))
        return reduced(emit, "ReduceSum", nonzero, dim, keepdim)
    powers = emit("Pow", magnitude, order, dims=dims(x))
    return emit("Pow", reduced(emit, "ReduceSum", powers, dim, keepdim), 1.0 / order)


@translates(aten.linalg_vector_norm.default)
def vector_norm(emit: Emitter, x: Value, order: Number, dim: Axes, keepdim: bool, _dtype: object) -> Value:
    return norm_value(emit, emit.cast(x, out_dtype(emit)), order, dim, keepdim)


@translates(aten.norm.ScalarOpt_dim)
def norm_dim(emit: Emitter, x: Value, order: Number | None, dim: Axes, keepdim: bool) -> Value:
    return norm_value(emit, emit.cast(x, out_dtype(emit)), 2 if order is None else order, dim, keepdim)


@translates(aten.norm.ScalarOpt_dim_dtype)
def norm_dim_dtype(emit: Emitter, x: Value, order: Number | None, dim: Axes, keepdim: bool, _dtype: object) -> Value:
    return norm_dim(emit, x, order, dim, keepdim)


@translates(aten.norm.Scalar)
def norm_all(emit: Emitter, x: Value, order: Number) -> Value:
    return norm_value(emit, emit.cast(x, out_dtype(emit)), order, None, False)


# -- order and running sums ------------------------------------------------------------------------------------------


@translates(aten.topk.default)
def topk(emit: Emitter, x: Value, k: Size, dim: int, largest: bool, sorted_: bool) -> tuple[Value, ...]:
    return _top(emit, x, k, dim, largest, sorted_)


@translates(aten.sort.default)
def sort(emit: Emitter, x: Value, dim: int, descending: bool) -> tuple[Value, ...]:
    return _top(emit, x, dims(x)[axis_of(dim, rank(x))] if rank(x) else 1, dim, descending, True)


@translates(aten.sort.stable)
def sort_stable(emit: Emitter, x: Value, _stable: bool, dim: int, descending: bool) -> tuple[Value, ...]:
    return sort(emit, x, dim, descending)


@translates(aten.argsort.default)
def argsort(emit: Emitter, x: Value, dim: int, descending: bool) -> Value:
    return sort(emit, x, dim, descending)[1]


@translates(aten.argsort.stable)
def argsort_stable(emit: Emitter, x: Value, _stable: bool, dim: int, descending: bool) -> Value:
    return sort(emit, x, dim, descending)[1]


@translates(aten.msort.default)
def msort(emit: Emitter, x: Value) -> Value:
    return sort(emit, x, 0, False)[0]


def _top(emit: Emitter, x: Value, k: Size, dim: int, largest: bool, in_order: bool) -> tuple[Value, ...]:
    if rank(x) == 0:
        return x, emit.constant(torch.tensor(0))
    return emit.many("TopK", x, [k], outputs=2, axis=axis_of(dim, rank(x)), largest=int(largest), sorted=int(in_order))


@translates(aten.cumsum.default)
def cumsum(emit: Emitter, x: Value, dim: int, _dtype: object) -> Value:
    x = emit.cast(x, out_dtype(emit))
    return x if rank(x) == 0 else emit("CumSum", x, emit.number(axis_of(dim, rank(x)), torch.int64))


@translates(aten.cumprod.default)
def cumprod(emit: Emitter, x: Value, dim: int, _dtype: object) -> Value:
    """Multiply along an axis with logarithmically many steps: at step s, element i is multiplied by element i - s."""
    x = emit.cast(x, out_dtype(emit))
    size = dims(x)[axis_of(dim, rank(x))] if rank(x) else 1
    if not isinstance(size, int):
        raise NotTranslated("the size of the axis is dynamic")
    axis, step = axis_of(dim, rank(x)), 1
    shape = dims(x)
    while step < size:
        earlier = shifted(emit, x, step, axis, 1)
        x = emit("Mul", x, earlier, dims=shape)
        step *= 2
    return x
