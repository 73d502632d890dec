"""Gather, Python's indexing with tensors, diagonals and windows."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from fxopt.export.emitter import Emitter, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.sizes import Size, is_static, product
from fxopt.export.translations.shape import axis_of, expand_to, out_dims

aten = torch.ops.aten


def as_index(emit: Emitter, index: Value) -> Value:
    """Return an index tensor in a type that ONNX takes."""
    return index if dtype_of(index) in (torch.int32, torch.int64) else emit.cast(index, torch.int64)


# -- gather ------------------------------------------------------------------------------------------------------


@translates(aten.gather.default)
def gather(emit: Emitter, x: Value, dim: int, index: Value, sparse_grad: bool) -> Value:
    if rank(x) == 0 or rank(index) == 0:
        return emit.reshape(emit("Gather", emit("Reshape", x, [-1]), as_index(emit, index), axis=0), out_dims(emit))
    return emit("GatherElements", x, as_index(emit, index), axis=axis_of(dim, rank(x)))


@translates(aten.take_along_dim.default)
def take_along_dim(emit: Emitter, x: Value, index: Value, dim: int | None) -> Value:
    if dim is None:
        return emit("GatherElements", emit("Reshape", x, [-1]), emit("Reshape", as_index(emit, index), [-1]), axis=0)
    axis = axis_of(dim, rank(x))
    shape = list(out_dims(emit))
    rows = expand_to(emit, x, [*shape[:axis], dims(x)[axis], *shape[axis + 1 :]])
    return emit("GatherElements", rows, expand_to(emit, as_index(emit, index), shape), axis=axis)


@translates(aten.index_select.default)
def index_select(emit: Emitter, x: Value, dim: int, index: Value) -> Value:
    if rank(x) == 0:
        return x
    index = as_index(emit, index)
    return emit("Gather", x, index if rank(index) else emit("Reshape", index, [1]), axis=axis_of(dim, rank(x)))


@translates(aten.take.default)
def take(emit: Emitter, x: Value, index: Value) -> Value:
    return emit("Gather", emit("Reshape", x, [-1]), as_index(emit, index), axis=0)


# -- indexing with tensors -------------------------------------------------------------------------------------------


@translates(aten.index.Tensor)
def index(emit: Emitter, x: Value, indices: Sequence[Value | None]) -> Value:
    """``x[i, :, j]``: one Gather where one axis is indexed, else GatherND on the indexed axes moved to the front."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) == 1:
        axis, only = given[0]
        if dtype_of(only) in (torch.bool, torch.uint8):
            return _masked(emit, x, axis, emit.cast(only, torch.bool))
        return emit("Gather", x, as_index(emit, only), axis=axis)
    axes, columns, shape = index_columns(emit, x, indices)
    rest = [axis for axis in range(rank(x)) if axis not in axes]
    front = emit.transpose(x, [*axes, *rest])
    found = emit("GatherND", front, columns)
    return _restore(emit, found, axes, len(shape), len(rest))


def _masked(emit: Emitter, x: Value, axis: int, mask: Value) -> Value:
    """Return the elements along the axes from ``axis`` on where ``mask`` holds."""
    if rank(mask) == 0:
        raise NotTranslated("a mask without axes")
    shape = dims(x)
    merged = emit.reshape(x, (*shape[:axis], product(shape[axis : axis + rank(mask)]), *shape[axis + rank(mask) :]))
    flat = mask if rank(mask) == 1 else emit("Reshape", mask, [-1])
    return emit("Compress", merged, flat, axis=axis)


def index_columns(
    emit: Emitter, x: Value, indices: Sequence[Value | None]
) -> tuple[list[int], Value, tuple[Size, ...]]:
    """Return the indexed axes, their positions as int64[..., axes], the shape of the index without its last axis."""
    axes: list[int] = []
    columns: list[Value] = []
    axis = 0
    for i in indices:
        if i is None:
            axis += 1
        elif dtype_of(i) in (torch.bool, torch.uint8):
            found = emit("NonZero", emit.cast(i, torch.bool))
            count = _count_of_true(emit, found)
            for row in range(rank(i)):
                columns.append(emit("Gather", found, emit.number(row, torch.int64), axis=0, dims=(count,)))
                axes.append(axis + row)
            axis += rank(i)
        else:
            axes.append(axis)
            columns.append(emit.cast(i, torch.int64))
            columns[-1].meta.setdefault("dims", dims(i))
            axis += 1
    shape = _broadcast([dims(column) for column in columns])
    stacked = [emit("Unsqueeze", expand_to(emit, column, shape), [len(shape)]) for column in columns]
    return axes, stacked[0] if len(stacked) == 1 else emit("Concat", *stacked, axis=len(shape)), shape


