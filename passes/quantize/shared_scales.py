"""Which values share a scale: those that moves connect, and those that are joined, where that costs no kernel.

A concatenation of integers of one scale is a copy; of several, each but one goes through a table. That is cheap, and
a layer in floats is not: where one operand is what saturation leaves of a layer (``relu``), and another one reaches
beyond these limits, no integers of one scale can stand for both the limits and all values. Such an operand keeps a
scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from fxopt.args import arg

__all__ = ["Bounds", "bounds_of", "shared_scales"]

aten = torch.ops.aten
Node = torch.fx.Node
Bounds = tuple[float, float]
_EVERYTHING: Bounds = (-math.inf, math.inf)
_AVERAGES = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
_SHARES = {aten.sigmoid.default, aten.softmax.int, aten._softmax.default, aten.hardsigmoid.default}


def shared_scales(
    moves: Mapping[Node, Node],
    joins: Iterable[tuple[Node, Node]],
    limits: Mapping[Node, Bounds],
    bounds: Callable[[Node], Bounds],
) -> dict[Node, Node]:
    """Return for each value that shares its scale one that stands for its group.

    Args:
        moves: Values that are others in another place: they always share.
        joins: Results, each with an operand that shares its scale if it can.
        limits: What the integers of a value must not leave, as they stand for a limit such as ``relu``.
        bounds: What a value cannot leave, see :func:`bounds_of`.
    """
    kept = list(joins)
    while True:
        groups = _Groups([*moves.items(), *kept])
        hulls: dict[Node, Bounds] = {}
        for node in groups.members:
            low, high = bounds(node)
            held = hulls.get(groups.root(node), (math.inf, -math.inf))
            hulls[groups.root(node)] = (min(low, held[0]), max(high, held[1]))
        apart = [pair for pair in kept if not _inside(hulls[groups.root(pair[1])], limits.get(_base(pair[1], moves)))]
        if not apart:
            return {node: groups.root(node) for node in groups.members}
        kept = [pair for pair in kept if pair not in apart]


def bounds_of(node: Node, limits: Callable[[Node], Bounds | None], moves: Mapping[Node, Node]) -> Bounds:
    """Return what a value cannot leave, whatever the inputs are, as far as the operators around it tell.

    Args:
        node: What yields the value.
        limits: The ends of a limit such as ``relu``; None for other calls.
        moves: Values that are others in another place.
    """
    own = limits(node)
    if own is not None:
        low, high = bounds_of(_read(node, 0), limits, moves)
        return max(low, own[0]), min(max(high, own[0]), own[1])
    if node in moves:
        return bounds_of(moves[node], limits, moves)
    if node.target in _SHARES:
        return 0.0, 1.0
    if node.target in _AVERAGES:
        low, high = bounds_of(_read(node, 0), limits, moves)
        return min(low, 0.0), max(high, 0.0)  # zeros of the padding may count
    if node.target is aten.cat.default:
        parts = [bounds_of(part, limits, moves) for part in arg(node, "tensors")]
        return min(low for low, _ in parts), max(high for _, high in parts)
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        operands = [arg(node, name) for name in ("self", "other")]
        if all(isinstance(operand, Node) and bounds_of(operand, limits, moves)[0] >= 0 for operand in operands):
            return (0.0, math.inf) if node.target is aten.mul.Tensor or arg(node, "alpha") == 1 else _EVERYTHING
    return _EVERYTHING


def _read(node: Node, position: int) -> Node:
    source = node.args[position]
    assert isinstance(source, Node)  # these operators take a tensor there
    return source


def _base(node: Node, moves: Mapping[Node, Node]) -> Node:
    while node in moves:
        node = moves[node]
    return node


def _inside(hull: Bounds, limits: Bounds | None) -> bool:
    return limits is None or (hull[0] >= limits[0] and hull[1] <= limits[1])


class _Groups:
    """Nodes that pairs connect."""

    def __init__(self, pairs: Iterable[tuple[Node, Node]]) -> None:
        self._parent: dict[Node, Node] = {}
        self.members: dict[Node, None] = {}
        for a, b in pairs:
            self.members |= {a: None, b: None}
            self._parent[self.root(a)] = self.root(b)

    def root(self, node: Node) -> Node:
        while (above := self._parent.get(node, node)) is not node:
            node = above
        return node
