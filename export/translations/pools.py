"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.args import spread
from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, Refused, translates
from fxopt.export.sizes import Size, product
from fxopt.export.translations.convolution import Pair, batched
from fxopt.export.translations.pad import pad_value
from fxopt.export.translations.quantized import is_quantized
from fxopt.export.translations.reduce import LONG_SUM, reduced
from fxopt.export.translations.shape import out_dims
from fxopt.layer_operators import CONVOLUTIONS
from fxopt.quantized_ops import DEQUANTIZE

aten = torch.ops.aten


def _ends(
    emit: Emitter,
    x: Value,
    spatial: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Sequence[Size],
) -> list[int] | None:
    """Return the padding behind each axis that makes every window of a ceil-mode pool full, or None if dynamic."""
    ends = []
    for i in range(spatial):
        size, wanted = dims(x)[rank(x) - spatial + i], out[len(out) - spatial + i]
        if not (isinstance(size, int) and isinstance(wanted, int)):
            return None
        ends.append(max((wanted - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - size - padding[i], 0))
    return ends


def _max_pool(
    emit: Emitter,
    x: Value,
    spatial: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    indices: bool,
) -> tuple[Value, ...]:
    kernels, paddings, dilations = spread(kernel, spatial), spread(padding, spatial), spread(dilation, spatial)
    strides = spread(stride, spatial) if isinstance(stride, int) or stride else kernels
    held = emit.out[0] if isinstance(emit.out, tuple | list) else emit.out
    ends = _ends(
        emit, x, spatial, kernels, strides, paddings, dilations, [s if isinstance(s, int) else None for s in held.shape]
    )
    use_ceil = ceil_mode and (ends is None or any(end >= k for end, k in zip(ends, kernels, strict=True)))
    attributes: dict[str, Any] = {
        "kernel_shape": kernels,
        "strides": strides,
        "dilations": dilations,
        "pads": paddings + (ends if ceil_mode and not use_ceil and ends else paddings),
    }
    lonely = rank(x) == spatial + 1
    batch = emit("Unsqueeze", x, [0]) if lonely else x
    results = emit.many("MaxPool", batch, outputs=2 if indices else 1, ceil_mode=1 if use_ceil else None, **attributes)
    return tuple(emit("Squeeze", result, [0]) for result in results) if lonely else results


def _spatial(emit: Emitter) -> int:
    """Return how many axes the pool of the current node slides along."""
    assert emit.node is not None
    return int(str(emit.node.target).split("pool")[1][0])


@translates(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    emit: Emitter, x: Value, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Value:
    spatial = _spatial(emit)
    shrinks = max(spread(stride or kernel, spatial)) > 1
    # Of a window of maxima the largest is the maximum of both windows' largest, and behind the pool there are fewer.
    parts = (_maximum_of(emit, x) if shrinks else None) or (x,)
    results = [_max_pool(emit, part, spatial, kernel, stride, padding, dilation, ceil_mode, False)[0] for part in parts]
    if len(results) == 1 and _is_quantized_behind_floats(emit):
        # ORT would move the quantizer in front of the pool, and its pool of integers with the channels first is slow:
        # u8[1, 32, 46, 46] 316 us, where f32 takes 6. (one thread, ORT 1.32)
        results.append(emit.number(-math.inf, dtype_of(x)))
    return emit("Max", *results) if len(results) > 1 else results[0]


def _is_quantized_behind_floats(emit: Emitter) -> bool:
    """Return whether the current node's result is quantized, and a layer of floats stands in front of it."""
    assert emit.node is not None
    if emit.runtime != "ort-cpu" or not is_quantized(emit):
        return False
    source = emit.node
    while source.target not in CONVOLUTIONS:
        if source.target is DEQUANTIZE or not source.all_input_nodes:
            return False
        source = source.all_input_nodes[0]
    return True


def _maximum_of(emit: Emitter, x: Value) -> tuple[Value, Value] | None:
    """Return the two values whose maximum ``x`` is, if a ``prelu`` wrote it so and only the current node reads it.

    Not behind integers, whose layout in ORT has the channels last: a pool of floats would turn them around.
    """
    assert emit.node is not None
    source, node = emit.node.args[0], x.producer()
    if not isinstance(source, torch.fx.Node) or source.target is not aten.prelu.default or len(source.users) > 1:
        return None
    if source.all_input_nodes[0].target is DEQUANTIZE:
        return None
    if node is None or node.op_type != "Max" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0], node.inputs[1]


@translates(
    aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default
)
def max_pool_with_indices(
    emit: Emitter, x: Value, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Value, Value]:
    """ONNX counts through the whole tensor, PyTorch through one channel."""
    spatial = _spatial(emit)
    pooled, position = _max_pool(emit, x, spatial, kernel, stride, padding, dilation, ceil_mode, True)
    plane = product(dims(x)[rank(x) - spatial :])
    return pooled, emit("Mod", position, plane)


def _avg_pool(
    emit: Emitter,
    x: Value,
    spatial: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Value:
    if not dtype_of(x).is_floating_point:
        raise Refused("averages of integers, which PyTorch rounds down")
    kernels, paddings = spread(kernel, spatial), spread(padding, spatial)
    strides = spread(stride, spatial) if isinstance(stride, int) or stride else kernels
    if not ceil_mode and divisor is None:
        return batched(
            emit,
            x,
            spatial,
            lambda batch: emit(
                "AveragePool",
                batch,
                kernel_shape=kernels,
                strides=strides,
                pads=paddings * 2,
                count_include_pad=int(count_include_pad) if any(paddings) else None,
            ),
        )
    return _sum_pool(emit, x, kernels, strides, paddings, count_include_pad, divisor)


def _sum_pool(
    emit: Emitter,
    x: Value,
    kernels: list[int],
    strides: list[int],
    paddings: list[int],
    count_include_pad: bool,
    divisor: int | None,
) -> Value:
    """Average windows with PyTorch's divisors: those of a ceil-mode pool leave out what lies behind the padding."""
    spatial = len(kernels)
    ends = _ends(emit, x, spatial, kernels, strides, paddings, [1] * spatial, out_dims(emit))
    if ends is None:
        raise NotTranslated("average pool with ceil_mode or a divisor of its own along a dynamic size")
    padded = pad_value(
        emit, x, [amount for i in reversed(range(spatial)) for amount in (paddings[i], ends[i])], "constant", 0
    )
    padded.meta.setdefault("dims", (*dims(x)[: rank(x) - spatial], *[0] * spatial))
    window = 1
    for size in kernels:
        window *= size
    means = batched(
        emit, padded, spatial, lambda batch: emit("AveragePool", batch, kernel_shape=kernels, strides=strides)
    )
    if divisor is not None:
        return emit("Mul", means, window / divisor)
    ratio = torch.ones(())
    for i in range(spatial):
        size, count = int(dims(x)[rank(x) - spatial + i]), int(out_dims(emit)[rank(x) - spatial + i])
        start = torch.arange(count) * strides[i] - paddings[i]
        stop = torch.minimum(start + kernels[i], torch.tensor(size + paddings[i]))
        if not count_include_pad:
            start, stop = start.clamp(min=0), stop.clamp(max=size)
        ratio = ratio.unsqueeze(-1) * (kernels[i] / (stop - start).double())
    return means if bool((ratio == 1).all()) else emit("Mul", means, emit.constant(ratio.to(emit.out.dtype)))


@translates(aten.avg_pool1d.default)
def avg_pool1d(
    emit: Emitter, x: Value, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, count_include_pad: bool
) -> Value:
    return _avg_pool(emit, x, 1, kernel, stride, padding, ceil_mode, count_include_pad, None)


@translates(aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    emit: Emitter,
    x: Value,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Value:
    spatial = _spatial(emit)
    return _avg_pool(emit, x, spatial, kernel, stride, padding, ceil_mode, count_include_pad, divisor)


# -- adaptive pooling ------------------------------------------------------------------------------------------------


@translates(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
            aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)  # fmt: skip
def adaptive_avg_pool(emit: Emitter, x: Value, output_size: Pair) -> Value:
    spatial = _spatial(emit)
    outs = list(out_dims(emit)[rank(x) - spatial :])
    sizes = list(dims(x)[rank(x) - spatial :])
    if outs == sizes:
        return x
    if outs == [1] * spatial:
        count = product(sizes)
        if isinstance(count, int) and count > LONG_SUM and not is_quantized(emit):
            return reduced(emit, "ReduceMean", x, list(range(-spatial, 0)), True)
        return batched(emit, x, spatial, lambda batch: emit("GlobalAveragePool", batch))
    if all(isinstance(s, int) and isinstance(o, int) and s % o == 0 for s, o in zip(sizes, outs, strict=True)):
        steps = [int(s) // int(o) for s, o in zip(sizes, outs, strict=True)]
        return batched(emit, x, spatial, lambda batch: emit("AveragePool", batch, kernel_shape=steps, strides=steps))
    for i, (size, out) in enumerate(zip(sizes, outs, strict=True)):
        if size != out:
            x = _averaged_along(emit, x, rank(x) - spatial + i, size, out)
    return x


def _averaged_along(emit: Emitter, x: Value, axis: int, size: Size, out: Size) -> Value:
    """Average windows of uneven length along one axis: a product with the matrix of their weights."""
    last = rank(x) - 1
    order = list(range(rank(x)))
    order[axis], order[last] = last, axis
    shape = list(dims(x))
    shape[axis] = out
    product_ = emit(
        "MatMul", emit.transpose(x, order), _window_weights(emit, size, out), dims=[shape[a] for a in order]
    )
    return emit.transpose(product_, order)


def _window_weights(emit: Emitter, size: Size, out: Size) -> Value:
    """Return f[size, out]: the weight of each element in each adaptive window, computed at run time if dynamic."""
    dtype = emit.out.dtype
    if isinstance(size, int) and isinstance(out, int):
        places, windows = torch.arange(size)[:, None], torch.arange(out)
        first, last = windows * size // out, ((windows + 1) * size + out - 1) // out
        covered = (places >= first) & (places < last)
        return emit.constant((covered / (last - first)).to(dtype))
    zero, one = emit.number(0, torch.int64), emit.number(1, torch.int64)
    position = emit("Unsqueeze", emit("Range", zero, emit.number(size, torch.int64), one), [1])
    window = emit("Range", zero, emit.number(out, torch.int64), one)
    total, count = emit.number(size, torch.int64), emit.number(out, torch.int64)
    start = emit("Div", emit("Mul", window, total), count)
    ahead = emit("Mul", emit("Add", window, one), total)
    stop = emit("Div", emit("Sub", emit("Add", ahead, count), one), count)
    inside = emit("And", emit("GreaterOrEqual", position, start), emit("Less", position, stop))
    return emit("Div", emit.cast(inside, dtype), emit.cast(emit("Sub", stop, start), dtype))


@translates(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(emit: Emitter, x: Value, output_size: Pair) -> tuple[Value | None, ...]:
    spatial = _spatial(emit)
    sizes, outs = dims(x)[rank(x) - spatial :], spread(output_size, spatial)
    if outs == [1] * spatial and not all(isinstance(size, int) for size in sizes):
        pooled = batched(emit, x, spatial, lambda batch: emit("GlobalMaxPool", batch))
        flat = emit.reshape(x, (*dims(x)[: rank(x) - spatial], product(sizes)))
        position = emit("ArgMax", flat, axis=rank(flat) - 1, keepdims=0)
        return pooled, emit.reshape(position, (*dims(x)[: rank(x) - spatial], *outs))
    if not all(isinstance(size, int) for size in sizes):
        raise NotTranslated("adaptive max pool along a dynamic size to more than one element")
    if any(int(size) % out for size, out in zip(sizes, outs, strict=True)):
        for i, (size, out) in enumerate(zip(sizes, outs, strict=True)):
            x = _largest_along(emit, x, rank(x) - spatial + i, int(size), out)
        return x, None
    steps = [int(s) // o for s, o in zip(sizes, outs, strict=True)]
    pooled, position = _max_pool(emit, x, spatial, steps, steps, 0, 1, False, True)
    return pooled, emit("Mod", position, product(sizes))


def _largest_along(emit: Emitter, x: Value, axis: int, size: int, out: int) -> Value:
    """Take the largest element of each window of uneven length along one axis."""
    if size == out:
        return x
    windows = [(i * size // out, -((i + 1) * size // -out)) for i in range(out)]
    shape = [*dims(x)[:axis], out, *dims(x)[axis + 1 :]]
    pieces = [
        emit("ReduceMax", emit("Slice", x, [start], [stop], [axis]), [axis], keepdims=1, dims=shape)
        for start, stop in windows
    ]
    return pieces[0] if out == 1 else emit("Concat", *pieces, axis=axis, dims=shape)
