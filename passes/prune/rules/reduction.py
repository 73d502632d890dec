"""Operators that reduce axes, and those that look along one: sums, means, norms, softmax, pooling, resizing."""

from __future__ import annotations

import math

import numpy as np
import torch

from fxopt.args import arg, argument_positions
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.ends import SumEnd
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten
_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.linalg_vector_norm.default)
_MEANS = (aten.mean.default, aten.mean.dim)
_OTHERS = (
    aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.argmax.default, aten.argmin.default,
    aten.prod.default, aten.prod.dim_int, aten.all.default, aten.all.dim, aten.any.default, aten.any.dim,
    aten.logsumexp.default, aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction, aten.std.dim,
    aten.std.default, aten.norm.ScalarOpt_dim,
)  # fmt: skip


def reduced(node: torch.fx.Node, rank: int) -> list[int]:
    """Return the axes that a reduction goes over."""
    dims = arg(node, "dim") if "dim" in argument_positions(node.target) else None
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % max(rank, 1) for dim in (dims if isinstance(dims, list | tuple) else [dims])]


@handles(*_SUMS, *_OTHERS)
class _Reduction(Rule):
    """Other axes are handed through; one that is reduced may lose zeros if it is added up, and else stays whole."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = node.all_input_nodes[0]
        rank = structure.rank(source)
        gone = reduced(node, rank)
        keeps = structure.rank(node) == rank
        to = 0
        for dim in range(rank):
            axis = structure.axis(source, dim)
            if dim not in gone:
                structure.move(axis, structure.axis(node, to))
            elif axis is not None and node.target in _SUMS and self._adds(node):
                structure.end(SumEnd(node, axis))
            else:
                structure.pin(axis, f"{node.target} goes over it")
            to += dim not in gone or keeps

    @staticmethod
    def _adds(node: torch.fx.Node) -> bool:
        """Return whether a value of 0 adds nothing."""
        order = arg(node, "ord") if node.target is aten.linalg_vector_norm.default else 1
        return isinstance(order, int | float) and 0 < order < math.inf

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Reductions of zeros are zero; for others, nothing is said."""
        if node.target not in (*_SUMS, aten.amax.default, aten.amin.default):
            return
        for move in constants.structure.moves.get(node, []):
            if move.source is not None and move.target is not None:
                constants.values[move.target[constants.values[move.source] == 0]] = 0.0

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Divide a mean by the number of values that it was taken of."""
        if node.target not in _MEANS:
            return
        source = node.all_input_nodes[0]
        share = 1.0
        for dim in reduced(node, cut.structure.rank(source)):
            axis = cut.structure.axis(source, dim)
            if axis is not None:
                share *= cut.count(axis) / len(axis)
        if share != 1.0:
            cut.scale(node, share)


@handles(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten.cumsum.default,
    aten.cumprod.default, aten.logcumsumexp.default, aten.sort.default, aten.topk.default, aten.argsort.default,
    aten.max.dim, aten.min.dim, aten.median.dim, aten.mode.default, aten.kthvalue.default,
    aten.tril.default, aten.triu.default,
)  # fmt: skip
class _Along(Rule):
    """One axis (the last two of a triangle) stays whole, the others are handed through."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = node.all_input_nodes[0]
        rank = structure.rank(source)
        triangle = node.target in (aten.tril.default, aten.triu.default)
        if node.target in (aten.softmax.int, aten._softmax.default) and rank > 3:
            heads = structure.axis(source, -3)
            structure.heads += [] if heads is None else [heads]
        along = {rank - 1, rank - 2} if triangle else {arg(node, "dim") % max(rank, 1)}
        for slot in range(len(node.meta["val"])) if isinstance(node.meta["val"], tuple | list) else (None,):
            keeps = structure.rank(node, slot) == rank
            for dim in range(rank):
                axis = structure.axis(source, dim)
                to = dim - (not keeps and dim > min(along))
                if dim in along:
                    structure.pin(axis, f"{node.target} goes along it")
                    if keeps:
                        structure.pin(structure.axis(node, dim, slot), f"{node.target} goes along it")
                else:
                    structure.same(axis, structure.axis(node, to, slot))


@handles(
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
    aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool2d.default,
    aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default,
    aten.max_pool2d_with_indices.default, aten.max_pool1d_with_indices.default, aten.max_pool3d_with_indices.default,
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
    aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec, aten.upsample_bicubic2d.vec,
    aten.upsample_trilinear3d.vec, aten._upsample_nearest_exact2d.vec,
    aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec, aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default,
)  # fmt: skip
class _Window(Rule):
    """Places are mixed with their neighbours; channels are left alone."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = node.all_input_nodes[0]
        places = _places(node)
        for slot in range(len(node.meta["val"])) if isinstance(node.meta["val"], tuple | list) else (None,):
            rank = structure.rank(node, slot)
            for dim in range(rank):
                if dim < rank - places:
                    hand_on = structure.same if slot else structure.move  # the second value counts places
                    hand_on(structure.axis(source, dim), structure.axis(node, dim, slot))
                else:
                    structure.pin(structure.axis(source, dim), "a window moves along it")
                    structure.pin(structure.axis(node, dim, slot), "a window moves along it")

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Zeros stay zeros; other constants do where nothing is padded, and sums are divided by what was added up."""
        named = argument_positions(node.target)
        padded = "padding" in named and any(np.atleast_1d(arg(node, "padding")))
        divided = "divisor_override" in named and arg(node, "divisor_override") is not None
        largest = "max_pool" in str(node.target)
        for move in constants.structure.moves.get(node, []):
            assert move.source is not None
            assert move.target is not None
            values = constants.values[move.source]
            changes = (padded and not largest) or divided
            constants.values[move.target] = np.where(values == 0, 0.0, np.nan) if changes else values


def _places(node: torch.fx.Node) -> int:
    """Return how many axes a window has: the number in the operator's name."""
    name = str(node.target)
    return next(int(name[at - 1]) for at in range(1, len(name)) if name[at] == "d" and name[at - 1].isdigit())
