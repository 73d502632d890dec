"""Remove calls that return their argument, and merge views of views.

    before:  a = to(x, f32);  b = permute(a, [1, 0]);  c = permute(b, [1, 0]);  d = view(view(c, [4]), [2, 2])
    after:   d = view(x, [2, 2])

Exact: nothing is computed. In a functional graph nobody can tell a copy from the original, so that ``clone`` and
``contiguous`` are identities as well. ``detach`` is none: it stops gradients. Dropout is one where it can never be
active: in a graph that can still be switched to training it stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fxopt.args import arg
from fxopt.contracts import Contract
from fxopt.effects import is_random
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["RemoveIdentities", "compose_permutations"]

aten = torch.ops.aten
_MAX = 2**63 - 1
_VIEWS = {aten.view.default, aten.reshape.default}
_TRANSPOSES = {aten.transpose.int, aten.t.default, aten.permute.default, aten.swapaxes.default}


@dataclasses.dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Remove no-op casts, copies, views, permutations, slices and inactive dropout."""

    name: ClassVar[str] = "remove-identities"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for node in rw.nodes():
            if node.op != "call_function":
                continue
            if node.target in _DROPOUTS:
                _dropout(rw, node)
            elif node.target in _TRANSPOSES:
                _permutation(rw, node)
            elif (rule := _RULES.get(node.target)) is not None:
                source = arg(node, "self")
                if rule(node, source):
                    rw.replace_value(node, source, why=f"{_name(node)} changes nothing")
                elif node.target in _VIEWS and source.op == "call_function" and source.target in _VIEWS:
                    size = arg(node, "size" if node.target is aten.view.default else "shape")
                    rw.replace_call(
                        node, aten.reshape.default, (arg(source, "self"), size), why=f"a view of the view {source.name}"
                    )


def _name(node: torch.fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _dropout(rw: Rewriter, node: torch.fx.Node) -> None:
    if "modes" in node.meta:
        rw.skip(node, "dropout is active while training")
    elif not is_random(node) or arg(node, "p") == 0:
        rw.replace_value(node, arg(node, "input"), why="dropout is inactive")


def _same_type(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    a, b = node.meta["val"], source.meta["val"]
    return bool(a.dtype == b.dtype and a.device == b.device and a.layout == b.layout)


def _same_shape(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Return whether both have the same sizes for certain; symbolic ones must be the same expression."""
    a, b = node.meta["val"], source.meta["val"]
    return _same_type(node, source) and [str(size) for size in a.shape] == [str(size) for size in b.shape]


def _same_layout(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Return whether strides agree too: a later ``view`` may live off the copy."""
    a, b = node.meta["val"], source.meta["val"]
    return _same_shape(node, source) and [str(s) for s in a.stride()] == [str(s) for s in b.stride()]


def _whole_slice(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    start, end, step = (arg(node, name) for name in ("start", "end", "step"))
    if start not in (0, None) or step != 1:
        return False
    size = source.meta["val"].shape[arg(node, "dim")]
    return end is None or (isinstance(end, int) and (end == _MAX or (isinstance(size, int) and end >= size)))


def _no_padding(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    return all(isinstance(amount, int) and amount == 0 for amount in arg(node, "pad"))


_RULES: dict[Any, Callable[[torch.fx.Node, torch.fx.Node], bool]] = {
    aten.to.dtype: _same_shape,
    aten.to.device: _same_shape,
    aten.to.dtype_layout: _same_shape,
    aten.to.other: _same_shape,
    aten.type_as.default: _same_shape,
    aten.contiguous.default: _same_layout,
    aten.clone.default: _same_layout,
    aten.alias.default: _same_shape,
    aten.positive.default: _same_shape,
    aten.lift_fresh.default: _same_shape,
    aten.view.default: _same_shape,
    aten.reshape.default: _same_shape,
    aten.flatten.using_ints: _same_shape,
    aten.squeeze.dim: _same_shape,
    aten.squeeze.default: _same_shape,
    aten.expand.default: _same_shape,
    aten.expand_as.default: _same_shape,
    aten.slice.Tensor: _whole_slice,
    aten.pad.default: _no_padding,
    aten.constant_pad_nd.default: _no_padding,
}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


def _permutation(rw: Rewriter, node: torch.fx.Node) -> None:
    order = axis_order(node)
    source = arg(node, "self")
    if order == list(range(len(order))):
        rw.replace_value(node, source, why="the axes stay in place")
    elif source.op == "call_function" and source.target in _TRANSPOSES:
        joined = compose_permutations(axis_order(source), order)
        origin = arg(source, "self")
        if joined == list(range(len(joined))):
            rw.replace_value(node, origin, why=f"undoes {source.name}")
        else:
            rw.replace_call(node, aten.permute.default, (origin, joined), why=f"joined with {source.name}")


def axis_order(node: torch.fx.Node) -> list[int]:
    """Return which axis of its argument each axis of a transposing call is."""
    rank = arg(node, "self").meta["val"].ndim
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in arg(node, "dims")]
    if node.target is aten.t.default:
        return order[::-1]
    first, second = ("dim0", "dim1") if node.target is aten.transpose.int else ("axis0", "axis1")
    if rank:
        a, b = int(arg(node, first)) % rank, int(arg(node, second)) % rank
        order[a], order[b] = order[b], order[a]
    return order


def compose_permutations(first: list[int], second: list[int]) -> list[int]:
    """Return the permutation that equals ``first``, then ``second``."""
    return [first[axis] for axis in second]
