"""Let the readers of a value read an equal one, where neither the caller nor the optimizer can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.functionalize import fake_call
from fxopt.passes.cleanup.gradients import Gradients
from fxopt.passes.cleanup.memory import Memory, same_layout
from fxopt.rewriter import Rewriter

__all__ = ["Replacement"]


class Replacement:
    """Replaces values of one graph on behalf of an exact pass; what it refuses, it records with its reason."""

    def __init__(self, rw: Rewriter, module: torch.fx.GraphModule) -> None:
        """Args: rw: of the pass. module: the graph, that of ``rw`` or one inside it."""
        self.rw = rw
        self.memory = Memory(module)
        self.gradients = Gradients(rw.gm, module)

    def by_value(self, node: torch.fx.Node, by: torch.fx.Node, *, why: str, is_same_object: bool = False) -> bool:
        """Let the readers of ``node`` read ``by``, and return whether they do.

        Args:
            node: The value that goes.
            by: The equal value that stays.
            why: Reason, for the report.
            is_same_object: In eager mode too ``node`` is ``by`` itself, and adds no step to the way of a gradient.
        """
        reason = self.memory.refusal(node, by) or (None if is_same_object else self.gradients.refusal(node, by))
        if reason is not None:
            self.rw.skip(node, reason)
            return False
        self.memory.join(node, by)
        self.rw.replace_value(node, by, why=why)
        return True

    def by_call(self, node: torch.fx.Node, target: Any, args: Sequence[Any], *, why: str) -> torch.fx.Node | None:
        """Compute ``node`` by another call whose first argument it was made from; return it, or None if refused."""
        reason = self.gradients.refusal(node, args[0], terms_after=1)
        if reason is not None:
            self.rw.skip(node, reason)
            return None
        new = self.rw.replace_call(node, target, args, why=why)
        self.memory.join(node, new)
        return new

    def keeps_layout(self, node: torch.fx.Node, target: Any, args: Sequence[Any]) -> bool:
        """Return whether the other call would give a value of the type, sizes and strides of ``node``."""
        return same_layout(node.meta["val"], fake_call(target, args, {}))
