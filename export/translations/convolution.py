"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.args import spread
from fxopt.export.emitter import Emitter, Value, dims, rank
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.sizes import Size
from fxopt.export.translations.integer_product import integer_convolution
from fxopt.export.translations.quantized import is_quantized

aten = torch.ops.aten
Pair = int | Sequence[int]


def batched(emit: Emitter, x: Value, spatial: int, run: Callable[[Value], Value]) -> Value:
    """Return ``run(x)``, with a batch axis around it if ``x`` has none."""
    if rank(x) == spatial + 2:
        return run(x)
    return emit("Squeeze", run(emit("Unsqueeze", x, [0], dims=(1, *dims(x)))), [0])


@translates(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def conv(
    emit: Emitter, x: Value, weight: Value, bias: Value | None, stride: Pair, padding: Any, dilation: Pair, groups: int
) -> Value:
    spatial = rank(weight) - 2
    dilations = spread(dilation, spatial)
    kernel = _static(dims(weight)[2:])
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = spread(padding, spatial) * 2
    strides = spread(stride, spatial)
    # Where a quantizer reads the result, ORT has a kernel from integers to integers.
    if groups == 1 and rank(x) == spatial + 2 and not is_quantized(emit, behind_limits=True):
        product = integer_convolution(emit, x, weight, bias, strides=strides, pads=pads, dilations=dilations)
        if product is not None:
            return product
    return batched(
        emit,
        x,
        spatial,
        lambda batch: emit(
            "Conv",
            batch,
            weight,
            bias,
            kernel_shape=kernel,
            strides=strides,
            pads=pads,
            dilations=dilations,
            group=groups,
        ),
    )


@translates(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    emit: Emitter,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    groups: int,
    dilation: Pair,
) -> Value:
    spatial = rank(weight) - 2
    paddings, extra = spread(padding, spatial), spread(output_padding, spatial)
    # Padding behind crops the output, output_padding shows more of it: what they share cancels.
    ends = [max(p - e, 0) for p, e in zip(paddings, extra, strict=True)]
    more = [max(e - p, 0) for p, e in zip(paddings, extra, strict=True)]
    return batched(
        emit,
        x,
        spatial,
        lambda batch: emit(
            "ConvTranspose",
            batch,
            weight,
            bias,
            kernel_shape=_static(dims(weight)[2:]),
            strides=spread(stride, spatial),
            pads=paddings + ends,
            output_padding=more if any(more) else None,
            dilations=spread(dilation, spatial),
            group=groups,
        ),
    )


@translates(aten.convolution.default)
def convolution(
    emit: Emitter,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    transposed: bool,
    output_padding: Pair,
    groups: int,
) -> Value:
    if transposed:
        return conv_transpose(emit, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(emit, x, weight, bias, stride, padding, dilation, groups)


def _static(sizes: Sequence[Size]) -> list[int]:
    if not all(isinstance(size, int) for size in sizes):
        raise NotTranslated("the kernel has a dynamic size")
    return [int(size) for size in sizes]
