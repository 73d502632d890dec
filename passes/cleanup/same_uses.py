"""Uses of one layer that are alike: a module that is called several times has one weight.

    y = relu(norm(conv(a)));  z = relu(norm(conv(b)))

What is folded into such a layer is folded into all of its uses at once, so that it keeps one weight: a copy for each
would make the model larger, and in training each copy would go its own way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch.utils import _pytree as pytree

from fxopt.passes.cleanup.memory import same_layout
from fxopt.rewriter import Rewriter

__all__ = ["Fold", "alike", "uses"]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A node that goes into a layer.

    Attributes:
        path: What the first of the calls reads, and the calls: each is read by the next one alone.
        layer: The place of the layer among them.
        node: The place of what goes.
    """

    path: tuple[torch.fx.Node, ...]
    layer: int
    node: int

    @property
    def call(self) -> torch.fx.Node:
        """The layer."""
        return self.path[self.layer]

    @property
    def goes(self) -> torch.fx.Node:
        """The node that goes."""
        return self.path[self.node]

    @property
    def stays(self) -> torch.fx.Node:
        """What the readers of that node read afterwards."""
        return self.path[self.node - 1]


def alike(fold: Fold, sites: Collection[torch.fx.Node]) -> list[Fold]:
    """Return a fold, and those of other uses of its layer that are the same calls.

    Args:
        fold: The fold.
        sites: What the pass may fold.
    """
    # All of them read the same tensors: where the one with the fewest readers is read, there are the fewest to look at.
    attributes = [
        (place, source)
        for place, call in enumerate(fold.path[1:], 1)
        for source in call.all_input_nodes
        if source.op == "get_attr"
    ]
    place, source = min(attributes, key=lambda each: len(each[1].users))
    others = (_counterpart(fold, place, user) for user in source.users if user is not fold.path[place])
    return [fold, *(other for other in others if other is not None and other.goes in sites)]


def _counterpart(fold: Fold, at: int, call: torch.fx.Node) -> Fold | None:
    """Return the same fold with another call in one place of the path; None if the calls around that are others."""
    path: list[torch.fx.Node] = [call]
    for place in range(at, 0, -1):
        before = _operand(fold.path[place], path[0], fold.path[place - 1])
        if before is None or (place > 1 and len(before.users) > 1):
            return None
        path.insert(0, before)
    for before, wanted in zip(fold.path[at:], fold.path[at + 1 :], strict=False):
        if len(path[-1].users) > 1 or not path[-1].users:
            return None
        behind = next(iter(path[-1].users))
        if _operand(wanted, behind, before) is not path[-1]:
            return None
        path.append(behind)
    found = Fold(tuple(path), fold.layer, fold.node)
    mine, got = (each.goes.meta.get("val") for each in (fold, found))
    same_rank = isinstance(mine, torch.Tensor) and isinstance(got, torch.Tensor) and mine.ndim == got.ndim
    return found if same_rank and same_layout(got, found.stays.meta.get("val")) else None


def _operand(call: torch.fx.Node, other: torch.fx.Node, source: torch.fx.Node) -> torch.fx.Node | None:
    """Return what ``other`` reads where ``call`` reads ``source``, if the calls are the same but for that."""
    if call.target is not other.target or call.meta.get("modes") != other.meta.get("modes"):
        return None
    mine, its = (pytree.tree_leaves((list(node.args), dict(node.kwargs))) for node in (call, other))
    if len(mine) != len(its):
        return None
    found: list[torch.fx.Node] = []
    for a, b in zip(mine, its, strict=True):
        if a is source and isinstance(b, torch.fx.Node):
            found.append(b)
        elif a is not b and (isinstance(a, torch.fx.Node) or type(a) is not type(b) or a != b):
            return None
    return found[0] if len(found) == 1 else None


def uses(rw: Rewriter, source: torch.fx.Node) -> int:
    """Return how many calls of a graph read the tensor that ``source`` reads; none are told if it has several names."""
    reads = [read for read in rw.reads(rw.tensor(source)) if read.graph is source.graph]
    return sum(len(read.users) for read in reads) if {read.target for read in reads} == {source.target} else 0
