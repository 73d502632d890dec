"""Which values gradients flow through, and when a rewrite would sum them in another order.

Where a value has several readers, its gradient is the sum of what they send, in the order in which they send it. A
floating point sum of three or more terms depends on that order:

    before:  v = view(x);  a = f(v);  b = g(v);  c = h(x)        dx = (da + db) + dc
    after:   a = f(x);  b = g(x);  c = h(x)                      dx = (da + dc) + db, say

A graph in training mode keeps the gradients of its parameters bit for bit, so exact passes ask
:meth:`Gradients.refusal` first. In evaluation mode only outputs count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.attributes import get_path, owner_of
from fxopt.graph_module import CapturedModule

__all__ = ["Gradients"]

aten = torch.ops.aten
_STOPS = {aten.detach.default, aten.detach_copy.default}


class Gradients:
    """The flow of gradients through one graph, found in one walk."""

    def __init__(self, gm: CapturedModule, module: torch.fx.GraphModule) -> None:
        """Args: gm: whose mode counts. module: the graph, ``gm`` or one inside it."""
        self._training = gm.training
        self._of_parameters: set[torch.fx.Node] = set()
        self._of_anything: set[torch.fx.Node] = set()
        # Into the graph of a branch, parameters come as arguments.
        comes_in = module is not gm and any(parameter.requires_grad for parameter in gm.parameters())
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self._enter(node, comes_in, True)
            elif node.op == "get_attr":
                found = get_path(owner_of(node), str(node.target))
                trainable = isinstance(found, torch.Tensor) and found.requires_grad
                self._enter(node, trainable, trainable)
            elif node.target not in _STOPS:
                sources = node.all_input_nodes
                self._enter(
                    node,
                    any(source in self._of_parameters for source in sources),
                    any(source in self._of_anything for source in sources),
                )

    def flow_through(self, node: torch.fx.Node) -> bool:
        """Return whether a gradient of a parameter or of an input may flow through ``node``."""
        return node in self._of_anything

    def count(self, node: torch.fx.Node) -> bool:
        """Return whether the order in which the gradient of ``node`` is summed must be kept."""
        return self._training and node in self._of_parameters

    def refusal(self, node: torch.fx.Node, by: torch.fx.Node, *, terms_after: int | None = None) -> str | None:
        """Return why the readers of ``node``, made from ``by`` by moving data, cannot read ``by``; None if they can.

        Args:
            node: The value that goes.
            by: The value that it was made from, directly or through one other call.
            terms_after: How many terms of the gradient of ``by`` come in its place; those of the readers if not given.
        """
        if not self.count(by) or len(by.users) == 1:
            return None
        others = 0
        for user in by.users:
            leads_to_node = user is node or (len(user.users) == 1 and node in user.users)
            others += 0 if leads_to_node else terms(user, by)
            if others > 1:
                break
        if terms_after is None:
            terms_after = 2 if len(node.users) > 1 else sum(terms(user, node) for user in node.users)
        if others and others + terms_after > 2:
            return f"the gradient of {by.name} would be summed in another order"
        return None

    def _enter(self, node: torch.fx.Node, of_parameters: bool, of_anything: bool) -> None:
        if is_differentiable(node.meta.get("val")):
            if of_parameters:
                self._of_parameters.add(node)
            if of_anything:
                self._of_anything.add(node)


def is_differentiable(value: Any) -> bool:
    """Return whether a value is, or holds, a tensor of a type that has gradients."""
    return any(
        isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        for leaf in pytree.tree_leaves(value)
    )


def terms(user: torch.fx.Node, node: torch.fx.Node) -> int:
    """Return how many terms ``user`` adds to the gradient of ``node``: one for each time that it reads it."""
    if user.op == "output":
        return 1
    return sum(leaf is node for leaf in pytree.tree_leaves((user.args, user.kwargs)))
