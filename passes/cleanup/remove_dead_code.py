"""Remove what nobody reads.

    before:  a = relu(x);  b = sigmoid(x)  (unread);  fc.bias  (unread);  return a
    after:   a = relu(x);  return a

Exact: a pure call without readers has no consequence. A random call without readers shifts the stream of random numbers
for those behind it, so it goes only where no random call comes later.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fxopt.contracts import Contract
from fxopt.effects import has_effect, is_random
from fxopt.graph_module import graph_modules
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["RemoveDeadCode"]


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Remove calls, parameters and buffers that nobody reads."""

    name: ClassVar[str] = "remove-dead-code"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for module in graph_modules(rw.gm):
            random_behind = False
            for node in reversed(module.graph.nodes):
                if node.op in ("placeholder", "output"):
                    continue
                if not node.users and not has_effect(node):
                    if random_behind and is_random(node):
                        rw.skip(node, "a random call comes later, and would draw other numbers")
                    else:
                        rw.erase(node, why="nothing reads it")
                        continue
                random_behind = random_behind or is_random(node)
        rw.drop_unread_attributes(why="nothing reads it")
