"""Where a graph begins and ends: inputs, attributes, outputs, and effects on buffers."""

from __future__ import annotations

import operator

import torch

from fxopt.args import tensor_arg
from fxopt.ops import GUARD, UPDATE_BUFFER
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure
from fxopt.regions import COND, WHILE_LOOP

__all__: list[str] = []


@handles("placeholder")
class _Input(Rule):
    """The user's; nothing of it goes."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        structure.pin_value(node, "it is an input of the model")


@handles("get_attr")
class _Attribute(Rule):
    """A parameter or buffer, which can be cut along every axis."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        if isinstance(node.meta.get("val"), torch.Tensor):
            structure.axes(node)  # read by several nodes, its axes are numbered once


@handles("output")
class _Output(Rule):
    """The user's; nothing of it goes."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        for source in node.all_input_nodes:
            structure.pin_value(source, "it is an output of the model")


@handles(operator.getitem)
class _Getitem(Rule):
    """One of several values."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, slot = node.args
        if not isinstance(source, torch.fx.Node) or not isinstance(slot, int):
            structure.pin_all(node, "it is no plain item")
            return
        for dim in range(structure.rank(node)):
            structure.move(structure.axis(source, dim, slot), structure.axis(node, dim))


@handles(UPDATE_BUFFER)
class _UpdateBuffer(Rule):
    """A buffer and what is written to it have the same indices."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        buffer, value = tensor_arg(node, "buffer"), tensor_arg(node, "value")
        if structure.rank(buffer) != structure.rank(value):
            structure.pin_all(node, "it is written as often as the buffer is larger")
            return
        for axis, to in zip(structure.axes(buffer), structure.axes(value), strict=True):
            structure.same(axis, to)


@handles(GUARD)
class _Guard(Rule):
    """It reads whole values."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        structure.pin_all(node, "a guard reads it")


@handles(COND, WHILE_LOOP)
class _Region(Rule):
    """What goes into or comes out of another graph stays whole: that graph is not looked into."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        structure.pin_all(node, "a branch or a loop reads or yields it, and nothing is removed inside these")
