"""Calls that give a tensor other axes in place, such as ``x.squeeze_(1)``, become those that return a view.

    before:  y = exp(x);  z = squeeze_(y, 1);  add_(z, 1)
    after:   y = exp(x);  z = squeeze(y, 1);  add_(z, 1)

Nothing is written into memory: the tensor is the same, and what was a view of it before keeps its own axes. A trace
names the tensor by the result of the call from there on. So it is exact, unless somebody else holds the tensor, too:
the caller of the model, for an input, or the model itself from one call to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.args import source_line
from fxopt.effects import is_in_place
from fxopt.errors import CaptureError, describe

__all__ = ["as_views", "refusal", "storage_of"]

_aten = torch.ops.aten
_VIEWS: dict[Any, OpOverload] = {
    _aten.squeeze_.default: _aten.squeeze.default,
    _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.squeeze_.dims: _aten.squeeze.dims,
    _aten.unsqueeze_.default: _aten.unsqueeze.default,
    _aten.transpose_.default: _aten.transpose.int,
    _aten.swapaxes_.default: _aten.swapaxes.default,
    _aten.swapdims_.default: _aten.swapdims.default,
    _aten.t_.default: _aten.t.default,
}
_MAY_RETURN_ARGUMENT = {
    _aten.contiguous.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other,
    _aten.type_as.default, _aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout.default, _aten.positive.default,
}  # fmt: skip


def as_views(graph: torch.fx.Graph) -> None:
    """Let each call that moves axes in place return a view.

    Args:
        graph: ATen graph as it was traced.

    Raises:
        CaptureError: the tensor is an input, a parameter or a buffer.
    """
    moves = [node for node in graph.nodes if node.target in _VIEWS]
    for node in moves:
        held = _holder(node)
        if held.op != "call_function":
            raise refusal(node, f"it gives {held.target!r} other axes, which the next call or the caller would see")
    for node in moves:
        node.target = _VIEWS[node.target]


def refusal(node: torch.fx.Node, reason: str, **rows: str | None) -> CaptureError:
    """Return the error that says why the in-place op ``node`` cannot become functional."""
    target = (
        node.target._schema.name.removeprefix("aten::") if isinstance(node.target, OpOverload) else str(node.target)
    )
    return CaptureError(
        describe(
            f"in-place op {target!r} cannot become part of a functional graph: {reason}",
            source=source_line(node) or "(unknown line)",
            **rows,
            try_="write into a copy: y = x.clone(), then modify y; or use the op that returns a new tensor",
        )
    )


def _holder(node: Any) -> torch.fx.Node:
    """Return what first yielded the tensor object that a node stands for.

    Calls in place return their argument, and so do some others if there is nothing to do.
    """
    while is_in_place(node.target) or _returns_argument(node):
        node = node.args[0]
    found: torch.fx.Node = node
    return found


def _returns_argument(node: torch.fx.Node) -> bool:
    return node.target in _MAY_RETURN_ARGUMENT and storage_of(node) == storage_of(node.all_input_nodes[0])


def storage_of(node: torch.fx.Node) -> StorageWeakRef | None:
    """Return the memory of a value, or of the first of several; None if it is no tensor."""
    found = node.meta.get("val")
    if isinstance(found, list | tuple) and found and isinstance(found[0], torch.Tensor):
        found = found[0]
    return StorageWeakRef(found.untyped_storage()) if isinstance(found, torch.Tensor) else None
