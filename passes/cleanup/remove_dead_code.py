"""Remove what nobody reads.

    before:  a = relu(x);  b = sigmoid(x)  (unread);  fc.bias  (unread);  return a
    after:   a = relu(x);  return a

Exact: a pure call without readers has no consequence. A random call without readers moves the generator on, so that
without it all later draws are others: those behind it, and those before it when the graph is called again. So it goes
only where no random call is left.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.contracts import Contract
from fxopt.effects import has_effect, is_random
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["RemoveDeadCode", "unread"]


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Remove calls, parameters and buffers that nobody reads."""

    name: ClassVar[str] = "remove-dead-code"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        dead, draws = unread(rw.gm)
        for module in graph_modules(rw.gm):
            for node in rw.nodes_of(module, backwards=True):
                if node.users:
                    continue
                if node in dead:
                    rw.erase(node, why="nothing reads it")
                elif is_random(node) and not has_effect(node):
                    rw.skip(node, f"without it {draws} would draw other random numbers")
        rw.drop_unread_attributes(why="nothing reads it")


def unread(gm: CapturedModule) -> tuple[set[torch.fx.Node], str]:
    """Return the nodes that can go, and the name of a random call that is needed, if there is one."""
    dead = _without_readers(gm, keep_random=False)
    nodes = (node for module in graph_modules(gm) for node in module.graph.nodes)
    needed = next((node.name for node in nodes if node not in dead and is_random(node)), "")
    return (_without_readers(gm, keep_random=True) if needed else dead), needed


def _without_readers(gm: CapturedModule, *, keep_random: bool) -> set[torch.fx.Node]:
    dead: set[torch.fx.Node] = set()
    for module in graph_modules(gm):
        for node in reversed(module.graph.nodes):
            stays = has_effect(node) or (keep_random and is_random(node))
            if not stays and all(user in dead for user in node.users):
                dead.add(node)
    return dead
