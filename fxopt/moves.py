"""Operators that move elements or choose among them, and compute none."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["base_name", "is_move", "is_noiseless", "name_of"]

_MOVES = {
    "alias", "as_strided", "chunk", "clone", "contiguous", "detach", "diagonal", "dropout", "expand", "expand_as",
    "feature_dropout", "flatten", "flip", "gather", "getitem", "index_select", "lift_fresh", "lift_fresh_copy",
    "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "positive", "ravel", "repeat",
    "repeat_interleave", "reshape", "roll", "rot90", "select", "slice", "split", "split_with_sizes", "squeeze",
    "swapaxes", "swapdims", "t", "take", "take_along_dim", "tensor_split", "tile", "transpose", "tril", "triu",
    "unbind", "unflatten", "unfold", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "channel_shuffle",
}  # fmt: skip
_NOISELESS = _MOVES | {
    "abs", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax", "amin", "argmax", "argmin", "argsort", "cat",
    "concat", "constant_pad_nd", "embedding", "index", "index_put", "masked_fill", "masked_select", "max",
    "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "min", "minimum", "neg", "pad", "relu", "scatter",
    "slice_scatter", "select_scatter", "sign", "sort", "stack", "topk", "where", "select_mode", "eq", "ne", "lt", "le",
    "gt", "ge", "isnan", "isinf", "isfinite", "nonzero", "logical_not", "logical_and", "logical_or", "fmax", "fmin",
    "zeros_like", "ones_like", "new_zeros", "new_ones",
}  # fmt: skip


def name_of(target: Any) -> str:
    """Return the name of an operator without namespace and overload: ``"softmax"`` of ``aten.softmax.int``."""
    if isinstance(target, OpOverload):
        return str(target._schema.name.split("::")[1])
    return str(getattr(target, "__name__", target))


def base_name(node: torch.fx.Node) -> str:
    """Return the name of a node's operator; see :func:`name_of`."""
    return name_of(node.target)


def is_move(node: torch.fx.Node) -> bool:
    """Return whether a node only moves elements of one tensor, so that it works in whatever type this has."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or base_name(node) not in _MOVES:
        return False
    values = [source.meta.get("val") for source in node.all_input_nodes]
    return sum(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values) <= 1


def is_noiseless(node: torch.fx.Node) -> bool:
    """Return whether each element that a node yields is one that it reads, its negative, or no float: none rounds."""
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and base_name(node) in _NOISELESS)
