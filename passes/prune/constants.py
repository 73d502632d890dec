"""Which indices hold one and the same number throughout, whatever the inputs of the model are.

    w * mask      a row of zeros where the mask has a row of zeros
    conv(x)       the bias, where the weight has a row of zeros
    batch_norm    a number, where its input is one; relu of it another one

What depends on parameters and buffers alone is computed. For the rest, each index of each axis has a number or none,
and the rule of each operator says what becomes of them. All of it is about evaluation, and takes values to be finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fxopt.attributes import get_path
from fxopt.effects import is_pure, is_random
from fxopt.passes.prune.rules import rule_for
from fxopt.passes.prune.structure import Structure, spread

__all__ = ["Constants"]

_LARGEST = 2**28  # bytes of a value that is computed from parameters; above it, rules have to do
_UNSET = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip


class Constants:
    """The constants of a graph.

    Attributes:
        structure: The index maps of the graph.
        values: The number that each index holds throughout, f64; NaN if there is none.
        known: The values of the nodes that depend on parameters and buffers alone, on the CPU.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.values = np.full(structure.count, np.nan)
        self.known: dict[torch.fx.Node, torch.Tensor] = {}
        written = _written(structure.module.graph)
        for node in structure.module.graph.nodes:
            tensor = self._computed(node, written)
            if tensor is None:
                rule_for(node).constants(node, self)
            else:
                self.known[node] = tensor
                self._take(node, tensor)

    def along(self, node: torch.fx.Node, dim: int, size: int) -> np.ndarray:
        """Return the constants of a value along an axis of what it is broadcast to, f64[size].

        Args:
            node: The value.
            dim: The axis, counted from the last one, which is -1.
            size: Size of the axis.
        """
        rank = self.structure.rank(node)
        axis = self.structure.axis(node, dim) if -dim <= rank else None
        if axis is not None:
            found: np.ndarray = self.values[axis]
            return found
        return np.full(size, self.everywhere(node))

    def vector(self, value: Any, size: int, otherwise: float) -> np.ndarray:
        """Return the constants of an argument of one axis, f64[size]; ``otherwise`` throughout where none is given."""
        return self.along(value, -1, size) if isinstance(value, torch.fx.Node) else np.full(size, otherwise)

    def everywhere(self, node: torch.fx.Node) -> float:
        """Return the number that the whole value is, or NaN."""
        if node in self.known:
            tensor = self.known[node]
            if tensor.numel() and (tensor == tensor.reshape(-1)[0]).all():
                return float(tensor.reshape(-1)[0])
        for axis in self.structure.axes(node):
            if axis is not None and (self.values[axis] == self.values[axis[0]]).all():
                return float(self.values[axis[0]])
        return float("nan")

    def buffer(self, node: torch.fx.Node) -> torch.Tensor | None:
        """Return the tensor that a ``get_attr`` node reads, also where the graph writes it while training."""
        if node.op != "get_attr":
            return None
        found: torch.Tensor = get_path(self.structure.module, str(node.target))
        return found.detach().cpu()

    def hand_on(self, node: torch.fx.Node) -> None:
        """Take over the constants that a node only moves from one index to another."""
        for move in self.structure.moves.get(node, []):
            if move.source is not None and move.target is not None:
                self.values[move.target] = self.values[move.source]
            elif move.source is not None:
                self._split(move.source, move.factors)
            elif move.target is not None:
                self._merge(move.factors, move.target)

    def _split(self, flat: np.ndarray, factors: tuple[np.ndarray, ...]) -> None:
        values = self.values[flat]
        for place, factor in enumerate(factors):
            rows = np.moveaxis(values, place, 0).reshape(len(factor), -1)
            self.values[factor] = np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], np.nan)

    def _merge(self, factors: tuple[np.ndarray, ...], flat: np.ndarray) -> None:
        found = np.full(flat.shape, np.nan)
        for place, factor in enumerate(factors):
            values = np.broadcast_to(spread(self.values[factor], place, flat.ndim), flat.shape)
            found = np.where(np.isnan(found), values, found)
        self.values[flat] = found

    def _computed(self, node: torch.fx.Node, written: set[int]) -> torch.Tensor | None:
        """Return what a node yields if that depends on no input, no chance and nothing that the graph writes."""
        if node.op == "get_attr":
            found = get_path(self.structure.module, str(node.target))
            return found.detach().cpu() if isinstance(found, torch.Tensor) and id(found) not in written else None
        fake = node.meta.get("val")
        if node.op != "call_function" or not isinstance(fake, torch.Tensor) or not is_pure(node) or is_random(node):
            return None
        if "modes" in node.meta or node.target in _UNSET or not all(isinstance(size, int) for size in fake.shape):
            return None
        if any(source not in self.known for source in node.all_input_nodes):
            return None
        if fake.numel() * fake.element_size() > _LARGEST:
            return None
        with torch.no_grad():
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: self.known[source])
            result = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target is callable
        return result.cpu() if isinstance(result, torch.Tensor) else None

    def _take(self, node: torch.fx.Node, tensor: torch.Tensor) -> None:
        for dim, axis in enumerate(self.structure.axes(node)):
            if axis is not None and not tensor.is_complex():
                self.values[axis] = steady_slices(tensor, dim)


def steady_slices(tensor: torch.Tensor, dim: int) -> np.ndarray:
    """Return the number that each slice along an axis is throughout, f64[size]; NaN where it is not one number."""
    slices = tensor.movedim(dim, 0)
    corners = [slices[(slice(None), *(at,) * (slices.ndim - 1))] for at in (0, -1)]
    found = np.full(len(slices), np.nan)
    # Most slices differ in their corners already: the others alone are read as a whole.
    likely = (corners[0] == corners[1]).nonzero().flatten()
    if len(likely):
        rows = slices.index_select(0, likely).reshape(len(likely), -1)
        steady = (rows == rows[:, :1]).all(dim=1)
        found[likely[steady].cpu().numpy()] = rows[steady, 0].double().cpu().numpy()
    return found


def _written(graph: torch.fx.Graph) -> set[int]:
    """Return the tensors that the graph writes: buffers, and the running statistics of batch norms in training."""
    owner = graph.owning_module
    assert owner is not None
    found = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema is not None else ()):
            source = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if (
                argument.alias_info is not None
                and argument.alias_info.is_write
                and isinstance(source, torch.fx.Node)
                and source.op == "get_attr"
            ):
                found.add(id(get_path(owner, str(source.target))))
    return found
