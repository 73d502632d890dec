"""Images with the channels last, in graphs where nobody asks how values lie in memory."""

from __future__ import annotations

import torch

from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule, graph_modules

__all__ = ["channels_last", "takes_any_layout"]

_ASKING = ("view", "as_strided", "view_as", "view_as_real", "view_as_complex")  # refuse a layout that does not fit


def takes_any_layout(gm: CapturedModule) -> bool:
    """Return whether no call of a graph, or of one inside it, asks how what it reads lies in memory."""
    calls = (node for module in graph_modules(gm) for node in module.graph.nodes if node.op == "call_function")
    return not any(map(_asks_for_layout, calls))


def channels_last(sample: Sample) -> Sample:
    """Return a sample whose images lie with the channels last: convolutions of torch are up to twice as fast then."""
    return sample.with_leaves(
        [
            leaf.contiguous(memory_format=torch.channels_last)
            if isinstance(leaf, torch.Tensor) and leaf.ndim == 4
            else leaf
            for leaf in sample.leaves()
        ]
    )


def _asks_for_layout(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    namespace, _, name = node.target._schema.name.partition("::")
    source = node.args[0] if node.args else None
    if name == "view" and isinstance(source, torch.fx.Node) and source.target is torch.ops.aten.contiguous.default:
        return False
    return namespace != "aten" or name in _ASKING
