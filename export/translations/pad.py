"""Pad, roll and flip: what moves or adds elements along an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxopt.export.emitter import Emitter, Number, Value, dims, dtype_of, rank
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.sizes import Size
from fxopt.export.translations.shape import INT_MAX, axis_of, out_dims_of_flat

__all__ = ["pad_value", "padded", "shifted"]

aten = torch.ops.aten


@translates(aten.pad.default)
def pad(emit: Emitter, x: Value, padding: Sequence[Size], mode: str, value: Number | None) -> Value:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode not in modes:
        raise NotTranslated(f"padding mode {mode!r}")
    return pad_value(emit, x, padding, modes[mode], value)


@translates(aten.constant_pad_nd.default)
def constant_pad(emit: Emitter, x: Value, padding: Sequence[Size], value: Number) -> Value:
    return pad_value(emit, x, padding, "constant", value)


@translates(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def reflection_pad(emit: Emitter, x: Value, padding: Sequence[Size]) -> Value:
    return pad_value(emit, x, padding, "reflect", None)


@translates(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def replication_pad(emit: Emitter, x: Value, padding: Sequence[Size]) -> Value:
    return pad_value(emit, x, padding, "edge", None)


def pad_value(emit: Emitter, x: Value, padding: Sequence[Size], mode: str, value: Number | None) -> Value:
    """Return ``x`` padded. ``padding`` is PyTorch's: (before, after) from the last axis backwards."""
    if all(size == 0 for size in padding):
        return x
    axes = [rank(x) - 1 - i for i in range(len(padding) // 2)]
    before, after = list(padding[0::2]), list(padding[1::2])
    if mode == "wrap" and emit.opset < 19:
        return _wrap(emit, x, axes, before, after)
    if mode != "constant":
        x, before, after = _cropped(emit, x, axes, before, after)
    amounts = {axis: ends for axis, *ends in zip(axes, before, after, strict=True)}
    if all(end == 0 for ends in amounts.values() for end in ends):
        return x
    fill = value if mode == "constant" and value not in (None, 0) else None
    return padded(emit, x, amounts, mode, fill)


def padded(
    emit: Emitter,
    x: Value,
    amounts: Mapping[int, Sequence[Size]],
    mode: str = "constant",
    fill: Number | None = None,
) -> Value:
    """Return ``x`` with so many elements before and after each axis; ``fill`` is 0 if not given.

    The amounts of all axes are written: ORT's layout optimizer permutes them as if they were, and its inference of
    symbolic shapes knows no others.
    """
    ends = [amounts.get(axis, (0, 0)) for axis in range(rank(x))]
    number = None if fill is None else emit.number(fill, dtype_of(x))
    return emit(
        "Pad",
        x,
        [before for before, _ in ends] + [after for _, after in ends],
        number,
        mode=None if mode == "constant" else mode,
    )


def shifted(emit: Emitter, x: Value, step: int, axis: int, fill: Number) -> Value:
    """Return ``x`` moved by ``step`` elements along an axis of static size, with ``fill`` where it was."""
    shape = dims(x)
    kept = [shape[i] - step if i == axis else shape[i] for i in range(rank(x))]
    return padded(emit, emit("Slice", x, [0], [kept[axis]], [axis], dims=kept), {axis: (step, 0)}, fill=fill)


def _cropped(
    emit: Emitter, x: Value, axes: Sequence[int], before: Sequence[Size], after: Sequence[Size]
) -> tuple[Value, list[Size], list[Size]]:
    """Apply negative padding, which crops, and return the padding that is left."""
    rest: tuple[list[Size], list[Size]] = (list(before), list(after))
    for i, axis in enumerate(axes):
        start, stop = (-amount if isinstance(amount, int) and amount < 0 else 0 for amount in (before[i], after[i]))
        if start or stop:
            left = [size - start - stop if at == axis else size for at, size in enumerate(dims(x))]
            x = emit("Slice", x, [start], [-stop if stop else INT_MAX], [axis], dims=left)
            rest[0][i], rest[1][i] = (0 if start else before[i]), (0 if stop else after[i])
    return x, *rest


def _wrap(emit: Emitter, x: Value, axes: Sequence[int], before: Sequence[Size], after: Sequence[Size]) -> Value:
    for axis, left, right in zip(axes, before, after, strict=True):
        pieces = [emit("Slice", x, [-left], [INT_MAX], [axis])] if left != 0 else []
        pieces += [x] + ([emit("Slice", x, [0], [right], [axis])] if right != 0 else [])
        x = emit("Concat", *pieces, axis=axis)
    return x


@translates(aten.roll.default)
def roll(emit: Emitter, x: Value, shifts: Sequence[Size], axes: Sequence[int]) -> Value:
    if not axes:
        flat = emit.reshape(x, out_dims_of_flat(x))
        return emit.reshape(_rolled(emit, flat, shifts[0], 0), dims(x))
    for shift, dim in zip(shifts, axes, strict=True):
        x = _rolled(emit, x, shift, axis_of(dim, rank(x)))
    return x


def _rolled(emit: Emitter, x: Value, shift: Size, axis: int) -> Value:
    size = dims(x)[axis]
    if isinstance(shift, int) and isinstance(size, int) and size:
        shift = shift % size
    elif isinstance(shift, int) and size != 0:
        # The split point is taken modulo the size at run time.
        point = emit("Mod", emit.sizes.vector([-shift]), emit.sizes.vector([size]))
        front = emit("Slice", x, emit.constant(torch.tensor([0])), point, [axis])
        back = emit("Slice", x, point, [INT_MAX], [axis])
        return emit("Concat", back, front, axis=axis, dims=dims(x))
    if shift == 0 or size == 0:
        return x
    back, front = emit("Slice", x, [-shift], [INT_MAX], [axis]), emit("Slice", x, [0], [-shift], [axis])
    return emit("Concat", back, front, axis=axis, dims=dims(x))


@translates(aten.flip.default)
def flip(emit: Emitter, x: Value, axes: Sequence[int]) -> Value:
    if not axes or rank(x) == 0:
        return x
    count = len(axes)
    return emit("Slice", x, [-1] * count, [-INT_MAX] * count, [axis_of(axis, rank(x)) for axis in axes], [-1] * count)
