"""Operators that put elements elsewhere, or several times: permutations, expansions, shuffles."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.args import arg, tensor_arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.rules.base import Rule, axis_order, handles
from fxopt.passes.prune.rules.reshape import sizes_after
from fxopt.passes.prune.structure import Indices, Structure

__all__: list[str] = []

aten = torch.ops.aten


@handles(
    aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.swapaxes.default,
    aten.swapdims.default, aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist,
    aten.mT.default, aten.permute_copy.default,
)  # fmt: skip
class _Permute(Rule):
    """Axes in another order."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        for to, dim in enumerate(axis_order(node, structure.rank(source))):
            structure.move_axis(source, dim, node, to)


@handles(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
class _Expand(Rule):
    """Axes of size 1 are repeated; all of their indices are alike, and any may go."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        behind = structure.rank(node) - structure.rank(source)
        for dim in range(structure.rank(source)):
            if not structure.is_one(source, dim):
                structure.move_axis(source, dim, node, dim + behind)
        if node.target is aten.expand_as.default:
            for axis, to in zip(structure.axes(tensor_arg(node, "other")), structure.axes(node), strict=True):
                structure.same(axis, to)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        constants.hand_on(node)
        number = constants.everywhere(tensor_arg(node, "self"))
        for axis in constants.structure.axes(node):
            if axis is not None and not math.isnan(number):
                constants.values[axis] = number

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        if node.target is not aten.expand_as.default:
            cut.set_arg(node, "size", sizes_after(node, arg(node, "size"), 0, cut))


@handles(aten.flip.default, aten.roll.default)
class _Reorder(Rule):
    """Axes that are turned round or rolled; rolled ones stay whole, the distance is counted in indices."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        rank = structure.rank(source)
        dims = {dim % rank for dim in arg(node, "dims")}
        rolls = node.target is aten.roll.default
        moved = set(range(rank)) if rolls and not dims else dims
        for dim in range(rank):
            axis, to = structure.axis(source, dim), structure.axis(node, dim)
            if dim not in moved:
                structure.move(axis, to)
            elif rolls:
                structure.pin(axis, "it is rolled")
                structure.pin(to, "it is rolled")
            elif axis is not None:
                structure.move(axis[::-1], to)


@handles(aten.repeat_interleave.self_int)
class _RepeatInterleave(Rule):
    """Each index several times in a row: all of its copies go, or none."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, dim = tensor_arg(node, "self"), arg(node, "dim")
        if dim is None:
            structure.pin_all(node, "it is repeated as one flat axis")
            return
        for other in range(structure.rank(node)):
            axis, to = structure.axis(source, other), structure.axis(node, other)
            if other == dim % structure.rank(node):
                _repeat(axis, to, structure, outer=False)
            else:
                structure.move(axis, to)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        if isinstance(arg(node, "output_size"), int):
            cut.set_arg(node, "output_size", cut.size(node, arg(node, "dim")))


@handles(aten.repeat.default, aten.tile.default)
class _Repeat(Rule):
    """A whole axis several times in a row: an index goes from each of its copies, or from none."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        behind = structure.rank(node) - structure.rank(source)
        counts = list(arg(node, "repeats" if node.target is aten.repeat.default else "dims"))
        counts = [1] * (structure.rank(node) - len(counts)) + counts
        for dim, times in enumerate(counts):
            to = structure.axis(node, dim)
            axis = structure.axis(source, dim - behind) if dim >= behind else None
            if dim >= behind and isinstance(times, int) and times == 1:
                structure.move(axis, to)
            else:
                _repeat(axis, to, structure, outer=True)


def _repeat(axis: Indices | None, to: Indices | None, structure: Structure, *, outer: bool) -> None:
    """Relate an axis to one that holds it several times: the whole one after the other, or each index by itself."""
    if axis is None or to is None:
        structure.pin(axis, "it is repeated")
        structure.pin(to, "it is repeated")
    elif len(axis) == len(to):
        structure.move(axis, to)
    else:
        times = structure.fresh(len(to) // len(axis))
        structure.pin(times, "it is repeated")
        structure.merge([times, axis] if outer else [axis, times], to)


@handles(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
class _PixelShuffle(Rule):
    """Channels become places: a channel of the image goes with all channels that hold its places."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, rank = tensor_arg(node, "self"), structure.rank(node)
        for dim in range(rank):
            if dim < rank - 3:
                structure.move_axis(source, dim, node, dim)
            elif dim > rank - 3:
                structure.pin(structure.axis(source, dim), "it is one of places")
                structure.pin(structure.axis(node, dim), "it is one of places")
        few, many = (node, source) if node.target is aten.pixel_shuffle.default else (source, node)
        channels, flat = structure.axis(few, rank - 3), structure.axis(many, rank - 3)
        if flat is None:
            return
        if channels is None:
            structure.pin(flat, "each is one place of the only channel")
            return
        inside = structure.fresh(len(flat) // len(channels))
        structure.pin(inside, "it is one of places")
        if len(inside) == 1:
            structure.move_axis(source, rank - 3, node, rank - 3)
        elif node is few:
            structure.split(flat, [channels, inside])
        else:
            structure.merge([channels, inside], flat)


@handles(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
class _ChannelShuffle(Rule):
    """Channels are dealt to groups: they go by their place in a group, from all groups alike."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, groups = tensor_arg(node, "self"), arg(node, "groups")
        for dim in range(structure.rank(node)):
            axis, to = structure.axis(source, dim), structure.axis(node, dim)
            if dim != 1 or axis is None or to is None or groups in (1, len(axis)):
                structure.move(axis, to)
                continue
            outer, inner = structure.fresh(groups), structure.fresh(len(axis) // groups)
            structure.pin(outer, "channels are shuffled among the groups")
            structure.split(axis, [outer, inner])
            structure.merge([inner, outer], to)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        axis: Any = cut.structure.axis(tensor_arg(node, "self"), 1)
        if axis is not None and arg(node, "groups") == len(axis):
            cut.set_arg(node, "groups", cut.count(axis))
