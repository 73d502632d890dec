"""Embeddings and bags of embeddings."""

from __future__ import annotations

import torch

from fxopt.export.emitter import Emitter, Value, dims, dtype_of
from fxopt.export.registry import translates
from fxopt.export.sizes import Size, as_size, product
from fxopt.export.translations.index import as_index
from fxopt.export.translations.shape import expand_to

aten = torch.ops.aten


@translates(aten.embedding.default)
def embedding(emit: Emitter, weight: Value, index: Value, padding_idx: int, scale_grad: bool, sparse: bool) -> Value:
    return emit("Gather", weight, as_index(emit, index), axis=0)


@translates(aten.embedding_bag.padding_idx)
def embedding_bag_padded(
    emit: Emitter,
    weight: Value,
    index: Value,
    offsets: Value,
    scale_grad: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Value | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> tuple[Value | None, ...]:
    bags = _regular_bags(emit, index, include_last_offset)
    if bags is not None and padding_idx is None:
        return _pool_regular(emit, weight, index, bags, mode, per_sample_weights), None, None, None
    return (
        _pool_ragged(emit, weight, index, offsets, mode, per_sample_weights, include_last_offset, padding_idx),
        None,
        None,
        None,
    )


@translates(aten.embedding_bag.default)
def embedding_bag(
    emit: Emitter,
    weight: Value,
    index: Value,
    offsets: Value,
    scale_grad: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Value | None,
    include_last_offset: bool,
) -> tuple[Value | None, ...]:
    return embedding_bag_padded(
        emit, weight, index, offsets, scale_grad, mode, sparse, per_sample_weights, include_last_offset, None
    )


_SUM, _MEAN, _MAX = range(3)


def _regular_bags(emit: Emitter, index: Value, include_last_offset: bool) -> tuple[Size, Size] | None:
    """Return (bags, length of each) if the offsets are ``arange(0, count of indices, length)``: a matrix of indices."""
    assert emit.node is not None
    offsets = emit.node.args[2] if len(emit.node.args) > 2 else None
    if include_last_offset or not isinstance(offsets, torch.fx.Node) or offsets.target is not aten.arange.start_step:
        return None
    start, end, step = (as_size(a.meta["val"]) if isinstance(a, torch.fx.Node) else a for a in offsets.args[:3])
    count, bags = dims(index)[0], as_size(offsets.meta["val"].shape[0])
    return (bags, step) if start == 0 and end == count and product([bags, step]) == count else None


def _pool_regular(
    emit: Emitter, weight: Value, index: Value, bags: tuple[Size, Size], mode: int, scale: Value | None
) -> Value:
    rows = emit("Gather", weight, as_index(emit, emit.reshape(index, bags)), axis=0)
    if scale is not None:
        rows = emit("Mul", rows, emit.reshape(scale, (*bags, 1)))
    return emit(("ReduceSum", "ReduceMean", "ReduceMax")[mode], rows, [1], keepdims=0)


def _pool_ragged(
    emit: Emitter,
    weight: Value,
    index: Value,
    offsets: Value,
    mode: int,
    scale: Value | None,
    include_last: bool,
    padding: int | None,
) -> Value:
    """Scatter the rows into their bags. A running count of the bags' beginnings tells the bag of each row."""
    dtype, width = dtype_of(weight), dims(weight)[1]
    index, offsets = as_index(emit, index), emit.cast(offsets, torch.int64)
    count, bags = dims(index)[0], as_size(emit.out[0].shape[0])
    if include_last:
        offsets = emit("Slice", offsets, [0], [-1], [0])
    zeros = expand_to(emit, emit.reshape(emit.number(0, torch.int64), (1,)), (count + 1,))
    ones = expand_to(emit, emit.reshape(emit.number(1, torch.int64), (1,)), (bags,))
    begins = emit("ScatterElements", zeros, offsets, ones, axis=0, reduction="add")
    running = emit("Sub", emit("CumSum", begins, emit.number(0, torch.int64)), 1)
    bag = emit("Unsqueeze", emit("Slice", running, [0], [-1], [0]), [1])
    rows = emit("Gather", weight, index, axis=0)
    if scale is not None:
        rows = emit("Mul", rows, emit("Unsqueeze", scale, [1]))
    kept = None
    if padding is not None:
        real = emit("Unsqueeze", emit("Not", emit("Equal", index, padding)), [1])
        kept = emit.cast(real, dtype)
        rows = emit("Where", real, rows, emit.number(-torch.inf if mode == _MAX else 0, dtype))
    start = expand_to(emit, emit.reshape(emit.number(-torch.inf if mode == _MAX else 0, dtype), (1, 1)), (bags, width))
    pooled = emit("ScatterND", start, bag, rows, reduction="max" if mode == _MAX else "add")
    if mode == _SUM:
        return pooled
    counted = kept if kept is not None else expand_to(emit, emit.reshape(emit.number(1, dtype), (1, 1)), (count, 1))
    none = expand_to(emit, emit.reshape(emit.number(0, dtype), (1, 1)), (bags, 1))
    members = emit("ScatterND", none, bag, counted, reduction="add")
    if mode == _MEAN:
        return emit("Div", pooled, emit("Max", members, 1))
    return emit("Where", emit("Equal", members, 0), emit.number(0, dtype), pooled)
