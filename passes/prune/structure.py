"""Which indices of which axes stand or fall together: the index maps of a graph, from its first axis to its last.

Every index of every axis with a fixed size gets a number of its own. A rule for each operator (``rules/``) says how the
indices of its inputs and outputs hang together, in four words:

    equal     both are kept, or neither is: a row of a convolution's weight and the channel that it makes
    product   a flat index is kept exactly if all of its factors are: channel ``64 h + d``, head ``h`` and place ``d``
    pin       an index that must stay: a channel that the model returns, a frame of a sequence
    end       an index that may go only where its values add nothing: the channels that a convolution sums over

No list of layer types, no shapes from the user: views, permutations and concatenations are index maps like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxopt.args import source_line
from fxopt.attributes import get_path
from fxopt.passes.prune.rules import rule_for

if TYPE_CHECKING:
    from fxopt.passes.prune.removal import Removal

__all__ = ["End", "Indices", "Move", "Pin", "Product", "Structure"]

Indices = np.ndarray  # i64, the numbers of the indices of an axis, or of several axes: one dimension each


@dataclasses.dataclass(frozen=True)
class Product:
    """A flat axis and its factors.

    Attributes:
        flat: Numbers of the flat axis, in the shape of its factors.
        factors: Numbers of each factor.
    """

    flat: Indices
    factors: tuple[Indices, ...]


@dataclasses.dataclass(frozen=True)
class Pin:
    """Indices that must stay, with the node that wants them and its reason."""

    indices: Indices
    node: torch.fx.Node
    reason: str


@dataclasses.dataclass(frozen=True)
class Move:
    """Values that a node hands on: those of ``source`` are those of ``target``, index by index, or by factors.

    Attributes:
        source: Numbers of the indices read; of a flat axis in the shape of its factors where it is split.
        target: Numbers of the indices written; of a flat axis in the shape of its factors where it is joined.
        factors: Numbers of the factors, where one side is flat.
    """

    source: Indices | None
    target: Indices | None
    factors: tuple[Indices, ...] = ()


class End:
    """Where indices end: a sum over them. An index may go if it adds nothing to that sum.

    Attributes:
        node: The node that adds up.
        indices: Numbers of the indices that end here, in any shape.
        normalizes: Whether the node also divides by statistics over these indices, which change when some go.
    """

    normalizes = False

    def __init__(self, node: torch.fx.Node, indices: Indices) -> None:
        self.node, self.indices = node, indices

    def allows(self, removal: Removal) -> np.ndarray:
        """Return which indices may go, bool in the shape of ``indices``, given what goes elsewhere."""
        raise NotImplementedError

    def reason(self) -> str:
        """Return why an index that may not go has to stay."""
        raise NotImplementedError


class Structure:
    """The index maps of one graph.

    Attributes:
        module: The graph.
        count: How many numbers there are.
        equal: Pairs of arrays of numbers that are kept together, index by index.
        products, pins, ends: See the module's text.
        moves: What each node hands on.
        attributes: Numbers of the axes of each parameter and buffer, by name.
        heads: Numbers of axes along which attention is computed head by head.
        notes: What a rule wants to find again when it cuts: numbers by node and name.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module
        self.count = 0
        self.equal: list[tuple[Indices, Indices]] = []
        self.products: list[Product] = []
        self.pins: list[Pin] = []
        self.ends: list[End] = []
        self.moves: dict[torch.fx.Node, list[Move]] = {}
        self.attributes: dict[str, list[Indices | None]] = {}
        self.heads: list[Indices] = []
        self.notes: dict[tuple[torch.fx.Node, str], Indices] = {}
        self._ends_at: dict[torch.fx.Node, list[End]] = {}
        self._axes: dict[tuple[Any, int | None, int], Indices | None] = {}
        self._node = module.graph.output_node()
        for node in module.graph.nodes:
            self._node = node
            rule_for(node).relate(node, self)
            if node.op == "get_attr":
                self.attributes[str(node.target)] = self.axes(node)

    # ---- numbers

    def value(self, node: torch.fx.Node, slot: int | None = None) -> Any:
        """Return the fake value of a node, or of one of the values that it yields."""
        found: Any = node.meta.get("val")
        return found if slot is None else found[slot]

    def rank(self, node: torch.fx.Node, slot: int | None = None) -> int:
        """Return how many axes a value has; 0 for what is no tensor."""
        found = self.value(node, slot)
        return found.ndim if isinstance(found, torch.Tensor) else 0

    def axis(self, node: torch.fx.Node, dim: int, slot: int | None = None) -> Indices | None:
        """Return the numbers of an axis, or None if its size is not fixed, or is 1: nothing can be cut there."""
        tensor = self.value(node, slot)
        dim %= max(tensor.ndim, 1)
        size = tensor.shape[dim]
        if not isinstance(size, int) or size <= 1:
            return None
        key = (self._key(node), slot, dim)
        found = self._axes.get(key)
        if found is None:
            found = self._axes[key] = self.fresh(size)
        return found

    def axes(self, node: torch.fx.Node, slot: int | None = None) -> list[Indices | None]:
        """Return the numbers of every axis of a value."""
        return [self.axis(node, dim, slot) for dim in range(self.rank(node, slot))]

    def fresh(self, size: int) -> Indices:
        """Return numbers for an axis that no value has by itself, such as the groups of a convolution."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def numbered(self) -> Iterator[Indices]:
        """Yield the numbers of each axis of each value."""
        yield from (axis for axis in self._axes.values() if axis is not None)

    def _key(self, node: torch.fx.Node) -> Any:
        """Return what stands for the value: the tensor itself for an attribute, which several nodes may read."""
        return id(get_path(self.module, str(node.target))) if node.op == "get_attr" else node

    def is_one(self, node: torch.fx.Node, dim: int) -> bool:
        """Return whether an axis has the fixed size 1, and is broadcast where others are longer."""
        size = self.value(node).shape[dim]
        return isinstance(size, int) and size == 1

    def ends_at(self, node: torch.fx.Node) -> list[End]:
        """Return the ends of a node."""
        return self._ends_at.get(node, [])

    # ---- relations

    def same(self, first: Indices | None, second: Indices | None) -> None:
        """Keep both or neither, index by index. If one of the two cannot be cut, the other one stays whole, too."""
        if first is None or second is None:
            self.pin(first if second is None else second, "it meets a size that is not fixed")
            return
        self.equal.append((first.ravel(), second.ravel()))

    def move(self, source: Indices | None, target: Indices | None) -> None:
        """As :meth:`same`; the values are handed on as well."""
        self.same(source, target)
        if source is not None and target is not None:
            self._moved(Move(source.ravel(), target.ravel()))

    def move_axis(
        self, source: torch.fx.Node, dim: int, target: torch.fx.Node, to: int, slot: int | None = None
    ) -> None:
        """Hand on the values of an axis of ``source`` along an axis of ``target``."""
        self.move(self.axis(source, dim), self.axis(target, to, slot))

    def split(self, flat: Indices, factors: Sequence[Indices]) -> None:
        """Hand on the values of a flat axis along its factors, the last one running fastest."""
        self._product(flat, factors, splits=True)

    def merge(self, factors: Sequence[Indices], flat: Indices) -> None:
        """Hand on the values of several axes along a flat one, the last one running fastest."""
        self._product(flat, factors, splits=False)

    def product(self, flat: Indices, factors: Sequence[Indices]) -> None:
        """Say that an axis has factors, without handing on values."""
        if len(factors) == 1:
            self.same(flat, factors[0])
        else:
            self.products.append(Product(flat.reshape([len(f) for f in factors]), tuple(factors)))

    def pin(self, indices: Indices | None, reason: str, node: torch.fx.Node | None = None) -> None:
        """Let indices stay."""
        if indices is not None:
            self.pins.append(Pin(indices.ravel(), node or self._node, reason))

    def pin_all(self, node: torch.fx.Node, reason: str) -> None:
        """Let every index of every input and output of a node stay."""
        for source in node.all_input_nodes:
            self.pin_value(source, reason)
        self.pin_value(node, reason)

    def pin_value(self, node: torch.fx.Node, reason: str) -> None:
        """Let every index of what a node yields stay."""
        found = node.meta.get("val")
        slots = range(len(found)) if isinstance(found, tuple | list) else (None,)
        for slot in slots:
            for axis in self.axes(node, slot):
                self.pin(axis, reason)

    def end(self, end: End) -> None:
        """Add a place where indices end."""
        self.ends.append(end)
        self._ends_at.setdefault(end.node, []).append(end)

    def _product(self, flat: Indices, factors: Sequence[Indices], *, splits: bool) -> None:
        self.product(flat, factors)
        shaped = flat.reshape([len(f) for f in factors])
        self._moved(Move(shaped, None, tuple(factors)) if splits else Move(None, shaped, tuple(factors)))

    def _moved(self, move: Move) -> None:
        self.moves.setdefault(self._node, []).append(move)


def spread(values: np.ndarray, place: int, rank: int) -> np.ndarray:
    """Return one number for each index of a factor, as numpy broadcasts it along axis ``place`` of ``rank`` axes."""
    shape = [1] * rank
    shape[place] = -1
    return values.reshape(shape)


def where(node: torch.fx.Node) -> str:
    """Return the name of a node, with the user's line if it is known."""
    line = source_line(node)
    return f"{node.name} ({line})" if line else node.name


__all__ += ["spread", "where"]
