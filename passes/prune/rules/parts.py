"""Operators that read or write a part of an axis, or make it longer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fxopt.args import arg, tensor_arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten


@handles(aten.select.int)
class _Select(Rule):
    """One index of an axis is read, and stays; the other indices of it are free to go."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, index = tensor_arg(node, "self"), arg(node, "index")
        dim = arg(node, "dim") % structure.rank(source)
        axis = structure.axis(source, dim)
        if axis is not None:
            read = axis[index : index + 1 or None] if isinstance(index, int) else axis
            structure.pin(read, "it is read by its number")
        for other in range(structure.rank(node)):
            structure.move_axis(source, other + (other >= dim), node, other)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        source, index = tensor_arg(node, "self"), arg(node, "index")
        axis = cut.structure.axis(source, arg(node, "dim"))
        if axis is not None and isinstance(index, int) and cut.loses(axis):
            cut.set_arg(node, "index", cut.kept_before(axis, index % len(axis)))


def _bounds(node: torch.fx.Node, size: int) -> tuple[int, int, int] | None:
    """Return start, end and step of a part of an axis of a fixed size, or None if they are computed."""
    if node.target is aten.narrow.default:
        start, length, step = arg(node, "start"), arg(node, "length"), 1
        if not isinstance(start, int) or not isinstance(length, int):
            return None
        start += size if start < 0 else 0
        return start, start + length, step
    start, end, step = (arg(node, name) for name in ("start", "end", "step"))
    if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
        return None
    return slice(start, end, step).indices(size)


@handles(aten.slice.Tensor, aten.narrow.default)
class _Slice(Rule):
    """The indices of a part are indices of the whole; those that no part reads are free to go."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        dim = arg(node, "dim") % structure.rank(source)
        for other in range(structure.rank(node)):
            if other != dim:
                structure.move_axis(source, other, node, other)
        whole, part = structure.axis(source, dim), structure.axis(node, dim)
        bounds = None if whole is None else _bounds(node, len(whole))
        if whole is None:
            structure.pin(part, "it is part of a size that is not fixed")
        elif bounds is None:
            structure.pin(whole, "a part of it is read whose bounds are computed")
            structure.pin(part, "its bounds are computed")
        elif part is None:
            structure.pin(whole[slice(*bounds)], "it is read by its number")
        else:
            structure.move(whole[slice(*bounds)], part)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        source = tensor_arg(node, "self")
        dim = arg(node, "dim") % cut.structure.rank(source)
        axis = cut.structure.axis(source, dim)
        bounds = None if axis is None else _bounds(node, len(axis))
        if axis is None or bounds is None or not cut.loses(axis):
            return
        start, end, step = bounds
        first, last = cut.kept_before(axis, start), cut.kept_before(axis, max(start, end))
        if node.target is aten.narrow.default:
            cut.set_arg(node, "start", first)
            cut.set_arg(node, "length", last - first)
        elif step == 1:
            cut.set_arg(node, "start", first)
            cut.set_arg(node, "end", last)
        else:
            places = [cut.kept_before(axis, at) for at in range(start, end, step) if cut.keeps(axis[at])]
            index = cut.constant(node, "index", torch.tensor(places, device=cut.structure.value(source).device))
            cut.set_call(node, aten.index_select.default, (source, dim, index))


@handles(aten.slice_scatter.default)
class _SliceScatter(Rule):
    """A part of an axis is written: its indices are indices of the whole."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        base, part = tensor_arg(node, "self"), tensor_arg(node, "src")
        dim = arg(node, "dim") % structure.rank(base)
        for other in range(structure.rank(node)):
            structure.same(structure.axis(base, other), structure.axis(node, other))
            if other != dim:
                structure.same(structure.axis(part, other), structure.axis(node, other))
        whole, written = structure.axis(base, dim), structure.axis(part, dim)
        bounds = None if whole is None else _bounds(node, len(whole))
        if whole is None or bounds is None or written is None:
            structure.pin(whole, "a part of it is written")
            structure.pin(written, "it is written into a part")
        elif bounds[2] != 1:
            structure.pin(whole, "a part of it is written in steps")
            structure.pin(written, "it is written in steps")
        else:
            structure.same(whole[slice(*bounds)], written)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """An index holds what the part holds, or the base, or the same constant of both."""
        structure, base, part = constants.structure, tensor_arg(node, "self"), tensor_arg(node, "src")
        dim = arg(node, "dim") % structure.rank(base)
        for other, axis in enumerate(structure.axes(node)):
            if axis is None:
                continue
            values = constants.along(base, other - structure.rank(base), len(axis)).copy()
            if other != dim:
                written = constants.along(part, other - structure.rank(part), len(axis))
                values = np.where(values == written, values, np.nan)
            elif (bounds := _bounds(node, len(axis))) is None:
                values[:] = np.nan
            else:
                count = len(range(*bounds))
                values[slice(*bounds)] = constants.along(part, other - structure.rank(part), count)
            constants.values[axis] = values

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        axis = cut.structure.axis(tensor_arg(node, "self"), arg(node, "dim"))
        bounds = None if axis is None else _bounds(node, len(axis))
        if axis is not None and bounds is not None and cut.loses(axis):
            cut.set_arg(node, "start", cut.kept_before(axis, bounds[0]))
            cut.set_arg(node, "end", cut.kept_before(axis, max(bounds[:2])))


