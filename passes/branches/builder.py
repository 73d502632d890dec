"""Make new sides of branches from nodes of existing ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fxopt.attributes import attach, fresh_name, get_path, owner_of
from fxopt.passes.branches.sides import Branch
from fxopt.regions import add_placeholders, add_results, results_of

__all__ = ["SideBuilder"]

Node = torch.fx.Node


class SideBuilder:
    """Builds the graph of one side; what it reads from around becomes a placeholder each."""

    def __init__(self, outer: Sequence[Node]) -> None:
        """Args: outer: what the side gets; fixed from the start, so that both sides of a branch get the same."""
        self.graph = torch.fx.Graph()
        self.root = torch.nn.Module()
        self.env = add_placeholders(self.graph, outer)

    def add(self, nodes: Iterable[Node], bound: Mapping[Node, Any]) -> dict[Node, Any]:
        """Copy nodes of another graph, in order.

        Args:
            nodes: Nodes to copy; what they read is among them, in ``bound``, or among ``outer``.
            bound: What placeholders of the other graph stand for: nodes of this one, or numbers.

        Returns:
            What each of the other graph's nodes is in this one.
        """
        env: dict[Node, Any] = {**self.env, **bound}
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in env and source.op == "get_attr":  # the graphs of a branch or loop
                    env[source] = self._read(source)
            env[node] = self._read(node) if node.op == "get_attr" else self._copy(node, env)
        return env

    def _copy(self, node: Node, env: Mapping[Node, Any]) -> Node:
        copy = self.graph.node_copy(node, lambda source: env[source])
        copy.meta = dict(node.meta)
        return copy

    def _read(self, node: Node) -> Node:
        """Read the tensor or graph that ``node`` reads, under a name of its own."""
        found = get_path(owner_of(node), str(node.target))
        path = fresh_name(self.root, str(node.target).replace(".", "_"), ())
        if isinstance(found, torch.nn.Module):
            self.root.add_module(path, found)
        else:
            attach(self.root, path, found)
        read = self.graph.get_attr(path)
        read.meta = dict(node.meta)
        return read

    def add_side(self, branch: Branch, side: bool, around: Mapping[Node, Any] | None = None) -> list[Any]:
        """Copy one side of a branch, and return what it yields.

        Args:
            branch: The branch.
            side: Which side.
            around: What the nodes around the branch are in this graph; its placeholders if not given.
        """
        known: Mapping[Node, Any] = self.env if around is None else around
        bound = {inner: known.get(given, given) for inner, given in branch.bound(side).items()}
        env = self.add(branch.inner(side), bound)
        return [env[result] for result in results_of(branch.side(side))]

    def finished(self, results: Sequence[Any]) -> torch.fx.GraphModule:
        """Return the graph, yielding ``results``: nodes of it."""
        add_results(self.graph, results)
        return torch.fx.GraphModule(self.root, self.graph, "Region")
