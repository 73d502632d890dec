"""Make one call of the attention of several heads, with the views and transpositions around it.

    before:  q = transpose(view(query, [N, L, heads, E]), 1, 2), k and v alike
             y = reshape(transpose(scaled_dot_product_attention(q, k, v, mask), 1, 2), [N, L, heads * E])
    after:   y = multi_head_attention(query, key, value, mask, heads)

The same kernels on the same numbers. In a file it is ONNX Runtime's operator MultiHeadAttention, which splits the heads
on the way; a runtime that knows only the operators of ONNX does not know it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from fxopt.args import arg, tensor_arg
from fxopt.attention_ops import MULTI_HEAD_ATTENTION
from fxopt.contracts import Contract
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.remove_identities import axis_order
from fxopt.rewriter import Rewriter

__all__ = ["FuseAttention"]

aten = torch.ops.aten
Node = torch.fx.Node

_ATTENTION = aten.scaled_dot_product_attention.default
_HEADS_FIRST = [0, 2, 1, 3]
_TRANSPOSES = {aten.transpose.int, aten.permute.default}
_COPIES = {aten.contiguous.default, aten.clone.default}
_VIEWS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default}
_SPLITS = {*_VIEWS, aten.unflatten.int}


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse attention with the splitting of its inputs and the joining of its result."""

    name: ClassVar[str] = "fuse-attention"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for node in rw.calls(_ATTENTION):
            try:
                _fuse(rw, node)
            except _OtherFormError as reason:
                rw.skip(node, str(reason))


class _OtherFormError(Exception):
    """Why a call of attention is left as it is."""


def _fuse(rw: Rewriter, node: Node) -> None:
    if arg(node, "dropout_p") or any(node.meta.get("modes", {}).get("dropout_p", ())):
        raise _OtherFormError("dropout is active while training")
    if arg(node, "enable_gqa"):
        raise _OtherFormError("several heads of the query share one of the keys")
    if rw.dtype(node) is not torch.float32:
        raise _OtherFormError(f"it computes in {rw.dtype(node)}, which ONNX Runtime has no kernel for")
    result = _joined(node)
    query, key, value = (_split_heads(tensor_arg(node, name)) for name in ("query", "key", "value"))
    mask = arg(node, "attn_mask")
    if mask is not None and not _serves_all_heads(mask):
        raise _OtherFormError("its mask tells heads apart, or has another rank")
    heads = tensor_arg(node, "query").meta["val"].shape[1]
    args = (query, key, value, mask, heads, arg(node, "scale"), arg(node, "is_causal"))
    rw.replace_call(result, MULTI_HEAD_ATTENTION, args, why=f"{heads} heads of attention in one call", sources=[node])


def _split_heads(part: Node) -> Node:
    """Return what is split into heads: the value with axes [N, L, heads * E] behind ``part`` with [N, heads, L, E]."""
    split = _transposed(part, "its inputs are not the transposed parts of one axis")
    if split.target not in _SPLITS:
        raise _OtherFormError("its inputs are not views")
    whole = tensor_arg(split, "self")
    outer, inner = whole.meta["val"].shape, split.meta["val"].shape
    if len(outer) != 3 or len(inner) != 4 or not _same(outer[:2], inner[:2]):
        raise _OtherFormError("the heads are not parts of the last of three axes")
    if not isinstance(inner[2], int) or not isinstance(inner[3], int):
        raise _OtherFormError("the number of heads is dynamic")
    return whole


def _joined(node: Node) -> Node:
    """Return the call that puts the heads of the result side by side."""
    back = _only_reader(node)
    if _transposed(back, "its result is not transposed back") is not node:
        raise _OtherFormError("its result is not transposed back")
    joined = _only_reader(back)
    if joined.target in _COPIES:
        joined = _only_reader(joined)
    inner, outer = back.meta["val"].shape, joined.meta["val"].shape if joined.target in _VIEWS else ()
    if len(outer) != 3 or not _same(inner[:2], outer[:2]):
        raise _OtherFormError("the heads of its result are not put side by side")
    return joined


def _transposed(node: Node, otherwise: str) -> Node:
    """Return what ``node`` is with its axes 1 and 2 exchanged."""
    if node.target not in _TRANSPOSES or axis_order(node) != _HEADS_FIRST:
        raise _OtherFormError(otherwise)
    return tensor_arg(node, "self")


def _only_reader(node: Node) -> Node:
    if len(node.users) != 1:
        raise _OtherFormError(f"{node.name} has more than one reader")
    return next(iter(node.users))


def _serves_all_heads(mask: Node) -> bool:
    shape = mask.meta["val"].shape
    return len(shape) in (2, 4) and (len(shape) < 3 or str(shape[1]) == "1")


def _same(sizes: Any, others: Any) -> bool:
    return [str(size) for size in sizes] == [str(size) for size in others]
