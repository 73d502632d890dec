"""Carry out a removal: cut the tensors, rewrite the arguments that hold sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fxopt.args import arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.removal import Removal
from fxopt.passes.prune.rules import rule_for
from fxopt.passes.prune.structure import Indices, Structure
from fxopt.resizing import Resizing

__all__ = ["Cut"]

aten = torch.ops.aten


class Cut:
    """What the rules are handed to bring their operators' arguments up to date.

    Attributes:
        structure, constants: Of the graph as it was.
        removal: What goes.
        leaves_one: Whether some axis is left with one index.
    """

    def __init__(self, removal: Removal, resizing: Resizing) -> None:
        self.structure: Structure = removal.structure
        self.constants: Constants = removal.constants
        self.removal = removal
        self.leaves_one = any(self.count(axis) == 1 for axis in self.structure.numbered())
        self._resizing = resizing

    def run(self) -> None:
        """Cut every attribute, then every call."""
        nodes = list(self.structure.module.graph.nodes)
        for node in nodes:
            if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
                self._cut_attribute(node)
        for node in nodes:
            if node.op == "call_function":
                rule_for(node).cut(node, self)

    # ---- reading

    def keeps(self, index: Any) -> bool:
        """Return whether one index stays."""
        return not bool(self.removal.removed(np.asarray(index)))

    def loses(self, axis: Indices) -> bool:
        """Return whether any index of an axis goes."""
        return bool(self.removal.removed(axis).any())

    def count(self, indices: Indices) -> int:
        """Return how many of the indices stay."""
        return int((~self.removal.removed(indices)).sum())

    def kept_before(self, axis: Indices, place: int) -> int:
        """Return how many indices stay in front of a place of an axis."""
        return self.count(axis[:place])

    def size(self, node: torch.fx.Node, dim: int, slot: int | None = None) -> Any:
        """Return the size that an axis has afterwards."""
        axis = self.structure.axis(node, dim, slot)
        return self.structure.value(node, slot).shape[dim] if axis is None else self.count(axis)

    # ---- changing

    def set_arg(self, node: torch.fx.Node, name: str, new: Any) -> None:
        """Give a call another argument, by schema name."""
        if arg(node, name) != new:
            self._resizing.set_arg(node, name, new)

    def set_call(self, node: torch.fx.Node, target: Any, args: Sequence[Any]) -> None:
        """Make a node another call."""
        self._resizing.set_call(node, target, args)

    def constant(self, node: torch.fx.Node, name: str, tensor: torch.Tensor) -> torch.fx.Node:
        """Add a constant for a node to read."""
        return self._resizing.constant(name, tensor, near=node)

    def scale(self, node: torch.fx.Node, factor: float) -> None:
        """Multiply what a node yields by a number."""
        self._resizing.insert_behind(node, aten.mul.Tensor, factor)

    def add_to_bias(self, node: torch.fx.Node, added: torch.Tensor) -> None:
        """Add numbers to the bias of a layer, f32[rows that stay]; a layer without bias gets one."""
        bias = arg(node, "bias")
        weight = arg(node, "weight")
        added = added.to(node.meta["val"].device)
        trains = weight.op == "get_attr" and isinstance(self._resizing.tensor(weight), torch.nn.Parameter)
        if bias is None:
            new = self._resizing.constant(f"{weight.name}_bias", added, near=node, trainable=trains)
        elif bias.op == "get_attr" and self._resizing.readers(bias) == 1:
            tensor = self._resizing.tensor(bias)
            self._resizing.set_tensor(bias, tensor.detach() + added.to(tensor.dtype))
            return
        else:
            constant = self._resizing.constant(f"{weight.name}_shift", added, near=node)
            new = self._resizing.insert_call(aten.add.Tensor, (bias, constant), before=node)
        self._resizing.set_arg(node, "bias", new)

    def _cut_attribute(self, node: torch.fx.Node) -> None:
        if self._resizing.is_done(node):
            return
        tensor = self._resizing.tensor(node).detach()
        for dim, axis in enumerate(self.structure.axes(node)):
            if axis is not None and self.loses(axis):
                stays = torch.from_numpy(np.flatnonzero(~self.removal.removed(axis)))
                tensor = tensor.index_select(dim, stays.to(tensor.device))
        self._resizing.set_tensor(node, tensor)
