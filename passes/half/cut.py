"""Choose which operators compute in half: a minimum cut between what half saves and what it costs.

Each operator is a vertex; after the cut, the source's side computes in half and the sink's side in float32.

    source -> operator   what half would save, paid if the operator stays float32
    operator -> sink     lambda times the noise it adds, paid if it computes in half; infinite if it must not
    reader -> a -> producer   paid once if the producer is float32 and any reader is half: the cast, and its rounding
    producer -> b -> reader   paid once if the producer is half and any reader is float32: the cast

So each value is cast once for each type, however many readers there are. Constants are stored in the type that they
are read in, at no cost. For a given lambda the cut is the cheapest assignment there is, and the noise falls as lambda
grows. The smallest lambda with which the predicted noise is allowed is found by bisection, without a run of the model.

Source: Greig, Porteous and Seheult, Exact maximum a posteriori estimation for binary images, JRSS B 1989, for
assignments by minimum cuts; Kohli, Ladicky and Torr, Robust higher order potentials, IJCV 2009, for a cost paid once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # loads its parts when they are first used
import torch

from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.passes.half.noise import Measured
from fxopt.passes.half.operators import is_float, is_like, kept_operands
from fxopt.regions import COND, WHILE_LOOP, body_of

__all__ = ["Assignment", "Assignments", "in_decibels", "source_side"]

Node = torch.fx.Node

_HALF, _FLOAT = "(half)", "(float32)"
_BYTES_PER_PRODUCT = 1 / 8
"""Bytes moved in the time of one multiply-accumulate in float32: 1.5e12 bytes and 2e13 / 2 products a second (A100)."""
_STEPS = 14
"""Bisections of lambda, over a range of many powers of ten: the last one is by less than a factor of 1.1."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which nodes compute in half.

    Attributes:
        half: Their names.
        noise: Predicted noise to signal of the outputs, a ratio of powers.
    """

    half: frozenset[str]
    noise: float


def in_decibels(noise: float) -> float:
    """Return a ratio of noise to signal as signal to noise, in dB; inf without noise."""
    return -10 * math.log10(noise) if noise > 0 else math.inf


def source_side(edges: Sequence[tuple[Any, Any, float]]) -> set[Any]:
    """Return the vertices on the source's side of a minimum cut, the fewest there can be.

    Capacities are rounded to 2**-28 of all finite ones out of the source together; what is more than these is infinite.

    Args:
        edges: Start, end and capacity, in any one unit.
    """
    numbers: dict[Any, int] = {_HALF: 0, _FLOAT: 1}
    for start, end, _ in edges:
        numbers.setdefault(start, len(numbers))
        numbers.setdefault(end, len(numbers))
    total = sum(capacity for start, _, capacity in edges if start == _HALF and capacity < math.inf) or 1.0
    held = np.array([min(capacity / total, 1.0) for _, _, capacity in edges])
    rows, columns = (np.array([numbers[edge[at]] for edge in edges]) for at in (0, 1))
    whole = np.rint(held * 2**28).astype(np.int32)
    graph = scipy.sparse.csr_array((whole, (rows, columns)), shape=(len(numbers), len(numbers)))
    flow = scipy.sparse.csgraph.maximum_flow(scipy.sparse.csr_matrix(graph), 0, 1).flow
    residual = scipy.sparse.csr_matrix(graph - flow)
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    reached = set(scipy.sparse.csgraph.breadth_first_order(residual, 0, return_predecessors=False).tolist())
    return {vertex for vertex, number in numbers.items() if number in reached}


@dataclasses.dataclass(frozen=True)
class _Edge:
    """An edge of the cut, with a capacity of ``fixed + lambda * noise``."""

    start: Any
    end: Any
    fixed: float = 0.0
    noise: float = 0.0


class Assignments:
    """The assignments of one graph, by lambda.

    Args:
        gm: The float32 graph.
        names: Site name of each node.
        free: Names of the nodes that may compute in half.
        measured: Their noise and cost, and which values must stay float32.
        keep_io: Whether inputs and outputs are float32, or half.

    Attributes:
        bound: Which of them compute or read a value that must not be half, and why.
    """

    def __init__(
        self,
        gm: CapturedModule,
        names: Mapping[Node, str],
        free: Iterable[str],
        measured: Measured,
        *,
        keep_io: bool = True,
    ) -> None:
        self.names, self.measured, self.border = names, measured, _FLOAT if keep_io else _HALF
        self.gm, self.free = gm, set(free)
        self._callers: dict[torch.fx.Graph, Node] = {}
        self._given: dict[Node, Node] = {}
        self._regions()
        self._readers: dict[Node, set[str]] = {}
        self.bound = self._bound_by_values()
        self.free -= set(self.bound)
        self._edges = [*self._operator_edges(), *self._value_edges()]
        self._scale = sum(e.fixed for e in self._edges if e.start == _HALF and e.fixed < math.inf) or 1.0

    def bounded(self, noise: float) -> Assignment:
        """Return the cheapest assignment found that is predicted to add at most this noise to signal."""
        best = self.at(0.0)
        if best.noise <= noise:
            return best
        low, high = -40.0, 40.0  # exponents of 2, per share of the savings
        best = self.at(2.0**high)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            tried = self.at(2.0**middle / noise)
            if tried.noise <= noise:
                best, high = tried, middle
            else:
                low = middle
        return best

    def at(self, weight: float) -> Assignment:
        """Return the cheapest assignment where noise to signal weighs ``weight`` times all that half would save."""
        costs = [edge.fixed / self._scale + (weight * edge.noise if edge.noise else 0.0) for edge in self._edges]
        halves = source_side([(edge.start, edge.end, cost) for edge, cost in zip(self._edges, costs, strict=True)])
        noise = sum(e.noise for e in self._edges if e.noise and e.start in halves and e.end not in halves)
        return Assignment(frozenset(self.free & halves), noise)

    # ---- who computes and who reads a value

    def _regions(self) -> None:
        for module in graph_modules(self.gm):
            for call in module.graph.nodes:
                if call.target not in (COND, WHILE_LOOP):
                    continue
                bodies = call.args[1:3] if call.target is COND else call.args[:2]
                operands = call.args[3] if call.target is COND else (*call.args[2], *call.args[3])
                for body in map(body_of, bodies):
                    self._callers[body.graph] = call
                    holders = [node for node in body.graph.nodes if node.op == "placeholder"]
                    self._given.update(zip(holders, operands, strict=True))

    def _unit(self, node: Node) -> str:
        """Return the vertex of what computes a value, or runs a call."""
        if node.op == "placeholder":
            caller = self._callers.get(node.graph)
            if caller is None:
                return self.border
            return self._unit(caller) if self._is_carried(node, caller) else self._unit(self._given[node])
        if node.target is operator.getitem:
            return self._unit(node.args[0])  # type: ignore[arg-type]  # a tuple comes of a call
        name = self.names[node]
        return name if name in self.free else _FLOAT

    def _is_carried(self, holder: Node, caller: Node) -> bool:
        return caller.target is WHILE_LOOP and self._given[holder] in caller.args[2]  # type: ignore[operator]  # they are listed

    def _read_by(self, node: Node) -> set[str]:
        """Return the vertices that read a value, also inside branches that it is handed to."""
        if node not in self._readers:
            found: set[str] = set()
            for reader in node.users:
                found |= self._readers_behind(reader, node)
            self._readers[node] = found
        return self._readers[node]

    def _readers_behind(self, reader: Node, node: Node) -> set[str]:
        if reader.op == "output":
            caller = self._callers.get(reader.graph)
            return {self.border if caller is None else self._unit(caller)}
        if reader.target in (COND, WHILE_LOOP):
            holders = [
                holder
                for holder, given in self._given.items()
                if given is node and self._callers[holder.graph] is reader
            ]
            carried = {self._unit(reader) for holder in holders if self._is_carried(holder, reader)}
            return carried.union(*(self._read_by(holder) for holder in holders if not self._is_carried(holder, reader)))
        if is_like(reader):
            return set()
        return {_FLOAT} if node in kept_operands(reader) else {self._unit(reader)}

    def _values(self) -> list[Node]:
        """Return the float values that are computed or handed in; what a branch is given counts where it comes from."""
        return [
            node
            for module in graph_modules(self.gm)
            for node in module.graph.nodes
            if is_float(node.meta.get("val")) and node.op in ("placeholder", "call_function") and self._is_own(node)
        ]

    def _is_own(self, node: Node) -> bool:
        caller = self._callers.get(node.graph)
        return node.op == "call_function" or caller is None or self._is_carried(node, caller)

    def _bound_by_values(self) -> dict[str, str]:
        """Return the nodes that compute or read a value that must not be half, and why."""
        bound: dict[str, str] = {}
        for node in self._values():
            name = self.names[node]
            reason = self.measured.values.get(name)
            if reason is not None:
                bound.setdefault(self._unit(node), reason)
                for reader in self._read_by(node):
                    bound.setdefault(reader, f"it reads {name}: {reason}")
        self._readers = {}  # what is bound is another vertex from now on
        return {name: reason for name, reason in bound.items() if name in self.free}

    # ---- edges

    def _operator_edges(self) -> list[_Edge]:
        found = []
        for name in self.free:
            saved = self.measured.traffic.get(name, 0.0) / 2
            saved += self.measured.products.get(name, 0.0) * _BYTES_PER_PRODUCT
            found.append(_Edge(_HALF, name, fixed=saved))
            found.append(_Edge(name, _FLOAT, noise=self.measured.noise.get(name, 0.0)))
        return found

    def _value_edges(self) -> list[_Edge]:
        found = []
        for node in self._values():
            producer, readers, name = self._unit(node), self._read_by(node), self.names[node]
            others = readers - {producer}
            if not others:
                continue
            cast = 1.5 * self.measured.sizes.get(name, 4.0)  # it is read, and written in the other type
            down, up = (name, "down"), (name, "up")
            if producer != _HALF:
                found.append(_Edge(down, producer, fixed=cast, noise=self.measured.cast_noise.get(name, 0.0)))
                found += [_Edge(reader, down, fixed=math.inf) for reader in others if reader != _FLOAT]
            if producer != _FLOAT:
                found.append(_Edge(producer, up, fixed=cast))
                found += [_Edge(up, reader, fixed=math.inf) for reader in others if reader != _HALF]
        return found
