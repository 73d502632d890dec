"""Operators that make tensors of given sizes."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.args import arg, tensor_arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.rules.reshape import sizes_after
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten
# What an operator fills with; None for its fill_value.
_FILLED: dict[Any, float | None] = {
    aten.zeros.default: 0.0, aten.ones.default: 1.0, aten.full.default: None,
    aten.new_zeros.default: 0.0, aten.new_ones.default: 1.0, aten.new_full.default: None,
}  # fmt: skip


@handles(*_FILLED)
class _Filled(Rule):
    """Every element is like every other one: any index may go. What lends its type lends no index."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        structure.axes(node)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        number = _FILLED[node.target]
        if number is None:
            number = arg(node, "fill_value")
        for axis in constants.structure.axes(node):
            if axis is not None and isinstance(number, int | float):
                constants.values[axis] = float(number)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        cut.set_arg(node, "size", sizes_after(node, arg(node, "size"), 0, cut))


@handles(
    aten.empty.memory_format, aten.new_empty.default, aten.rand.default, aten.randn.default, aten.randint.default,
    aten.randint.low, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default,
    aten.eye.default, aten.eye.m, aten.tril_indices.default, aten.triu_indices.default,
)  # fmt: skip
class _Counted(Rule):
    """Each element is another one, by its number or by chance."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        structure.pin_value(node, "its elements are counted, or random")


@handles(aten.sym_size.int)
class _Size(Rule):
    """A size that other nodes compute with."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        structure.pin(structure.axis(tensor_arg(node, "self"), arg(node, "dim")), "its size is computed with")
