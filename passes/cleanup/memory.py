"""Which values of a graph lie in the same memory, which of it the caller gets, and which of it the graph writes.

Within a functional graph a copy cannot be told from its original, but at the border it can:

    y = clone(x);  return y              the caller may write into y, and must not find x changed
    a = add(x, 1);  b = add(x, 1);  return a, b        the same for a and b
    m = clone(mean);  batch_norm(..., mean, training=True);  z = add(m, 1)        m holds what mean was

So before a pass lets the readers of one value read another, it asks :meth:`Memory.refusal`.
Which values share memory comes from the operators' schemas, and for those that do not tell (``dropout``, ``type_as``)
from the fake values of the trace. Sharing is kept as disjoint sets (Tarjan 1975).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.args import arg, argument_positions, tensor_arg
from fxopt.attributes import get_path, owner_of
from fxopt.effects import has_effect, trains
from fxopt.ops import SELECT_MODE, UPDATE_BUFFER

__all__ = ["Memory", "same_layout"]

aten = torch.ops.aten
# Fresh memory by definition, though the fake value of a constant's copy shares that of the constant.
_COPIES = {aten.clone.default, aten.lift_fresh_copy.default, SELECT_MODE}
# Views where that is possible, copies elsewhere; two calls of the same may give two copies.
_MAY_COPY = {
    aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default, aten.reshape_as.default, aten.ravel.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default,
}  # fmt: skip
_PASSING_ON = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}  # in evaluation
_STATISTICS = ("running_mean", "running_var")


class Memory:
    """The memory of the values of one graph."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        """Args: module: the graph; looked at once, then told of changes by :meth:`join`."""
        self._parent: dict[torch.fx.Node, torch.fx.Node] = {}
        self._outside: set[torch.fx.Node] = set()
        self._returned: set[torch.fx.Node] = set()
        self._written: set[torch.fx.Node] = set()
        self._readers: dict[int, torch.fx.Node] = {}
        for node in module.graph.nodes:
            self._find(node)
        for node in module.graph.nodes:
            self._mark(node)

    def is_written(self, node: torch.fx.Node) -> bool:
        """Return whether the graph writes the memory of ``node``: what it holds depends on when it is read."""
        return self._find(node) in self._written

    def is_returned(self, node: torch.fx.Node) -> bool:
        """Return whether the caller gets the memory of ``node``."""
        return self._find(node) in self._returned

    def is_outside(self, node: torch.fx.Node) -> bool:
        """Return whether ``node`` lies in the memory of an input or of an attribute."""
        return self._find(node) in self._outside

    def refusal(self, node: torch.fx.Node, by: torch.fx.Node) -> str | None:
        """Return why the readers of ``node`` cannot read ``by``, an equal value, instead; None if they can."""
        old, new = self._find(node), self._find(by)
        if old is new:
            copies = node.target in _MAY_COPY and by.target is node.target and old in self._returned
            return f"it may be returned beside {by.name}, in memory of its own" if copies else None
        if new in self._written or old in self._written:
            return f"the graph writes the memory of {by.name}"
        if old in self._returned and new in self._outside:
            return f"it is returned, and must not share the memory of {by.name}, which is not the caller's to write"
        if old in self._returned and new in self._returned:
            return f"it is returned beside {by.name}, in memory of its own"
        return None

    def join(self, node: torch.fx.Node, by: torch.fx.Node) -> None:
        """Note that the readers of ``node`` read ``by`` from now on."""
        old, new = self._find(node), self._find(by)
        if old is not new:
            self._parent[old] = new
            for marked in (self._outside, self._returned, self._written):
                if old in marked:
                    marked.add(new)

    def _find(self, node: torch.fx.Node) -> torch.fx.Node:
        if node not in self._parent:
            self._enter(node)
        root = node
        while self._parent[root] is not root:
            root = self._parent[root]
        while self._parent[node] is not root:
            self._parent[node], node = root, self._parent[node]
        return root

    def _enter(self, node: torch.fx.Node) -> None:
        self._parent[node] = node
        if node.op in ("placeholder", "get_attr"):
            self._outside.add(node)
        if node.op == "get_attr":
            first = self._readers.setdefault(id(get_path(owner_of(node), str(node.target))), node)
            self.join(node, first)
        for source in shared_arguments(node):
            self.join(node, source)

    def _mark(self, node: torch.fx.Node) -> None:
        if node.op == "output":
            self._returned |= {self._find(source) for source in node.all_input_nodes}
        elif node.op == "call_function" and has_effect(node):
            self._written |= {self._find(source) for source in written_arguments(node)}


def written_arguments(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the values into whose memory a call with an effect writes."""
    if isinstance(node.target, HigherOrderOperator):
        yield from node.all_input_nodes
    elif node.target is UPDATE_BUFFER:
        yield arg(node, "buffer")
    elif isinstance(node.target, OpOverload):
        names = [name for name in _STATISTICS if name in argument_positions(node.target)]
        yield from (source for name in names if isinstance(source := arg(node, name), torch.fx.Node))


def shared_arguments(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the arguments in whose memory the result of a call may lie."""
    if node.op != "call_function" or node.target in _COPIES:
        return
    if isinstance(node.target, HigherOrderOperator) or node.target is operator.getitem:
        yield from (source for source in node.all_input_nodes if _holds_tensors(source))
    elif isinstance(node.target, OpOverload):
        viewed = [a.name for a in node.target._schema.arguments if a.alias_info and not a.alias_info.is_write]
        for name in viewed:
            yield from (item for item in _listed(arg(node, name)) if isinstance(item, torch.fx.Node))
        if node.target in _PASSING_ON and not trains(node):
            yield tensor_arg(node, "input")  # torch 2.13 traces a copy here, and runs none
        elif not viewed:
            own = _storages(node)
            yield from (source for source in node.all_input_nodes if own & _storages(source))


def same_layout(x: Any, y: Any) -> bool:
    """Return whether both values certainly agree in type, sizes and strides, so that every kernel reads them alike.

    Symbolic sizes must be the same expression. The stride of an axis of size 1 does not count.
    """
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if (x.dtype, x.device, x.layout, x.ndim) != (y.dtype, y.device, y.layout, y.ndim):
        return False
    if any(str(p) != str(q) for p, q in zip(x.shape, y.shape, strict=True)):
        return False
    if x.layout != torch.strided:
        return True
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    return all(str(p) == str(q) for size, p, q in strides if not (isinstance(size, int) and size == 1))


def _listed(item: Any) -> list[Any]:
    return list(item) if isinstance(item, list | tuple) else [item]


def _holds_tensors(node: torch.fx.Node) -> bool:
    return any(isinstance(item, torch.Tensor) for item in _listed(node.meta.get("val")))


def _storages(node: torch.fx.Node) -> set[StorageWeakRef]:
    tensors = [item for item in _listed(node.meta.get("val")) if isinstance(item, torch.Tensor)]
    return {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors if tensor.layout == torch.strided}
