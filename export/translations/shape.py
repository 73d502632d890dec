"""Views and layouts: reshape, permute, expand, join, split, pad. Known sizes leave no arithmetic in the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.sizes import Size, as_size, is_static
from fxopt.export.translations.elementwise import out_dtype, where_value

aten = torch.ops.aten
INT_MAX = 2**63 - 1


def out_dims(emit: Emitter) -> tuple[Size, ...]:
    """Return the shape of what the current node yields."""
    return tuple(as_size(size) for size in emit.out.shape)


def axis_of(dim: int, axes: int) -> int:
    """Return ``dim`` as a non-negative axis of a tensor with ``axes`` axes."""
    return dim % max(axes, 1)


# -- reshape ---------------------------------------------------------------------------------------------------------


def _reshape(emit: Emitter, x: Value, *_: Any) -> Value:
    """Return ``x`` in the shape that the node yields."""
    return emit.reshape(x, out_dims(emit))


translates(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.view_as.default, aten.reshape_as.default, aten.ravel.default, aten._reshape_copy.default,
    aten.view_copy.default, aten._reshape_alias.default, aten.atleast_1d.default, aten.atleast_2d.default,
    aten.atleast_3d.default,
)(_reshape)  # fmt: skip


@translates(aten.unsqueeze.default, aten.unsqueeze_copy.default)
def unsqueeze(emit: Emitter, x: Value, dim: int) -> Value:
    return emit("Unsqueeze", x, [dim % (rank(x) + 1)])


def _squeeze(emit: Emitter, x: Value, *_: Any) -> Value:
    """Return ``x`` without those axes of size 1 that the node removes."""
    wanted = list(out_dims(emit))
    if len(wanted) == rank(x):
        return x
    axes, remaining = [], list(wanted)
    for axis, size in enumerate(dims(x)):
        left = rank(x) - axis
        if remaining and remaining[0] == size and not (size == 1 and left > len(remaining)):
            remaining.pop(0)
        else:
            axes.append(axis)
    return emit("Squeeze", x, axes)


@translates(aten.squeeze.dim, aten.squeeze.dims)
def squeeze_dims(emit: Emitter, x: Value, dim: int | Sequence[int]) -> Value:
    chosen = [dim] if isinstance(dim, int) else dim
    axes = sorted({axis for axis in (axis_of(d, rank(x)) for d in chosen) if rank(x) and dims(x)[axis] == 1})
    return emit("Squeeze", x, axes) if axes else x


@translates(aten.squeeze.default)
def squeeze(emit: Emitter, x: Value) -> Value:
    axes = [axis for axis, size in enumerate(dims(x)) if size == 1]
    return emit("Squeeze", x, axes) if axes else x


# -- permute ---------------------------------------------------------------------------------------------------------


@translates(aten.permute.default, aten.permute_copy.default)
def permute(emit: Emitter, x: Value, order: Sequence[int]) -> Value:
    return emit.transpose(x, [axis_of(axis, rank(x)) for axis in order])


@translates(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.transpose_copy.int)
def transpose(emit: Emitter, x: Value, first: int, second: int) -> Value:
    order = list(range(rank(x)))
    if order:
        first, second = axis_of(first, rank(x)), axis_of(second, rank(x))
        order[first], order[second] = order[second], order[first]
    return emit.transpose(x, order)


@translates(
    aten.t.default, aten.numpy_T.default, aten.adjoint.default, aten.mT.default, aten.mH.default, aten.matrix_H.default
)
def reverse_axes(emit: Emitter, x: Value) -> Value:
    assert emit.node is not None
    if emit.node.target in (aten.t.default, aten.numpy_T.default):
        return emit.transpose(x, list(reversed(range(rank(x)))))
    return transpose(emit, x, -2, -1)


@translates(aten.movedim.intlist, aten.moveaxis.intlist)
def movedim(emit: Emitter, x: Value, source: Sequence[int], destination: Sequence[int]) -> Value:
    sources = [axis_of(axis, rank(x)) for axis in source]
    targets = [axis_of(axis, rank(x)) for axis in destination]
    rest = iter(axis for axis in range(rank(x)) if axis not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return emit.transpose(x, [placed[axis] if axis in placed else next(rest) for axis in range(rank(x))])


@translates(aten.movedim.int, aten.moveaxis.int)
def movedim_one(emit: Emitter, x: Value, source: int, destination: int) -> Value:
    return movedim(emit, x, [source], [destination])


# -- expand and repeat -----------------------------------------------------------------------------------------------


def expand_to(emit: Emitter, x: Value, shape: Sequence[Size]) -> Value:
    """Return ``x`` broadcast to ``shape``; axes that keep their size ask for no arithmetic."""
    shape = tuple(shape)
    held = (1,) * (len(shape) - rank(x)) + dims(x)
    if dims(x) == shape:
        return x
    return emit("Expand", x, [1 if size == now else size for size, now in zip(shape, held, strict=True)], dims=shape)


def _expand(emit: Emitter, x: Value, *_: Any) -> Value:
    return expand_to(emit, x, out_dims(emit))


translates(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.expand_copy.default)(_expand)


@translates(aten.broadcast_tensors.default)
def broadcast_tensors(emit: Emitter, tensors: Sequence[Value]) -> list[Value]:
    shape = tuple(as_size(size) for size in emit.out[0].shape)
    return [expand_to(emit, tensor, shape) for tensor in tensors]


@translates(aten.repeat.default, aten.tile.default)
def repeat(emit: Emitter, x: Value, repeats: Sequence[Size]) -> Value:
    axes = max(len(repeats), rank(x))
    repeats = [1] * (axes - len(repeats)) + list(repeats)
    x = emit.reshape(x, (1,) * (axes - rank(x)) + dims(x))
    if all(count == 1 for count in repeats):
        return x
    if all(count == 1 or size == 1 for count, size in zip(repeats, dims(x), strict=True)):
        return expand_to(emit, x, out_dims(emit))
    return emit("Tile", x, list(repeats))


@translates(aten.repeat_interleave.self_int)
def repeat_interleave(emit: Emitter, x: Value, repeats: Size, dim: int | None, output_size: Size | None) -> Value:
    if dim is None:
        x, dim = emit.reshape(x, out_dims_of_flat(x)), 0
    axis = axis_of(dim, rank(x))
    shape = list(dims(x))
    spread = emit("Unsqueeze", x, [axis + 1], dims=[*shape[: axis + 1], 1, *shape[axis + 1 :]])
    spread = expand_to(emit, spread, [*shape[: axis + 1], repeats, *shape[axis + 1 :]])
    return emit.reshape(spread, out_dims(emit))


def out_dims_of_flat(x: Value) -> tuple[Size]:
    """Return the shape of ``x`` flattened."""
    total: Size = 1
    for size in dims(x):
        total = total * size
    return (total,)


# -- join and split --------------------------------------------------------------------------------------------------


@translates(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(emit: Emitter, tensors: Sequence[Value], dim: int) -> Value:
    dtype = out_dtype(emit)
    # A one-dimensional empty tensor may be joined to anything.
    joined = [emit.cast(t, dtype) for t in tensors if dims(t) != (0,) or len(out_dims(emit)) == 1]
    return joined[0] if len(joined) == 1 else emit("Concat", *joined, axis=axis_of(dim, rank(joined[0])))


@translates(aten.stack.default)
def stack(emit: Emitter, tensors: Sequence[Value], dim: int) -> Value:
    dtype, axis = out_dtype(emit), axis_of(dim, rank(tensors[0]) + 1)
    return emit("Concat", *[emit("Unsqueeze", emit.cast(t, dtype), [axis]) for t in tensors], axis=axis)


def _split(emit: Emitter, x: Value, axis: int) -> Sequence[Value]:
    """Return the parts whose sizes along ``axis`` are those that the node yields."""
    parts = [as_size(part.shape[axis]) for part in emit.out]
    if len(parts) == 1:
        return [x]
    return emit.many("Split", x, parts, outputs=len(parts), axis=axis)


@translates(
    aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default, aten.tensor_split.sections, aten.tensor_split.indices, aten.split_copy.Tensor,
)  # fmt: skip
def split(emit: Emitter, x: Value, _how: object, dim: int) -> Sequence[Value]:
    return _split(emit, x, axis_of(dim, rank(x)))


@translates(aten.hsplit.int, aten.vsplit.int, aten.dsplit.int)
def named_split(emit: Emitter, x: Value, _sections: int) -> Sequence[Value]:
    assert emit.node is not None
    axis = {"hsplit": min(1, rank(x) - 1), "vsplit": 0, "dsplit": 2}[emit.node.target._opname]  # type: ignore[union-attr]  # an operator, by its registration
    return _split(emit, x, axis)


@translates(aten.unbind.int, aten.unbind_copy.int)
def unbind(emit: Emitter, x: Value, dim: int) -> list[Value]:
    axis = axis_of(dim, rank(x))
    return [emit("Gather", x, emit.number(i, torch.int64), axis=axis) for i in range(len(emit.out))]


# -- slices ----------------------------------------------------------------------------------------------------------


@translates(aten.slice.Tensor, aten.slice_copy.Tensor)
def slice_(emit: Emitter, x: Value, dim: int, start: Size | None, end: Size | None, step: int) -> Value:
    axis = axis_of(dim, rank(x))
    start = 0 if start is None else start
    end = INT_MAX if end is None or (isinstance(end, int) and end >= INT_MAX) else end
    if start == 0 and step == 1 and (end in (INT_MAX, dims(x)[axis]) or dims(x) == out_dims(emit)):
        return x
    return emit("Slice", x, [start], [end], [axis], None if step == 1 else [step])


@translates(aten.narrow.default)
def narrow(emit: Emitter, x: Value, dim: int, start: Size, length: Size) -> Value:
    axis = axis_of(dim, rank(x))
    if isinstance(start, int) and start < 0:
        start = start + dims(x)[axis]
    end = start + length
    return slice_(emit, x, dim, start, end, 1)


@translates(aten.select.int, aten.select_copy.int)
def select(emit: Emitter, x: Value, dim: int, index: Size) -> Value:
    return emit("Gather", x, emit.number(index, torch.int64), axis=axis_of(dim, rank(x)))


@translates(aten.slice_scatter.default)
def slice_scatter(
    emit: Emitter, x: Value, source: Value, dim: int, start: Size | None, end: Size | None, step: int
) -> Value:
    axis, size = axis_of(dim, rank(x)), dims(x)[axis_of(dim, rank(x))]
    source = emit.cast(source, dtype_of(x))
    if (start in (None, 0)) and step == 1 and dims(source) == dims(x):
        return source
    if isinstance(size, int) and isinstance(start, int | None) and isinstance(end, int | None):
        chosen = range(size)[slice(start, end, step)]
        if step == 1 and len(chosen):
            return _joined(emit, x, source, axis, chosen.start, chosen.stop)
        return _scatter_along(emit, x, source, emit.constant(torch.tensor(list(chosen), dtype=torch.int64)), axis)
    positions = emit("Range", emit.number(0, torch.int64), emit.number(size, torch.int64), emit.number(1, torch.int64))
    kept = emit("Slice", positions, [start or 0], [INT_MAX if end is None else end], [0], [step])
    return _scatter_along(emit, x, source, kept, axis)


def _joined(emit: Emitter, x: Value, source: Value, axis: int, start: int, stop: int) -> Value:
    """Return ``x`` with ``source`` between ``start`` and ``stop``: joined from what is before, it, what is after."""
    pieces = [emit("Slice", x, [0], [start], [axis])] if start else []
    pieces.append(source)
    if stop != dims(x)[axis]:
        pieces.append(emit("Slice", x, [stop], [INT_MAX], [axis]))
    return source if len(pieces) == 1 else emit("Concat", *pieces, axis=axis)


@translates(aten.select_scatter.default)
def select_scatter(emit: Emitter, x: Value, source: Value, dim: int, index: Size) -> Value:
    axis = axis_of(dim, rank(x))
    if isinstance(index, int) and index < 0:
        index = index + dims(x)[axis]
    shape = list(dims(source))
    source = emit("Unsqueeze", emit.cast(source, dtype_of(x)), [axis], dims=[*shape[:axis], 1, *shape[axis:]])
    if isinstance(index, int) and isinstance(dims(x)[axis], int):
        return _joined(emit, x, source, axis, index, index + 1)
    return _scatter_along(emit, x, source, emit.sizes.vector([index]), axis)


def _scatter_along(emit: Emitter, x: Value, source: Value, positions: Value, axis: int) -> Value:
    """Return ``x`` with the slices at ``positions`` along ``axis`` replaced by those of ``source``."""
    order = [axis, *(a for a in range(rank(x)) if a != axis)]
    back = [order.index(a) for a in range(rank(x))]
    rows = emit("Unsqueeze", positions, [1])
    return emit.transpose(emit("ScatterND", emit.transpose(x, order), rows, emit.transpose(source, order)), back)


# -- triangles and diagonals -----------------------------------------------------------------------------------------


def _triangle(emit: Emitter, x: Value, diagonal: Size, upper: int) -> Value:
    return emit("Trilu", x, None if diagonal == 0 else emit.number(diagonal, torch.int64), upper=upper)


@translates(aten.tril.default)
def tril(emit: Emitter, x: Value, diagonal: Size) -> Value:
    return _triangle(emit, x, diagonal, 0)


@translates(aten.triu.default)
def triu(emit: Emitter, x: Value, diagonal: Size) -> Value:
    return _triangle(emit, x, diagonal, 1)


@translates(aten.pixel_shuffle.default)
def pixel_shuffle(emit: Emitter, x: Value, factor: int) -> Value:
    if rank(x) != 4 or not dtype_of(x).is_floating_point:
        raise NotTranslated("only tensors with four axes")
    return emit("DepthToSpace", x, blocksize=factor, mode="CRD")


@translates(aten.pixel_unshuffle.default)
def pixel_unshuffle(emit: Emitter, x: Value, factor: int) -> Value:
    *lead, channels, _, _ = dims(x)
    *_, out_height, out_width = out_dims(emit)
    count = len(lead)
    split_axes = emit.reshape(x, (*lead, channels, out_height, factor, out_width, factor))
    order = [*range(count), count, count + 2, count + 4, count + 1, count + 3]
    return emit.reshape(emit.transpose(split_axes, order), out_dims(emit))


@translates(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(emit: Emitter, x: Value, groups: int) -> Value:
    batch, channels, *rest = dims(x)
    grouped = emit.reshape(x, (batch, groups, channels // groups, *rest))
    order = [0, 2, 1, *range(3, rank(x) + 1)]
    return emit.reshape(emit.transpose(grouped, order), dims(x))


@translates(aten.masked_select.default)
def masked_select(emit: Emitter, x: Value, mask: Value) -> Value:
    shape = (
        tuple(as_size(size) for size in torch.broadcast_shapes(emit_shape(x), emit_shape(mask)))
        if is_static(dims(x) + dims(mask))
        else None
    )
    if shape is None and dims(x) != dims(mask):
        raise NotTranslated("mask and tensor have different dynamic shapes")
    shape = shape or dims(x)
    flat = emit("Reshape", expand_to(emit, x, shape), [-1])
    return emit("Compress", flat, emit("Reshape", expand_to(emit, mask, shape), [-1]), axis=0)


def emit_shape(x: Value) -> tuple[int, ...]:
    """Return the shape of ``x``, whose sizes must be known."""
    return tuple(int(size) for size in dims(x))


__all__ = ["axis_of", "expand_to", "out_dims", "where_value"]
