"""What one node costs on the example inputs: the bytes that it yields, and its multiply-accumulates.

Dynamic sizes count with the value that they have in the first sample. A multiply-accumulate is one product that is
added to a sum: half of what ``torch.utils.flop_counter`` counts, whose formulas these are. Biases and pointwise
operators count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.args import size_text
from fxopt.errors import InvariantError
from fxopt.graph_module import CapturedModule, size_of
from fxopt.grouped_ops import GROUPED_MM
from fxopt.layer_operators import CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS

__all__ = ["NodeCosts"]

aten = torch.ops.aten
_VECTOR_PRODUCTS = {aten.mv.default, aten.dot.default}  # torch's counter has no formula for them, or for groups
_PRODUCTS = {
    *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *RECURRENT, aten.linear.default, aten.matmul.default, aten.mm.default,
    aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.einsum.default,
    aten.scaled_dot_product_attention.default, GROUPED_MM,
}  # fmt: skip


class NodeCosts:
    """Counts for the nodes of one graph and of the graphs inside it."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        """Args: gm: captured, or with ``meta["val"]`` on its nodes; of others nothing is known."""
        self._names, self._sizes = _example_sizes(gm)
        self._known: dict[str, int | None] = {}

    def bytes(self, node: torch.fx.Node) -> int | None:
        """Return the bytes of the tensors that a node yields; None where a size is not known before it runs."""
        total = 0
        found = _value_of(node)
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                shape = self._shape(tensor)
                if shape is None:
                    return None
                total += math.prod(shape) * tensor.element_size()
        return total if found is not None else None

    def macs(self, node: torch.fx.Node) -> int | None:
        """Return the multiply-accumulates of a node; None where they are not known: its sizes, or what it calls."""
        if node.op in ("placeholder", "get_attr", "output"):
            return 0
        if not isinstance(node.target, OpOverload):
            return None
        if node.target not in _PRODUCTS | _VECTOR_PRODUCTS:
            return 0
        unknown = False

        def concrete(source: torch.fx.Node) -> Any:
            nonlocal unknown
            found = _value_of(source)
            if not isinstance(found, torch.Tensor):
                return found
            shape = self._shape(found)
            unknown = unknown or shape is None
            return torch.empty(shape or (), dtype=found.dtype, device="meta")

        given: Any = torch.fx.map_arg((node.args, node.kwargs), concrete)
        args, kwargs = given
        if unknown:
            return None
        if node.target in _VECTOR_PRODUCTS:
            return int(args[0].numel())
        if node.target is GROUPED_MM:
            return int(args[0].numel()) * int(args[1].shape[2])
        from torch.utils.flop_counter import FlopCounterMode  # it loads triton

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            node.target(*args, **kwargs)
        return int(counter.get_total_flops()) // 2

    def _shape(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
        sizes = [self._size(size) for size in tensor.shape]
        return None if None in sizes else tuple(size for size in sizes if size is not None)

    def _size(self, size: Any) -> int | None:
        if isinstance(size, int):
            return size
        text = size_text(size, self._names)
        if text not in self._known:
            try:
                self._known[text] = size_of(text, self._sizes)
            except InvariantError:  # it depends on the values of tensors
                self._known[text] = None
        return self._known[text]


def _value_of(node: torch.fx.Node) -> Any:
    return node.meta.get("val")


def _example_sizes(gm: torch.fx.GraphModule) -> tuple[dict[str, str], Mapping[str, int]]:
    if not isinstance(gm, CapturedModule) or not gm.samples:
        return {}, {}
    sample = gm.samples[0]
    return gm.symbol_names, gm.sizes_of(gm.flatten_inputs(*sample.args, **sample.kwargs))


def argument_sources(node: torch.fx.Node) -> list[tuple[str, torch.fx.Node]]:
    """Return each node that a node reads with the name of the argument: ``self``, ``tensors[1]``, or a position."""
    names: list[str] = []
    if isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    given = [(names[i] if i < len(names) else f"args[{i}]", held) for i, held in enumerate(node.args)]
    return [pair for name, held in (*given, *node.kwargs.items()) for pair in _leaves(name, held)]


def _leaves(name: str, held: Any) -> list[tuple[str, torch.fx.Node]]:
    if isinstance(held, torch.fx.Node):
        return [(name, held)]
    if isinstance(held, list | tuple):
        return [pair for i, item in enumerate(held) for pair in _leaves(f"{name}[{i}]", item)]
    if isinstance(held, dict):
        return [pair for key, item in held.items() for pair in _leaves(f"{name}[{key!r}]", item)]
    return []


__all__ += ["argument_sources"]
