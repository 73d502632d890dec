"""Scaled dot-product attention, as matrix products that ORT fuses with their scale and transposition."""

from __future__ import annotations

import math

import torch

from fxopt.attention_ops import MULTI_HEAD_ATTENTION
from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, Refused, translates
from fxopt.export.sizes import Size
from fxopt.export.translations.shape import expand_to

aten = torch.ops.aten


@translates(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    emit: Emitter,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Value:
    if dropout_p > 0:
        raise Refused("attention with dropout: the graph is in train mode")
    width = dims(query)[-1]
    if scale is None and not isinstance(width, int):
        raise NotTranslated("the width of a head is dynamic, and no scale is given")
    factor = 1 / math.sqrt(width) if scale is None else scale
    if enable_gqa:
        key, value = _for_each_query_head(emit, key, query), _for_each_query_head(emit, value, query)
    if is_causal:
        mask = _causal_mask(emit, dims(query)[-2], dims(key)[-2])
    axes = rank(key)
    turned = emit.transpose(key, [*range(axes - 2), axes - 1, axes - 2])
    scores = emit("MatMul", emit("Mul", query, factor), turned)
    if mask is None:
        return emit("MatMul", emit("Softmax", scores, axis=-1), value)
    weights = emit("Softmax", _masked(emit, scores, mask), axis=-1)
    result = emit("MatMul", weights, value)
    return result if is_causal else _zero_where_all_is_masked(emit, result, mask)


@translates(MULTI_HEAD_ATTENTION)
def multi_head_attention(
    emit: Emitter,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    heads: int,
    scale: float | None,
    is_causal: bool,
) -> Value:
    """ORT's own operator, which takes a mask that is added, of all rows and columns."""
    lengths = dims(query)[1], dims(key)[1]
    seen = _causal_mask(emit, *lengths) if is_causal else mask
    added = None if seen is None else emit.once(("bias", id(seen), lengths), lambda: _bias(emit, seen, *lengths))
    shape = (*dims(query)[:2], dims(value)[2])
    inputs = (query, key, value) if added is None else (query, key, value, None, None, added)
    result = emit("MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=heads, scale=scale, dims=shape)
    return result if mask is None else _zero_where_all_is_masked(emit, result, mask, heads_apart=False)


def _bias(emit: Emitter, mask: Value, rows: Size, columns: Size) -> Value:
    """Return f32[batch or 1, 1, rows, columns]."""
    added = _added(emit, mask, torch.float32)
    batch = (1, 1) if rank(mask) == 2 else dims(mask)[:2]
    wide = added if dims(mask)[-2:] == (rows, columns) else expand_to(emit, added, (*dims(mask)[:-2], rows, columns))
    return emit.reshape(wide, (*batch, rows, columns))


def _masked(emit: Emitter, scores: Value, mask: Value) -> Value:
    """Return the scores with masked ones far below all others."""
    return emit("Add", scores, _added(emit, mask, dtype_of(scores)))


def _added(emit: Emitter, mask: Value, dtype: torch.dtype) -> Value:
    """Return the mask as floats to add: very low ones, but finite, so that no NaN can come of them."""
    if dtype_of(mask) is not torch.bool:
        return emit.cast(mask, dtype)
    lowest, zero = emit.number(torch.finfo(dtype).min, dtype), emit.number(0.0, dtype)
    return emit.once(("added mask", id(mask), dtype), lambda: emit("Where", mask, zero, lowest, dims=dims(mask)))


def _zero_where_all_is_masked(emit: Emitter, result: Value, mask: Value, *, heads_apart: bool = True) -> Value:
    """Return zeros for a query that may attend to nothing, as PyTorch does.

    The heads of the result lie along its second axis, or else side by side along the last of three.
    """
    zero, squeezed = emit.number(0.0, dtype_of(result)), not heads_apart and rank(mask) == 4

    def of_row(found: Value) -> Value:
        return emit("Squeeze", found, [1]) if squeezed else found

    if dtype_of(mask) is torch.bool:
        seen = mask if emit.opset >= 20 else emit.cast(mask, torch.int32)
        key = ("any key", id(mask), squeezed)
        return emit("Where", emit.once(key, lambda: of_row(emit.cast(_largest(emit, seen), torch.bool))), result, zero)
    key = ("no key", id(mask), squeezed)
    none = emit.once(key, lambda: of_row(emit("Equal", _largest(emit, mask), -math.inf)))
    return emit("Where", none, zero, result)


def _largest(emit: Emitter, mask: Value) -> Value:
    if emit.opset >= 18:
        return emit("ReduceMax", mask, [-1], keepdims=1)
    return emit("ReduceMax", mask, axes=[-1], keepdims=1)


def _causal_mask(emit: Emitter, rows: Size, columns: Size) -> Value:
    """Return bool[rows, columns]: whether a column is not after the row."""
    if isinstance(rows, int) and isinstance(columns, int):
        return emit.constant(torch.ones(rows, columns, dtype=torch.bool).tril())

    def compare() -> Value:
        zero, one = emit.number(0, torch.int64), emit.number(1, torch.int64)
        row = emit("Unsqueeze", emit("Range", zero, emit.number(rows, torch.int64), one), [1])
        column = emit("Range", zero, emit.number(columns, torch.int64), one)
        return emit("GreaterOrEqual", row, column, dims=(rows, columns))

    return emit.once(("causal mask", rows, columns), compare)


def _for_each_query_head(emit: Emitter, x: Value, query: Value) -> Value:
    """Repeat the heads of keys or values so that there is one for each head of the query."""
    *batch, heads, length, width = dims(x)
    wanted = dims(query)[-3]
    if heads == wanted:
        return x
    if not (isinstance(heads, int) and isinstance(wanted, int)):
        raise NotTranslated("the number of heads is dynamic")
    grouped = emit.reshape(x, (*batch, heads, 1, length, width))
    return emit.reshape(
        expand_to(emit, grouped, (*batch, heads, wanted // heads, length, width)), (*batch, wanted, length, width)
    )
