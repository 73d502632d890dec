"""What two graphs have in common that differ by a rewrite, which keeps the names of what it leaves alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from fxopt.attributes import get_path, owner_of

__all__ = ["are_alike", "behind", "call_form", "changed_nodes"]

Node = torch.fx.Node


def are_alike(node: Node, twin: Node) -> bool:
    """Return whether two nodes yield one tensor each, of the same type and sizes, which is no tensor of the model."""
    a, b = node.meta.get("val"), twin.meta.get("val")
    if {node.op, twin.op} - {"placeholder", "call_function"}:
        return False
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False
    return [str(size) for size in a.shape] == [str(size) for size in b.shape]  # as text: see same_value_type


def changed_nodes(gm: torch.fx.GraphModule, other: torch.fx.GraphModule) -> set[Node]:
    """Return the nodes of the first graph that the second one lacks, or has with another call or tensor."""
    others = {node.name: node for node in other.graph.nodes}
    return {
        node
        for node in gm.graph.nodes
        if node.op != "output" and (node.name not in others or not _is_same(node, others[node.name]))
    }


def _is_same(node: Node, twin: Node) -> bool:
    if node.op != twin.op or node.target != twin.target:
        return False
    if node.op != "get_attr":
        return bool(_by_name(node) == _by_name(twin))
    a, b = (get_path(owner_of(each), str(each.target)) for each in (node, twin))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
    if not isinstance(a, torch.fx.GraphModule) or not isinstance(b, torch.fx.GraphModule):
        return False
    same_results = _by_name(a.graph.output_node()) == _by_name(b.graph.output_node())
    return bool(same_results) and not changed_nodes(a, b) and not changed_nodes(b, a)


def _by_name(node: Node) -> Any:
    form, reads = call_form(node)
    return form, [source.name for source in reads]


def call_form(node: Node) -> tuple[Any, list[Node]]:
    """Return the arguments of a node with a mark in the place of each value that it reads, and these in order."""
    reads: list[Node] = []

    def marked(source: Node) -> str:
        reads.append(source)
        return "%"

    return torch.fx.map_arg((node.args, dict(node.kwargs)), marked), reads


def behind(gm: Any, first: Collection[Node]) -> set[Node]:
    """Return these nodes of a graph, and all that depend on them."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node in first or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
