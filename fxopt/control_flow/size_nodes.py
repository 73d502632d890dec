"""Nodes that compute sizes from those of a graph's inputs, wherever in the graph the sizes were computed before."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = ["SizeNodes"]

Node = torch.fx.Node
_SIZE = torch.ops.aten.sym_size.int


class SizeNodes:
    """Makes nodes, behind the inputs of a graph, for torch's expressions of their sizes."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._graph = graph
        self._first = next(node for node in graph.nodes if node.op != "placeholder")
        self._known: dict[Any, Node | int] = {}
        self._axes: dict[Any, tuple[Node, int]] = {}
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self._axes.setdefault(size.node.expr, (node, axis))

    def can_make(self, size: Any) -> bool:
        """Return whether all that a dynamic size comes from are sizes of inputs."""
        return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols <= self._axes.keys())

    def node(self, size: torch.SymInt) -> Node:
        """Return the node that computes a dynamic size."""
        found = self._computed(size.node.expr)
        assert isinstance(found, Node)
        return found

    def difference(self, a: Any, b: Any) -> Node | int:
        """Return what computes ``a - b``; a number, if it is one."""
        expressions = (size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in (a, b))
        return self._computed(operator.sub(*expressions))

    def _computed(self, expression: Any) -> Node | int:
        if expression.is_Integer:
            return int(expression)
        if expression not in self._known:
            before = self._first.prev
            with self._graph.inserting_before(self._first):
                symbols = {symbol: torch.fx.Proxy(self._size(symbol)) for symbol in expression.free_symbols}
                computed = sympy_interp(PythonReferenceAnalysis, symbols, expression).node
            node = before.next
            while node is not self._first:
                node.meta["val"] = _value(node)
                node = node.next
            self._known[expression] = computed
        return self._known[expression]

    def _size(self, symbol: Any) -> Node:
        if symbol not in self._known:
            self._known[symbol] = self._graph.call_function(_SIZE, self._axes[symbol])
        found = self._known[symbol]
        assert isinstance(found, Node)
        return found


def _value(node: Node) -> Any:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    target: Any = node.target
    return target(*args, **kwargs)