def _count_of_true(emit: Emitter, found: Value) -> Size:
    """Return the number of columns of a NonZero result as a symbolic size."""
    symbol = sympy.Dummy("count", integer=True, nonnegative=True)
    emit.scope.sources[symbol] = (found, 1)
    return symbol


def _broadcast(shapes: Sequence[Sequence[Size]]) -> tuple[Size, ...]:
    """Return the shape to which all ``shapes`` broadcast; two dynamic sizes are taken to be equal."""
    longest = max(len(shape) for shape in shapes)
    result: list[Size] = [1] * longest
    for shape in shapes:
        for axis, size in enumerate(shape, longest - len(shape)):
            if result[axis] == 1 or (isinstance(size, int) and size != 1):
                result[axis] = size
    return tuple(result)


def _restore(emit: Emitter, found: Value, axes: Sequence[int], index_axes: int, rest: int) -> Value:
    """Move the axes of the index, which lead, to where the indexed axes were, if those stood side by side."""
    first = axes[0]
    if first == 0 or list(axes) != list(range(first, first + len(axes))):
        return found
    moved = range(index_axes)
    others = range(index_axes, index_axes + rest)
    return emit.transpose(found, [*others[:first], *moved, *others[first:]])


@translates(aten.nonzero.default)
def nonzero(emit: Emitter, x: Value) -> Value:
    if rank(x) == 0:
        found = emit("Transpose", emit("NonZero", emit("Reshape", x, [1])), perm=[1, 0])
        return emit("Slice", found, [0], [0], [1])
    return emit("Transpose", emit("NonZero", x), perm=[1, 0])


@translates(aten.nonzero_numpy.default)
def nonzero_numpy(emit: Emitter, x: Value) -> list[Value]:
    found = emit("NonZero", x)
    return [emit("Gather", found, emit.number(i, torch.int64), axis=0) for i in range(len(emit.out))]


@translates(aten.argwhere.default)
def argwhere(emit: Emitter, x: Value) -> Value:
    return nonzero(emit, x)


@translates(aten.one_hot.default)
def one_hot(emit: Emitter, index: Value, classes: Size) -> Value:
    if classes == -1:
        raise NotTranslated("the number of classes is not given")
    on_off = emit.constant(torch.tensor([0, 1]))
    return emit("OneHot", index, emit.number(classes, torch.int64), on_off, axis=-1)


@translates(aten.diagonal.default, aten.diagonal_copy.default)
def diagonal(emit: Emitter, x: Value, offset: int, first: int, second: int) -> Value:
    """Gather along the flattened pair of axes."""
    a, b = axis_of(first, rank(x)), axis_of(second, rank(x))
    rest = [axis for axis in range(rank(x)) if axis not in (a, b)]
    rows, columns = dims(x)[a], dims(x)[b]
    length = out_dims(emit)[-1]
    if not (isinstance(rows, int) and isinstance(columns, int) and isinstance(length, int)):
        raise NotTranslated("the diagonal of axes of dynamic size")
    flat = _diagonal_positions(offset, columns, length)
    moved = emit.transpose(x, [*rest, a, b])
    merged = emit.reshape(moved, [*[dims(x)[axis] for axis in rest], rows * columns])
    return emit("Gather", merged, emit.constant(flat), axis=len(rest))


