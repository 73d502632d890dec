"""Compute each value once.

    before:  a = relu(x);  b = relu(x);  return add(a, b)
    after:   a = relu(x);  return add(a, a)

Exact: a pure call of the same operator on the same values gives the same bits. Random and effectful calls are never
merged, nor calls whose mode-dependent arguments differ. Values are numbered in one walk (Cocke 1970, Global Common
Subexpression Elimination).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import torch

from fxopt.contracts import Contract
from fxopt.effects import is_pure
from fxopt.graph_module import graph_modules
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["MergeCommonSubexpressions"]


@dataclasses.dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Let equal pure calls, and reads of the same attribute, become one."""

    name: ClassVar[str] = "merge-common-subexpressions"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it, each on its own."""
        for module in graph_modules(rw.gm):
            known: dict[Hashable, torch.fx.Node] = {}
            written = written_attributes(module.graph)
            for node in rw.nodes_of(module):
                key = value_number(node)
                if key is None or (node.op == "get_attr" and str(node.target) in written):
                    continue
                first = known.setdefault(key, node)
                if first is not node:
                    rw.replace_value(node, first, why=f"equals {first.name}")


def written_attributes(graph: torch.fx.Graph) -> set[str]:
    """Return the attributes that some call of the graph writes: a read of these may yield different values."""
    return {
        str(source.target)
        for node in graph.nodes
        if node.op == "call_function" and not is_pure(node)
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }


def value_number(node: torch.fx.Node) -> Hashable | None:
    """Return a key that two nodes share only if they yield the same value; None if the node must stay as it is."""
    if node.op == "get_attr":
        return ("get_attr", str(node.target)) if isinstance(node.meta.get("val"), torch.Tensor) else None
    if node.op != "call_function" or not is_pure(node):
        return None
    try:
        key = (node.target, _key(node.args), _key(node.kwargs), _key(node.meta.get("modes", {})))
        hash(key)
    except TypeError:
        return None
    return key


def _key(item: Any) -> Hashable:
    """Return the argument as something hashable in which 1, 1.0 and True differ, and 0.0 and -0.0 too."""
    if isinstance(item, list | tuple):
        return (type(item).__name__, *(_key(part) for part in item))
    if isinstance(item, dict):
        return tuple((key, _key(part)) for key, part in sorted(item.items()))
    if isinstance(item, torch.fx.Node):
        return item
    if isinstance(item, slice):
        return ("slice", _key(item.start), _key(item.stop), _key(item.step))
    if isinstance(item, float):
        return ("float", item.hex())
    return (type(item).__name__, item)