@handles(aten.pad.default, aten.constant_pad_nd.default)
class _Pad(Rule):
    """Padding with a number makes new indices, which may go like others; padding that repeats keeps the axis whole."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        constant = _mode(node) == "constant"
        for dim, (before, behind) in enumerate(_amounts(node, structure.rank(source))):
            axis, to = structure.axis(source, dim), structure.axis(node, dim)
            if _is_zero(before) and _is_zero(behind):
                structure.move(axis, to)
            elif axis is not None and to is not None and constant and before >= 0 and behind >= 0:
                structure.move(axis, to[before : before + len(axis)])
            else:
                structure.pin(axis, "it is padded")
                structure.pin(to, "it is padded")

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        constants.hand_on(node)
        if _mode(node) != "constant":
            return
        value = arg(node, "value") or 0.0
        filled = float(value) if isinstance(value, int | float) else math.nan
        amounts = _amounts(node, constants.structure.rank(node))
        padded = [dim for dim, pair in enumerate(amounts) if not all(map(_is_zero, pair))]
        for dim, axis in enumerate(constants.structure.axes(node)):
            if axis is None:
                continue
            values = constants.values[axis]
            if any(other != dim for other in padded):  # elements of the padding lie along this axis as well
                values = np.where(values == filled, filled, np.nan)
            before, behind = amounts[dim]
            if dim in padded and isinstance(before, int) and isinstance(behind, int):
                values[: max(before, 0)] = filled
                values[len(axis) - max(behind, 0) :] = filled
            constants.values[axis] = values

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        rank = cut.structure.rank(node)
        amounts = _amounts(node, rank)
        pads: list[Any] = []
        for dim in range(rank - 1, rank - 1 - len(arg(node, "pad")) // 2, -1):
            axis, (before, behind) = cut.structure.axis(node, dim), amounts[dim]
            if axis is not None and isinstance(before, int) and cut.loses(axis):
                before, behind = cut.kept_before(axis, before), cut.count(axis[len(axis) - behind :])
            pads += [before, behind]
        cut.set_arg(node, "pad", pads)


def _is_zero(amount: Any) -> bool:
    return isinstance(amount, int) and amount == 0


def _mode(node: torch.fx.Node) -> str:
    return str(arg(node, "mode")) if node.target is aten.pad.default else "constant"


def _amounts(node: torch.fx.Node, rank: int) -> list[tuple[Any, Any]]:
    """Return how much is added before and behind each axis; the operator lists the last axis first."""
    pads = list(arg(node, "pad"))
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    return [(0, 0)] * (rank - len(pairs)) + pairs
