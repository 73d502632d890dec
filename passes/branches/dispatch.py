"""Give every way through the graph a straight line of its own, behind the branch that chooses it.

    before:  y = cond(p, f, g, x);  z = h(y)
    after:   z = cond(p, x -> h(f(x)), x -> h(g(x)), x)

What follows a branch moves into both of its sides, so that other passes see each way as a whole and can fit it to what
is known there. Weights stay outside and are shared: an exported file holds each of them once.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt import Contract, Pass, Rewriter
from fxopt.effects import has_effect
from fxopt.passes.branches.builder import SideBuilder
from fxopt.passes.branches.sides import (
    Branch,
    dependents,
    discard_unread,
    insert_branch,
    line_of,
    nodes_among,
    nodes_between,
)
from fxopt.regions import COND, body_of, results_of

__all__ = ["Dispatch"]

Node = torch.fx.Node
_NAMES = ("variant_true", "variant_false")


@dataclasses.dataclass(frozen=True)
class Dispatch(Pass):
    """Move what follows a branch into both of its sides, for some ways through the graph.

    Attributes:
        variants: The most ways that get a line of their own; each costs a copy of the nodes, none of the weights.
    """

    name: ClassVar[str] = "dispatch"
    contract: ClassVar[Contract] = Contract.EXACT
    variants: int = 4

    def __post_init__(self) -> None:
        if self.variants < 2:
            raise ValueError(f"variants is {self.variants}; wanted 2 or more")

    def run(self, rw: Rewriter) -> None:
        """Dispatch the branches of the graph, then those of their sides, while ``variants`` allows."""
        ways = 1 + sum(_is_dispatched(node) for node in rw.calls(COND))
        todo = [rw.gm.graph]
        while todo:
            graph = todo.pop(0)
            for node in [node for node in graph.nodes if node.target is COND]:
                if ways < self.variants and not node._erased and _dispatched(rw, Branch.of(node)):
                    ways += 1
            for node in graph.nodes:
                if _is_dispatched(node):
                    todo += [body_of(side).graph for side in node.args[1:3]]


def _is_dispatched(node: Node) -> bool:
    return node.target is COND and str(node.args[1].target).startswith(_NAMES[0])  # type: ignore[union-attr]  # get_attr


def _dispatched(rw: Rewriter, branch: Branch) -> bool:
    """Move what reads a branch into it; return whether there was anything to move, and could be."""
    results = dict(branch.results())
    own = {branch.node, *results.values()}
    output = branch.node.graph.output_node()
    tail = dependents(own, nodes_between(branch.node, output))
    effects = [node for node in tail if has_effect(node)]
    if effects:
        rw.skip(branch.node, f"{effects[0].name}, which follows it, has an effect")
        return False
    if not tail:
        return False
    inside = {*own, *tail}
    yields = [node for node in nodes_among(results_of(branch.node.graph.owning_module)) if node in inside]  # type: ignore[arg-type]  # a graph module
    reads = [source for node in tail for source in node.all_input_nodes]
    outer = [node for node in nodes_among([*branch.operands, *reads]) if node not in inside]
    sides = []
    for side in (True, False):
        builder = SideBuilder(outer)
        made = builder.add_side(branch, side)
        env = builder.add(tail, {node: made[index] for index, node in results.items()})
        sides.append(builder.finished([env[node] for node in yields]))
    why = f"{line_of(branch.node)}: what follows it moves into both sides"
    _, new = insert_branch(rw, sides, outer, like=branch, before=output, why=why, names=_NAMES)
    for node, result in zip(yields, new, strict=True):
        rw.replace_value(node, result, why=why)
    discard_unread(rw, tail, why=why)  # what nobody read before either
    return True
