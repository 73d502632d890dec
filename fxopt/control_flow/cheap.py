"""Operators that compute one number from others: both sides of an ``and`` of such cost less than a branch."""

from __future__ import annotations

import torch

from fxopt.control_flow import markers

__all__ = ["is_cheap"]

aten = torch.ops.aten
Node = torch.fx.Node

_CHEAP = {
    aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne, aten.add, aten.sub, aten.mul, aten.neg, aten.abs, aten.to,
    aten.logical_and, aten.logical_or, aten.logical_not, aten.detach, aten.reshape, aten.full, aten.where,
    aten.isnan, aten.isinf, aten.isfinite,
}  # fmt: skip


def is_cheap(node: Node) -> bool:
    """Return whether a node computes one number from others, without ever failing."""
    value = node.meta.get("val")
    is_number = not isinstance(value, torch.Tensor) or value.ndim == 0
    inputs = all(getattr(source.meta.get("val"), "ndim", 0) == 0 for source in node.all_input_nodes)
    marker = node.target in markers.MARKERS
    return is_number and inputs and (marker or getattr(node.target, "overloadpacket", None) in _CHEAP)
