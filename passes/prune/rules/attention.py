"""Attention: heads, and the places inside a head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from fxopt.args import arg, tensor_arg
from fxopt.attention_ops import MULTI_HEAD_ATTENTION
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.ends import SumEnd
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import End, Indices, Structure, where

if TYPE_CHECKING:
    from fxopt.passes.prune.removal import Removal

__all__: list[str] = []

aten = torch.ops.aten


@handles(aten.scaled_dot_product_attention.default)
class _Attention(Rule):
    """Of query [..., H, L, E], key [..., H, S, E], value [..., H, S, V]; keys may have fewer heads than queries."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        query, key, value = (tensor_arg(node, name) for name in ("query", "key", "value"))
        rank = structure.rank(node)
        for other in (key, value):
            structure.pin(structure.axis(other, -2), "attention looks along it")
        structure.pin(structure.axis(query, -2), "it is a place of a sequence")
        structure.pin(structure.axis(node, -2), "it is a place of a sequence")
        places = structure.axis(query, -1), structure.axis(key, -1)
        structure.same(*places)
        if places[0] is not None and places[1] is not None:
            structure.end(SumEnd(node, places[0], places[1]))
        structure.same(structure.axis(value, -1), structure.axis(node, -1))
        for dim in range(rank - 2):
            structure.same(structure.axis(query, dim), structure.axis(node, dim))
            for other in (key, value):
                self._heads(structure, other, node, dim)
        if rank > 3 and (heads := structure.axis(query, -3)) is not None:
            structure.heads.append(heads)
        _relate_mask(node, arg(node, "attn_mask"), structure, [structure.axis(node, dim) for dim in range(rank - 2)])

    @staticmethod
    def _heads(structure: Structure, other: torch.fx.Node, node: torch.fx.Node, dim: int) -> None:
        axis, to = structure.axis(other, dim), structure.axis(node, dim)
        if axis is None and to is not None:
            if not structure.is_one(other, dim):
                structure.pin(to, "it meets a size that is not fixed")
        elif axis is not None and to is not None and len(axis) < len(to):  # grouped queries
            structure.product(to, [axis, structure.fresh(len(to) // len(axis))])
        else:
            structure.same(axis, to)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Where the values are 0, so is the result."""
        structure = constants.structure
        value = tensor_arg(node, "value")
        for dim in (*range(structure.rank(node) - 2), -1):
            axis, to = structure.axis(value, dim), structure.axis(node, dim)
            if axis is not None and to is not None:
                zero = np.repeat(constants.values[axis] == 0, len(to) // len(axis))
                constants.values[to[zero]] = 0.0

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Write down the scale that the number of places had given, if it changes."""
        axis = cut.structure.axis(tensor_arg(node, "query"), -1)
        if axis is not None and cut.loses(axis) and arg(node, "scale") is None:
            cut.set_arg(node, "scale", 1 / math.sqrt(len(axis)))


def _relate_mask(
    node: torch.fx.Node, mask: torch.fx.Node | None, structure: Structure, outer: list[Indices | None]
) -> None:
    """Relate a mask [..., L, S], which is broadcast to the axes ``outer`` in front of the last two."""
    if mask is None:
        return
    behind = len(outer) + 2 - structure.rank(mask)
    for dim in range(structure.rank(mask)):
        axis = structure.axis(mask, dim)
        if dim + behind >= len(outer):
            structure.pin(axis, "it is a place of a sequence")
        elif not structure.is_one(mask, dim):
            structure.same(axis, outer[dim + behind])


@handles(MULTI_HEAD_ATTENTION)
class _MultiHeadAttention(Rule):
    """Heads side by side along the last axes of query and key [N, *, H * E], value and output [N, *, H * V]."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        query, key, value = (tensor_arg(node, name) for name in ("query", "key", "value"))
        heads = self._factor(structure, arg(node, "heads"), "it is the only head")
        structure.notes[node, "heads"] = heads
        structure.heads.append(heads)
        inside: dict[torch.fx.Node, Indices] = {}
        for found in (query, key, value, node):
            for dim in range(2):
                structure.pin(structure.axis(found, dim), "it is a place of a sequence, or a row")
            if found not in inside:
                flat = structure.axis(found, -1)
                width = 1 if flat is None else len(flat) // len(heads)
                inside[found] = self._factor(structure, width, "it is the only place of a head")
                if flat is not None:
                    structure.product(flat, [heads, inside[found]])
        structure.notes[node, "places"] = inside[query]
        structure.same(inside[query], inside[key])
        structure.same(inside[value], inside[node])
        queries, keys = structure.axis(query, -1), structure.axis(key, -1)
        if queries is not None and keys is not None:
            structure.end(_PlacesEnd(node, heads, inside[query], (queries, keys)))
        _relate_mask(node, arg(node, "mask"), structure, [None, heads])

    @staticmethod
    def _factor(structure: Structure, size: int, reason: str) -> Indices:
        factor = structure.fresh(size)
        if size == 1:
            structure.pin(factor, reason)
        return factor

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Where the values are 0, so is the result."""
        axis, to = constants.structure.axis(tensor_arg(node, "value"), -1), constants.structure.axis(node, -1)
        if axis is not None and to is not None:
            constants.values[to[constants.values[axis] == 0]] = 0.0

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Bring the number of heads up to date, and write down the scale that the number of places had given."""
        places = cut.structure.notes[node, "places"]
        if cut.loses(places) and arg(node, "scale") is None:
            cut.set_arg(node, "scale", 1 / math.sqrt(len(places)))
        cut.set_arg(node, "heads", cut.count(cut.structure.notes[node, "heads"]))


class _PlacesEnd(End):
    """The sums over the places of each head: a place may go if query or key is 0 there, in each head that stays."""

    def __init__(self, node: torch.fx.Node, heads: Indices, places: Indices, operands: tuple[Indices, Indices]) -> None:
        super().__init__(node, places)
        self.heads, self.operands = heads, [operand.reshape(len(heads), len(places)) for operand in operands]

    def allows(self, removal: Removal) -> np.ndarray:
        """Return which places may go."""
        zero = np.logical_or(*(removal.constants.values[operand] == 0 for operand in self.operands))
        allowed: np.ndarray = (zero | removal.removed(self.heads)[:, None]).all(axis=0)
        return allowed

    def reason(self) -> str:
        """Return why a place has to stay."""
        return f"{where(self.node)} sums over it, and it is not 0 in each head"
