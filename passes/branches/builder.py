"""Make new sides of branches from nodes of existing ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fxopt.attributes import attach, fresh_name, get_path, owner_of

__all__ = ["SideBuilder"]

Node = torch.fx.Node


class SideBuilder:
    """Builds the graph of one side; what it reads from around becomes a placeholder each.

    Attributes:
        outer: The nodes of the graph around that the side gets, in order; fixed from the start, so that both sides of
            a branch get the same.
    """

    def __init__(self, outer: Sequence[Node]) -> None:
        self.outer = list(outer)
        self.graph = torch.fx.Graph()
        self.root = torch.nn.Module()
        self.env: dict[Node, Node] = {}
        for node in outer:
            self.env[node] = self.graph.placeholder(node.name)
            self.env[node].meta = {"val": node.meta["val"]}

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

    def finished(self, results: Sequence[Any]) -> torch.fx.GraphModule:
        """Return the graph, yielding ``results``: nodes of it."""
        given = set(self.env.values())
        listed: list[Any] = []
        for result in results:
            if isinstance(result, Node) and (result in given or result in listed):
                copy = self.graph.call_function(torch.ops.aten.clone.default, (result,))
                copy.meta = {key: result.meta[key] for key in ("val", "stack_trace") if key in result.meta}
                result = copy
            listed.append(result)
        self.graph.output(tuple(listed))
        return torch.fx.GraphModule(self.root, self.graph, "Region")
