"""Normalization layers in inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.export.dtypes import HALF_TYPES
from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, Refused, translates
from fxopt.export.sizes import Size, product
from fxopt.export.translations.reduce import LONG_SUM, axis_by_axis
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM

aten = torch.ops.aten


@translates(aten.batch_norm.default)
def batch_norm(
    emit: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    if mean is None or var is None:
        return _batch_statistics_norm(emit, x, weight, bias, eps)
    if training:
        raise Refused("it updates its running statistics: the graph is in train mode")
    return _affine_norm(emit, x, weight, bias, mean, var, eps)


def _batch_statistics_norm(emit: Emitter, x: Value, weight: Value | None, bias: Value | None, eps: float) -> Value:
    """Normalize by the statistics of the batch, as a layer that tracks none does in evaluation too."""
    dtype = dtype_of(x)
    wide = torch.float32 if dtype in HALF_TYPES else dtype  # which PyTorch sums halves up in
    normed = _standardized(emit, emit.cast(x, wide), [axis for axis in range(rank(x)) if axis != 1], eps)
    weight, bias = (None if held is None else emit.cast(held, wide) for held in (weight, bias))
    return emit.cast(_scaled(emit, normed, weight, bias, dims(x)[1]), dtype)


def _standardized(emit: Emitter, x: Value, axes: list[int], eps: float) -> Value:
    """Return ``x`` with mean 0 and variance 1 over ``axes``."""
    centred = emit("Sub", x, axis_by_axis(emit, "ReduceMean", x, axes, True))
    spread = axis_by_axis(emit, "ReduceMean", emit("Mul", centred, centred), axes, True)
    return emit("Div", centred, emit("Sqrt", emit("Add", spread, eps)), dims=dims(x))


def _is_long(emit: Emitter, x: Value, count: Size) -> bool:
    """Return whether so many numbers, or an unknown number of them, are too many for one normalization of ORT's.

    It adds them up in a row, in single precision: of 4 million of them the statistics keep 4 digits.
    """
    return (
        emit.runtime == "ort-cpu" and dtype_of(x) is torch.float32 and (not isinstance(count, int) or count > LONG_SUM)
    )


@translates(aten.native_batch_norm.default)
def native_batch_norm_of_mode(
    emit: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Value, None, None]:
    return batch_norm(emit, x, weight, bias, mean, var, training, momentum, eps, True), None, None


@translates(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm(
    emit: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, None, None]:
    return _affine_norm(emit, x, weight, bias, mean, var, eps), None, None


def _affine_norm(
    emit: Emitter, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, eps: float
) -> Value:
    channels, dtype = dims(mean)[0], dtype_of(x)
    if dtype is torch.float64:  # ONNX's epsilon has single precision
        column = (channels, *[1] * (rank(x) - 2))
        centred = emit("Sub", x, emit.reshape(mean, column))
        deviation = emit("Sqrt", emit("Add", emit.reshape(var, column), eps))
        return _scaled(emit, emit("Div", centred, deviation, dims=dims(x)), weight, bias, channels)
    if dtype in HALF_TYPES:  # ONNX, as PyTorch, lets the parameters be wider than what they normalize
        dtype = dtype_of(mean)
    scale = _filled(emit, 1.0, channels, dtype) if weight is None else emit.cast(weight, dtype)
    shift = _filled(emit, 0.0, channels, dtype) if bias is None else emit.cast(bias, dtype)
    return emit(
        "BatchNormalization", x, scale, shift, emit.cast(mean, dtype), emit.cast(var, dtype), epsilon=float(eps)
    )


def _filled(emit: Emitter, number: float, size: Size, dtype: torch.dtype) -> Value:
    if not isinstance(size, int):
        raise NotTranslated("the number of channels is dynamic")
    return emit.constant(torch.full((size,), number, dtype=dtype))


@translates(aten.layer_norm.default)
def layer_norm(
    emit: Emitter,
    x: Value,
    shape: Sequence[Size],
    weight: Value | None,
    bias: Value | None,
    eps: float,
    cudnn_enable: bool,
) -> Value:
    several = len(shape) > 1
    if dtype_of(x) is torch.float64 or (several and _is_long(emit, x, product(shape))):  # ORT's statistics are single
        axes = list(range(rank(x) - len(shape), rank(x)))
        normed = _standardized(emit, x, axes, eps)
        normed = normed if weight is None else emit("Mul", normed, weight)
        return normed if bias is None else emit("Add", normed, bias)
    if weight is None:
        if not all(isinstance(size, int) for size in shape):
            raise NotTranslated("the normalized shape is dynamic and has no weight")
        weight = emit.constant(torch.ones(tuple(int(size) for size in shape), dtype=dtype_of(x)))
    return emit("LayerNormalization", x, emit.cast(weight, dtype_of(x)), bias, axis=-len(shape), epsilon=float(eps))


@translates(aten.native_layer_norm.default)
def native_layer_norm(
    emit: Emitter, x: Value, shape: Sequence[Size], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, None, None]:
    return layer_norm(emit, x, shape, weight, bias, eps, True), None, None


@translates(aten.rms_norm.default)
def rms_norm(emit: Emitter, x: Value, shape: Sequence[Size], weight: Value | None, eps: float | None) -> Value:
    eps = torch.finfo(dtype_of(x)).eps if eps is None else eps
    if emit.opset >= 23 and weight is not None:
        return emit("RMSNormalization", x, weight, axis=-len(shape), epsilon=float(eps))
    axes = list(range(rank(x) - len(shape), rank(x)))
    squares = emit("ReduceMean", emit("Pow", x, 2.0), axes, keepdims=1)
    scaled = emit("Div", x, emit("Sqrt", emit("Add", squares, eps)))
    return scaled if weight is None else emit("Mul", scaled, weight)


@translates(aten.group_norm.default)
def group_norm(
    emit: Emitter, x: Value, groups: int, weight: Value | None, bias: Value | None, eps: float, cudnn_enabled: bool
) -> Value:
    """Normalize each group as one channel, then scale: ORT has no kernel of ONNX's GroupNormalization."""
    batch, channels, *rest = dims(x)
    dtype = dtype_of(x)
    if not isinstance(channels, int):
        raise NotTranslated("the number of channels is dynamic")
    grouped = emit.reshape(x, (batch, groups, channels // groups * product(rest)))
    if batch == 0 or 0 in rest:
        return x
    if _is_long(emit, x, channels // groups * product(rest)):
        apart = emit.reshape(x, (batch, groups, channels // groups, *rest))
        normed = _standardized(emit, apart, list(range(2, rank(apart))), eps)
        return _scaled(emit, emit.reshape(normed, dims(x)), weight, bias, channels)
    normed = emit(
        "InstanceNormalization",
        grouped,
        _filled(emit, 1.0, groups, dtype),
        _filled(emit, 0.0, groups, dtype),
        epsilon=float(eps),
    )
    emit.set_dims(normed, dims(grouped))
    return _scaled(emit, emit.reshape(normed, dims(x)), weight, bias, channels)


@translates(aten.native_group_norm.default)
def native_group_norm(
    emit: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    batch: Size,
    channels: Size,
    area: Size,
    groups: int,
    eps: float,
) -> tuple[Value, None, None]:
    return group_norm(emit, x, groups, weight, bias, eps, True), None, None


def _scaled(emit: Emitter, x: Value, weight: Value | None, bias: Value | None, channels: Size) -> Value:
    column = (channels, *[1] * (rank(x) - 2))
    if weight is not None:
        x = emit("Mul", x, emit.reshape(weight, column), dims=dims(x))
    return x if bias is None else emit("Add", x, emit.reshape(bias, column))


@translates(aten.instance_norm.default)
def instance_norm(
    emit: Emitter,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    if not use_input_stats and mean is not None and var is not None:
        return _affine_norm(emit, x, weight, bias, mean, var, eps)
    channels, dtype = dims(x)[1], dtype_of(x)
    if rank(x) > 3 and _is_long(emit, x, product(dims(x)[2:])):
        return _scaled(emit, _standardized(emit, x, list(range(2, rank(x))), eps), weight, bias, channels)
    scale = _filled(emit, 1.0, channels, dtype) if weight is None else weight
    shift = _filled(emit, 0.0, channels, dtype) if bias is None else bias
    return emit("InstanceNormalization", x, scale, shift, epsilon=float(eps))


@translates(MASKED_LAYER_NORM)
def masked_layer_norm(
    emit: Emitter, x: Value, mask: Value, weight: Value | None, bias: Value | None, eps: float
) -> Value:
    wide = _single_or_double(emit, x)
    kept = emit("ReduceSum", emit.cast(mask, dtype_of(wide)), keepdims=1)
    normed = emit.cast(_standardized_where(emit, wide, mask, kept, [rank(x) - 1], eps), dtype_of(x))
    emit.set_dims(normed, dims(x))
    normed = normed if weight is None else emit("Mul", normed, emit.cast(weight, dtype_of(x)), dims=dims(x))
    return normed if bias is None else emit("Add", normed, emit.cast(bias, dtype_of(x)))


@translates(MASKED_GROUP_NORM)
def masked_group_norm(
    emit: Emitter, x: Value, mask: Value, groups: int, weight: Value | None, bias: Value | None, eps: float
) -> Value:
    """One row for each group: its channels, and all of their places side by side."""
    batch, channels, *rest = dims(x)
    if not isinstance(channels, int):
        raise NotTranslated("the number of channels is dynamic")
    wide = emit.reshape(_single_or_double(emit, x), (batch, groups, channels // groups, product(rest)))
    column = emit.reshape(mask, (groups, channels // groups, 1))
    channels_kept = emit("ReduceSum", emit.cast(column, dtype_of(wide)), [1], keepdims=1)
    kept = emit("Mul", channels_kept, emit.number(product(rest), dtype_of(wide)))
    normed = emit.cast(_standardized_where(emit, wide, column, kept, [2, 3], eps), dtype_of(x))
    emit.set_dims(normed, dims(wide))
    return _scaled(emit, emit.reshape(normed, dims(x)), weight, bias, channels)


def _single_or_double(emit: Emitter, x: Value) -> Value:
    return x if dtype_of(x) is torch.float64 else emit.cast(x, torch.float32)


def _standardized_where(emit: Emitter, x: Value, mask: Value, kept: Value, axes: list[int], eps: float) -> Value:
    """Return ``x`` with mean 0 and variance 1 over ``axes`` of what the mask keeps, and 0 elsewhere.

    ``kept`` is how many elements that are; 0 counts as 1.
    """
    zero = emit.number(0.0, dtype_of(x))
    number = emit("Max", kept, emit.number(1.0, dtype_of(x)))
    mean = emit("Div", emit("ReduceSum", emit("Where", mask, x, zero), axes, keepdims=1), number)
    centred = emit("Where", mask, emit("Sub", x, mean), zero)
    variance = emit("Div", emit("ReduceSum", emit("Mul", centred, centred), axes, keepdims=1), number)
    return emit("Div", centred, emit("Sqrt", emit("Add", variance, eps)), dims=dims(x))
