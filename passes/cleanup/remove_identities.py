"""Remove calls that return their argument, and merge views of views.

    before:  a = to(x, f32);  b = permute(a, [1, 0]);  c = permute(b, [1, 0]);  d = view(view(c, [4]), [2, 2])
    after:   d = view(x, [2, 2])

Exact: nothing is computed, and what is left has the same strides, so that every kernel reads it in the same order. A
copy stays where someone could tell it from its original (see fxopt.passes.cleanup.memory). ``detach`` stays where it
stops gradients. Dropout goes where it is never active: in a graph that can still be switched to training it stays.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from fxopt.args import arg
from fxopt.contracts import Contract
from fxopt.graph_module import graph_modules
from fxopt.ops import SELECT_MODE
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.memory import same_layout
from fxopt.passes.cleanup.replacement import Replacement
from fxopt.rewriter import Rewriter

__all__ = ["RemoveIdentities", "axis_order", "compose_permutations"]

aten = torch.ops.aten
_DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
_TRANSPOSES: dict[Any, tuple[str, str] | None] = {
    aten.transpose.int: ("dim0", "dim1"),
    aten.swapdims.default: ("dim0", "dim1"),
    aten.swapaxes.default: ("axis0", "axis1"),
    aten.t.default: None,
    aten.permute.default: None,
}
_SIZED_VIEWS: dict[Any, str] = {aten.view.default: "size", aten.reshape.default: "shape"}
_VIEWS = {
    *_SIZED_VIEWS, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten._unsafe_view.default,
}  # fmt: skip
# Eager torch returns the argument itself where these change nothing, so that no gradient takes another way.
_RETURN_THEMSELVES = {
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten.contiguous.default,
}  # fmt: skip
_CANDIDATES = {
    *_VIEWS, *_RETURN_THEMSELVES, aten.alias.default, aten.positive.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default, aten.clone.default, aten.expand.default, aten.expand_as.default,
    aten.broadcast_to.default, aten.slice.Tensor, aten.narrow.default, aten.repeat.default, aten.tile.default,
}  # fmt: skip
_COPIES = {aten.contiguous.default, aten.clone.default}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}


@dataclasses.dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Remove no-op casts, copies, views, permutations, slices and inactive dropout."""

    name: ClassVar[str] = "remove-identities"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for module in graph_modules(rw.gm):
            replace = Replacement(rw, module)
            for node in rw.nodes_of(module):
                if node.op == "call_function":
                    _visit(replace, node)


def _visit(replace: Replacement, node: torch.fx.Node) -> None:
    if node.target in _DROPOUTS:
        _dropout(replace, node)
    elif node.target in _TRANSPOSES:
        _permutation(replace, node)
    elif (source := _returned_argument(replace, node)) is not None:
        _identity(replace, node, source)
    elif node.target in _VIEWS:
        _view(replace, node)


def _name(node: torch.fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _dropout(replace: Replacement, node: torch.fx.Node) -> None:
    modes = node.meta.get("modes", {})
    active = [
        bool(train) and p != 0
        for train, p in zip(
            modes.get("train", [arg(node, "train")] * 2), modes.get("p", [arg(node, "p")] * 2), strict=True
        )
    ]
    if not any(active):
        replace.by_value(node, arg(node, "input"), why="dropout is inactive", is_same_object=True)
    elif not all(active):
        replace.rw.skip(node, "dropout is active while training")


def _returned_argument(replace: Replacement, node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the argument that the call gives back unchanged, or None."""
    if node.target is SELECT_MODE:
        train, evaluation, _ = node.args
        source = train if train is evaluation else None
    elif node.target is aten.cat.default:
        parts = arg(node, "tensors")
        source = parts[0] if len(parts) == 1 else None
    elif node.target in _PADS:
        amounts = arg(node, "pad")
        source = arg(node, "self") if all(isinstance(n, int) and n == 0 for n in amounts) else None
    elif node.target is aten.detach.default:
        source = arg(node, "self")
        source = None if replace.gradients.flow_through(source) else source
    else:
        source = arg(node, "self") if node.target in _CANDIDATES else None
    if not isinstance(source, torch.fx.Node):
        return None
    return source if same_layout(node.meta["val"], source.meta["val"]) else None


def _identity(replace: Replacement, node: torch.fx.Node, source: torch.fx.Node) -> None:
    readers = list(node.users)
    returns_itself = node.target in _RETURN_THEMSELVES
    done = replace.by_value(node, source, why=f"{_name(node)} changes nothing", is_same_object=returns_itself)
    if done and node.target in _COPIES and replace.memory.is_outside(source):
        # The strides of an input are the caller's choice, and a view may have lived off the copy.
        for reader in readers:
            if reader.target is aten.view.default:
                args = (source, arg(reader, "size"))
                new = replace.by_call(reader, aten.reshape.default, args, why=f"{source.name} may have other strides")
                if new is not None:
                    _visit(replace, new)


def _view(replace: Replacement, node: torch.fx.Node) -> None:
    inner = arg(node, "self")
    if inner.op != "call_function" or inner.target not in _VIEWS:
        return
    origin = arg(inner, "self")
    if same_layout(node.meta["val"], origin.meta["val"]):
        replace.by_value(node, origin, why=f"undoes {inner.name}")
    elif node.target in _SIZED_VIEWS and inner.target in _SIZED_VIEWS:
        args = (origin, arg(node, _SIZED_VIEWS[node.target]))
        if replace.keeps_layout(node, aten.reshape.default, args):
            replace.by_call(node, aten.reshape.default, args, why=f"a view of the view {inner.name}")
        else:
            replace.rw.skip(node, f"{inner.name} copies into another order")


def _permutation(replace: Replacement, node: torch.fx.Node) -> None:
    order, source = axis_order(node), arg(node, "self")
    if order == list(range(len(order))):
        replace.by_value(node, source, why="the axes stay in place")
    elif source.op == "call_function" and source.target in _TRANSPOSES:
        joined, origin = compose_permutations(axis_order(source), order), arg(source, "self")
        if joined == list(range(len(joined))):
            replace.by_value(node, origin, why=f"undoes {source.name}")
        else:
            replace.by_call(node, aten.permute.default, (origin, joined), why=f"joined with {source.name}")


def axis_order(node: torch.fx.Node) -> list[int]:
    """Return which axis of its argument each axis of a transposing call is."""
    rank = arg(node, "self").meta["val"].ndim
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in arg(node, "dims")]
    if node.target is aten.t.default:
        return order[::-1]
    names = _TRANSPOSES[node.target]
    if rank and names is not None:
        a, b = (int(arg(node, name)) % rank for name in names)
        order[a], order[b] = order[b], order[a]
    return order


def compose_permutations(first: list[int], second: list[int]) -> list[int]:
    """Return the permutation that equals ``first``, then ``second``."""
    return [first[axis] for axis in second]
