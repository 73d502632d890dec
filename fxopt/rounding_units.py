"""Which type the digits of an output come from: that in which it was rounded, not always that in which it is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.moves import base_name, is_noiseless

__all__ = ["rounding_units"]

_CASTS = ("to", "_to_copy", "type_as")
_FINEST = torch.finfo(torch.float64).eps


def rounding_units(gm: torch.fx.GraphModule) -> list[float]:
    """Return for each flat output of a graph the eps of the coarsest type in which it was rounded; 0 if in none.

    What was computed in float32 and is returned as float64 has the digits of float32; so has what float64 computes from
    such numbers. Of float16 and bfloat16 casts alone count: float32 that computes from them may average their errors
    away, and is held to its own eps.
    """
    known: dict[torch.fx.Node, float] = {}
    for node in gm.graph.nodes:
        known[node] = _unit(node, known)
    leaves = pytree.tree_leaves(gm.graph.output_node().args[0])
    return [known[leaf] if isinstance(leaf, torch.fx.Node) else 0.0 for leaf in leaves]


def _unit(node: torch.fx.Node, known: dict[torch.fx.Node, float]) -> float:
    if node.op != "call_function":
        return 0.0  # given, and exact
    before = max((known[source] for source in node.all_input_nodes), default=0.0)
    own = max((_eps(value) for value in pytree.tree_leaves(node.meta.get("val"))), default=0.0)
    if is_noiseless(node):
        return before
    return max(own, before) if own == _FINEST or base_name(node) in _CASTS else own


def _eps(value: Any) -> float:
    is_float = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return torch.finfo(value.dtype).eps if is_float else 0.0
