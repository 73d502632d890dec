"""LSTM, GRU and RNN: input features and hidden units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxopt.args import arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.ends import SumEnd
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import End, Indices, Structure, where

if TYPE_CHECKING:
    from fxopt.passes.prune.removal import Removal

__all__: list[str] = []

aten = torch.ops.aten
# How many gates an operator has, and which of them makes a unit's value: where it yields 0, a unit that is 0 stays 0.
_GATES: dict[Any, tuple[int, int]] = {
    aten.lstm.input: (4, 2), aten.gru.input: (3, 2), aten.rnn_tanh.input: (1, 0), aten.rnn_relu.input: (1, 0),
}  # fmt: skip


class _UnitsEnd(End):
    """The sums over hidden units: in each step of each layer, and in the layer above it.

    Args:
        node: The layers.
        indices: Numbers of the hidden units.
        columns: Numbers of the columns that are multiplied with them, of each weight.
    """

    def __init__(self, node: torch.fx.Node, indices: Indices, columns: list[Indices]) -> None:
        super().__init__(node, indices)
        self.columns = columns

    def allows(self, removal: Removal) -> np.ndarray:
        """Return where a unit is 0 throughout, or is multiplied with zeros alone."""
        values = removal.constants.values
        unread = np.logical_and.reduce([values[columns] == 0 for columns in self.columns])
        allowed: np.ndarray = (values[self.indices] == 0) | unread
        return allowed

    def reason(self) -> str:
        """Return why a unit has to stay."""
        return (
            f"{where(self.node)} reads it with weights that are not 0, and it is not 0: in some layer, its initial "
            "state, or a row of the gate that makes its value, is not 0"
        )


@handles(*_GATES)
class _Recurrent(Rule):
    """All layers and directions have the same hidden units, since their states are one tensor."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, params = arg(node, "input"), arg(node, "params")
        each = 4 if arg(node, "has_biases") else 2
        directions = 2 if arg(node, "bidirectional") else 1
        width = structure.value(params[1]).shape[1]
        if len(params) != each * directions * arg(node, "num_layers"):
            structure.pin_all(node, "its hidden units are projected")
            return
        if width == 1:
            structure.pin_all(node, "it has one hidden unit")
            return
        units = structure.notes[node, "units"] = structure.fresh(width)
        read: list[Indices] = []
        for place in range(0, len(params), each):
            self._gates(node, params[place : place + each], structure, units)
            columns = structure.axis(params[place + 1], 1)
            structure.same(columns, units)
            read += [] if columns is None else [columns]
            columns = structure.axis(params[place], 1)
            if place >= each * directions:  # the layers above read the units of both directions
                structure.same(columns, np.concatenate([units] * directions))
                read += [] if columns is None else list(columns.reshape(directions, width))
            else:
                features = structure.axis(source, -1)
                structure.same(columns, features)
                if columns is not None and features is not None:
                    structure.end(SumEnd(node, features, columns))
        structure.end(_UnitsEnd(node, units, read))
        self._values(node, structure, units, directions)

    @staticmethod
    def _gates(node: torch.fx.Node, params: list[torch.fx.Node], structure: Structure, units: Indices) -> None:
        """Say that each gate has a row for each unit."""
        count = _GATES[node.target][0]
        gates = structure.fresh(count)
        structure.pin(gates, "it is a gate")
        for param in params:
            rows = structure.axis(param, 0)
            assert rows is not None  # there are as many as units, at least 2
            structure.product(rows, [gates, units] if count > 1 else [units])

    @staticmethod
    def _states(node: torch.fx.Node) -> list[torch.fx.Node]:
        found = arg(node, "hx")
        return list(found) if isinstance(found, list | tuple) else [found]

    def _values(self, node: torch.fx.Node, structure: Structure, units: Indices, directions: int) -> None:
        """Say that the last axis of states and outputs is the units, and that other axes stay."""
        source = arg(node, "input")
        for state in self._states(node):
            structure.same(structure.axis(state, -1), units)
            for dim in range(structure.rank(state) - 1):
                structure.pin(structure.axis(state, dim), "it is a layer, a direction or a row")
        for slot, value in enumerate(node.meta["val"]):
            for dim in range(value.ndim - 1):
                structure.pin(structure.axis(node, dim, slot), "it is a step, a row or a layer")
            wide = np.concatenate([units] * directions) if slot == 0 else units
            structure.same(structure.axis(node, value.ndim - 1, slot), wide)
        for dim in range(structure.rank(source) - 1):
            structure.pin(structure.axis(source, dim), "it is a step or a row")

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """A unit is 0 throughout if its state begins with 0, and the gate that makes its value has zeros for it."""
        units = constants.structure.notes.get((node, "units"))
        if units is None:
            return
        zero = np.ones(len(units), bool)
        for state in self._states(node):
            axis = constants.structure.axis(state, -1)
            zero &= False if axis is None else constants.values[axis] == 0
        for rows in self._rows_of_value(node, constants):
            zero &= rows
        for slot, value in enumerate(node.meta["val"]):
            axis = constants.structure.axis(node, value.ndim - 1, slot)
            if axis is not None:
                constants.values[axis[np.tile(zero, len(axis) // len(units))]] = 0.0
        constants.values[units[zero]] = 0.0

    @staticmethod
    def _rows_of_value(node: torch.fx.Node, constants: Constants) -> Iterator[Any]:
        gates, which = _GATES[node.target]
        for param in arg(node, "params"):
            axis = constants.structure.axis(param, 0)
            if axis is None:
                yield False
            else:
                yield constants.values[axis.reshape(gates, -1)[which]] == 0
