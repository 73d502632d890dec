"""Which axes of a weight are its layer's inputs and outputs, read off the operators that use it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxopt.attributes import get_path, owner_of
from fxopt.graph_module import CapturedModule
from fxopt.layer_operators import CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS
from fxopt.passes.prune.masks import masked_parts
from fxopt.regions import body_of

__all__ = ["layer_axes", "prunable_weights"]

aten = torch.ops.aten
_ROWS = (aten.linear.default, *CONVOLUTIONS)
_PRODUCTS = {aten.matmul.default, aten.mm.default, aten.bmm.default}


def prunable_weights(gm: CapturedModule) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of floating-point numbers, with two axes or more, that the graph reads, by first name."""
    read = {
        id(get_path(owner_of(node), str(node.target)))
        for module in gm.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "get_attr" and node.users
    }
    return {
        name: parameter
        for name, parameter in gm.named_parameters()
        if id(parameter) in read and parameter.ndim > 1 and parameter.is_floating_point()
    }


def layer_axes(gm: CapturedModule) -> dict[str, tuple[int, int]]:
    """Return the axes of inputs and of outputs of each weight that a layer sums over, by name of the parameter.

    A weight that several operators read in different ways is left out, and so is one that none sums over, such as an
    embedding.
    """
    names = {id(parameter): name for name, parameter in prunable_weights(gm).items()}
    found: dict[str, set[tuple[int, int] | None]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and (name := names.get(id(get_path(gm, str(node.target))))) is not None:
            found.setdefault(name, set()).update(_roles(node))
    return {name: axes for name, roles in found.items() if len(roles) == 1 and (axes := next(iter(roles))) is not None}


def _roles(node: torch.fx.Node) -> Iterator[tuple[int, int] | None]:
    """Yield input and output axis of a weight's value for each use; None for a use that tells nothing."""
    for user in node.users:
        rank = node.meta["val"].ndim
        if masked_parts(user) is not None:
            yield from _roles(user)
        elif user.target in (aten.t.default, aten.numpy_T.default) and rank == 2:
            yield from (None if role is None else role[::-1] for role in _roles(user))
        elif user.target is torch.ops.higher_order.cond:
            yield from _roles_in_branches(node, user)
        elif user.target in _ROWS and user.args[1] is node:
            yield 1, 0
        elif user.target in TRANSPOSED_CONVOLUTIONS and user.args[1] is node:
            yield 0, 1
        elif user.target in _PRODUCTS and user.args[1] is node:
            yield rank - 2, rank - 1
        elif user.target is aten.addmm.default and user.args[2] is node:
            yield 0, 1
        elif user.target in RECURRENT:
            yield 1, 0
        else:
            yield None


def _roles_in_branches(node: torch.fx.Node, call: torch.fx.Node) -> Iterator[tuple[int, int] | None]:
    operands = call.args[3]
    assert isinstance(operands, list | tuple)
    for branch in call.args[1:3]:
        assert isinstance(branch, torch.fx.Node)
        inputs = [inner for inner in body_of(branch).graph.nodes if inner.op == "placeholder"]
        for operand, inner in zip(operands, inputs, strict=True):
            if operand is node:
                yield from _roles(inner)