@translates(aten.diagonal_scatter.default)
def diagonal_scatter(emit: Emitter, x: Value, source: Value, offset: int, first: int, second: int) -> Value:
    """Write along the flattened pair of axes."""
    a, b = axis_of(first, rank(x)), axis_of(second, rank(x))
    rest = [axis for axis in range(rank(x)) if axis not in (a, b)]
    rows, columns, length = dims(x)[a], dims(x)[b], dims(source)[-1]
    if not (isinstance(rows, int) and isinstance(columns, int) and isinstance(length, int)):
        raise NotTranslated("the diagonal of axes of dynamic size")
    flat = _diagonal_positions(offset, columns, length)
    order = [a, b, *rest]
    merged = emit.reshape(emit.transpose(x, order), [rows * columns, *[dims(x)[axis] for axis in rest]])
    moved = emit.transpose(source, [rank(source) - 1, *range(rank(source) - 1)])
    written = emit("ScatterND", merged, emit.constant(flat[:, None]), moved, dims=dims(merged))
    back = emit.reshape(written, [rows, columns, *[dims(x)[axis] for axis in rest]])
    return emit.transpose(back, [order.index(axis) for axis in range(rank(x))])


def _diagonal_positions(offset: int, columns: int, length: int) -> torch.Tensor:
    """Return where the elements of a diagonal lie in the flattened matrix."""
    steps = torch.arange(length)
    return (steps + max(-offset, 0)) * columns + steps + max(offset, 0)


@translates(aten.repeat_interleave.Tensor)
def repeated_positions(emit: Emitter, repeats: Value, output_size: Size | None) -> Value:
    """Position p belongs to the first entry whose running sum exceeds p."""
    ends = emit("CumSum", emit.cast(repeats, torch.int64), emit.number(0, torch.int64))
    total = emit("ReduceSum", emit.cast(repeats, torch.int64), keepdims=0)
    position = emit("Range", emit.number(0, torch.int64), total, emit.number(1, torch.int64))
    passed = emit("LessOrEqual", ends, emit("Unsqueeze", position, [1]))
    return emit.cast(emit("ReduceSum", emit.cast(passed, torch.int64), [1], keepdims=0), emit.out.dtype)


@translates(aten.unfold.default, aten.unfold_copy.default)
def unfold(emit: Emitter, x: Value, dim: int, size: int, step: int) -> Value:
    """Gather the windows along one axis, and move the axis inside them to the end."""
    if rank(x) == 0:
        return emit.reshape(x, (size,))
    axis = axis_of(dim, rank(x))
    count = out_dims(emit)[axis]
    inside = torch.arange(size)
    if isinstance(count, int):
        positions = emit.constant(torch.arange(count)[:, None] * step + inside)
    else:
        starts = emit(
            "Range", emit.number(0, torch.int64), emit.number(count * step, torch.int64), emit.number(step, torch.int64)
        )
        positions = emit("Add", emit("Unsqueeze", starts, [1]), emit.constant(inside))
    windows = emit("Gather", x, positions, axis=axis)
    return emit.transpose(windows, [*range(axis + 1), *range(axis + 2, rank(x) + 1), axis + 1])


@translates(aten.as_strided.default, aten.as_strided_copy.default)
def as_strided(emit: Emitter, x: Value, shape: Sequence[Size], stride: Sequence[Size], offset: Size | None) -> Value:
    """Gather from the flattened tensor, whose elements lie in memory as they do in ONNX only if it is contiguous."""
    assert emit.node is not None
    held = emit.node.args[0].meta["val"] if isinstance(emit.node.args[0], torch.fx.Node) else None
    if held is None or not held.is_contiguous() or not is_static([*dims(x), *shape, *stride, offset or 0]):
        raise NotTranslated("strides of a tensor that is not contiguous, or of dynamic sizes")
    flat = torch.tensor(int(offset or 0))
    for size, step in zip(shape, stride, strict=True):
        flat = flat.unsqueeze(-1) + torch.arange(int(size)) * int(step)
    return emit("Gather", emit("Reshape", x, [-1]), emit.constant(flat), axis=0)


@translates(aten.linalg_cross.default, aten.cross.default)
def cross(emit: Emitter, x: Value, y: Value, dim: int | None) -> Value:
    shape = out_dims(emit)
    axis = next(i for i, size in enumerate(shape) if size == 3) if dim is None else axis_of(dim, len(shape))
    x, y = (expand_to(emit, emit.cast(value, emit.out.dtype), shape) for value in (x, y))

    def turned(value: Value, order: list[int]) -> Value:
        return emit("Gather", value, emit.constant(torch.tensor(order)), axis=axis)

    ahead, behind = [1, 2, 0], [2, 0, 1]
    return emit(
        "Sub", emit("Mul", turned(x, ahead), turned(y, behind)), emit("Mul", turned(x, behind), turned(y, ahead))
    )
