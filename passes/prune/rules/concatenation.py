"""Axes that are put together from several values, or taken apart into several values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fxopt.args import arg, tensor_arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten


@handles(aten.cat.default, aten.concat.default, aten.concatenate.default)
class _Cat(Rule):
    """Each part is a piece of the whole axis."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        parts, rank = arg(node, "tensors"), structure.rank(node)
        dim = arg(node, "dim") % rank
        if any(structure.rank(part) != rank for part in parts):
            structure.pin_all(node, "it concatenates an empty tensor of another rank")
            return
        whole, start = structure.axis(node, dim), 0
        for part in parts:
            for other in range(rank):
                if other != dim:
                    structure.move_axis(part, other, node, other)
            axis, size = structure.axis(part, dim), structure.value(part).shape[dim]
            if whole is None or not isinstance(size, int):
                structure.pin(axis, "it is concatenated with a size that is not fixed")
                structure.pin(whole, "it is concatenated of sizes that are not fixed")
            elif axis is None:
                structure.pin(whole[start : start + size], "it is concatenated, and has no other index")
            else:
                structure.move(axis, whole[start : start + size])
            start += size

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        constants.hand_on(node)
        dim = arg(node, "dim") % constants.structure.rank(node)
        for other in range(constants.structure.rank(node)):
            if other != dim:
                _agree(node, other, arg(node, "tensors"), other - constants.structure.rank(node), constants)


@handles(aten.stack.default)
class _Stack(Rule):
    """A new axis, which stays whole; the others are handed on by every part."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        new = arg(node, "dim") % structure.rank(node)
        structure.pin(structure.axis(node, new), "it is stacked")
        for part in arg(node, "tensors"):
            for dim in range(structure.rank(part)):
                structure.same(structure.axis(part, dim), structure.axis(node, dim + (dim >= new)))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        rank = constants.structure.rank(node)
        new = arg(node, "dim") % rank
        for dim in range(rank):
            if dim != new:
                behind = dim - rank + (dim < new)
                _agree(node, dim, arg(node, "tensors"), behind, constants)


def _agree(node: torch.fx.Node, dim: int, parts: Sequence[torch.fx.Node], behind: int, constants: Constants) -> None:
    """Let an index of an axis be constant where it is the same constant in every part, whose axis is ``behind``."""
    axis = constants.structure.axis(node, dim)
    if axis is not None:
        rows = np.stack([constants.along(part, behind, len(axis)) for part in parts])
        constants.values[axis] = np.where((rows == rows[0]).all(axis=0), rows[0], np.nan)


@handles(
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes,
    aten.unsafe_chunk.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
    aten.tensor_split.sections, aten.tensor_split.indices,
)  # fmt: skip
class _Split(Rule):
    """Parts of an axis; after a cut their sizes are listed, whatever they were before."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        dim = arg(node, "dim") % structure.rank(source)
        whole, start = structure.axis(source, dim), 0
        parts = structure.value(node)
        sizes = [part.shape[dim] for part in parts]
        if whole is not None and not (all(isinstance(size, int) for size in sizes) and sum(sizes) == len(whole)):
            structure.pin_all(node, "its parts overlap, or have sizes that are not fixed")
            return
        for slot, part in enumerate(parts):
            for other in range(part.ndim):
                if other != dim:
                    structure.move(structure.axis(source, other), structure.axis(node, other, slot))
            axis, size = structure.axis(node, dim, slot), part.shape[dim]
            if whole is None:
                structure.pin(axis, "it is part of a size that is not fixed")
            elif axis is None:
                structure.pin(whole[start : start + size], "it is a part by itself")
            else:
                structure.move(whole[start : start + size], axis)
            start = start + size if whole is not None else 0

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        source = tensor_arg(node, "self")
        dim = arg(node, "dim") % cut.structure.rank(source)
        axis = cut.structure.axis(source, dim)
        if axis is not None and cut.loses(axis):
            sizes = [cut.size(node, dim, slot) for slot in range(len(cut.structure.value(node)))]
            cut.set_call(node, aten.split_with_sizes.default, (source, sizes, dim))


@handles(aten.unbind.int)
class _Unbind(Rule):
    """An axis whose indices are values by themselves; the others are handed on to each."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        dim = arg(node, "dim") % structure.rank(source)
        structure.pin(structure.axis(source, dim), "each index of it is a value by itself")
        for slot, part in enumerate(structure.value(node)):
            for other in range(part.ndim):
                structure.move(structure.axis(source, other + (other >= dim)), structure.axis(node, other, slot))


@handles(aten.glu.default)
class _Glu(Rule):
    """The first half of an axis times the sigmoid of the second one."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        dim = arg(node, "dim") % structure.rank(source)
        for other in range(structure.rank(node)):
            if other != dim:
                structure.same(structure.axis(source, other), structure.axis(node, other))
        whole, half = structure.axis(source, dim), structure.axis(node, dim)
        if whole is None or half is None:
            structure.pin(whole, "its halves are one index each")
            structure.pin(half, "it is half of a size that is not fixed")
        else:
            structure.same(whole[: len(half)], half)
            structure.same(whole[len(half) :], half)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Zeros in the first half yield zeros."""
        structure, source = constants.structure, tensor_arg(node, "self")
        for dim, axis in enumerate(structure.axes(node)):
            values = constants.along(source, dim - structure.rank(source), 0 if axis is None else len(axis))
            if axis is not None:
                constants.values[axis[values[: len(axis)] == 0]] = 0.0
