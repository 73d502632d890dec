"""One neutral description of a graph, for the page, SVG, DOT and JSON: whatever it was made from, and no tensors in it.

A :class:`Graph` is a list of nodes in an order in which they can be computed. Weights are not nodes but stand with the
nodes that read them. The graphs of branches, loops and functions lie in the same list, each a group of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal

__all__ = ["Edge", "Graph", "Node", "Number", "Overlay", "Weight"]

Number = int | float
Combine = Literal["sum", "max", "min", "mean"]


@dataclasses.dataclass(frozen=True)
class Edge:
    """A value that a node reads.

    Attributes:
        source: Id of the node that yields it.
        argument: What it is to the reader: ``input``, ``tensors[1]``.
        type: Text of its type, ``f32[batch, 8]``; empty if it is not known.
    """

    source: str
    argument: str
    type: str = ""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant tensor that a node reads.

    Attributes:
        name: Its dotted name, or that of the initializer.
        argument: What it is to the reader.
        type: Text of its type.
        bytes: Its size.
        elements: Number of its elements.
        zeros: How many of them are 0; None if the values were not read.
        low, high, mean, deviation: Statistics of the finite values; None if there are none.
        counts: How many values fall into each of equal parts of [low, high].
        not_finite: Number of values that are NaN or infinite.
        digest: Tells whether two weights hold the same values.
    """

    name: str
    argument: str
    type: str
    bytes: int
    elements: int
    zeros: int | None = None
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    deviation: float | None = None
    counts: tuple[int, ...] = ()
    not_finite: int = 0
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: Unique in its graph: ``conv2d``, ``cond/then/relu``.
        op: Operator, ``aten.conv2d`` or ``Conv``.
        kind: What sort of operator it is, see :mod:`fxopt.tools.viz.kinds`.
        path: Names of the groups around it, the outermost first.
        inputs: What it reads.
        outputs: Types of what it yields.
        attributes: Other arguments, by name, as text.
        weights: Constant tensors that it reads.
        line: The user's line.
        pass_name: The pass that made it; empty if it was captured, or came with the file.
        why: The reason that the pass gave.
        origins: Names of the nodes of the captured graph that it was made from; its own name, if no pass made it.
        values: Number or word of each overlay that has one for it.
    """

    id: str
    op: str
    kind: str = "other"
    path: tuple[str, ...] = ()
    inputs: tuple[Edge, ...] = ()
    outputs: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    weights: tuple[Weight, ...] = ()
    line: str = ""
    pass_name: str = ""
    why: str = ""
    origins: tuple[str, ...] = ()
    values: Mapping[str, Number | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can be computed, with a title and remarks for the reader."""

    nodes: tuple[Node, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def by_id(self) -> dict[str, Node]:
        """Return the nodes by their ids."""
        return {node.id: node for node in self.nodes}

    def edges(self) -> Iterator[tuple[str, str]]:
        """Yield (source, reader) of every edge."""
        for node in self.nodes:
            for edge in node.inputs:
                yield edge.source, node.id


@dataclasses.dataclass(frozen=True)
class Overlay:
    """Numbers or words on nodes, to colour them by.

    Attributes:
        values: By node: its id, its name, or the name of the node of the graph that an ONNX file was exported from.
        unit: Of the numbers: ``"ms"``, ``"dB"``.
        combine: What a group shows of the numbers inside it.
        low_is_bad: Whether low numbers are the striking ones, as in a signal to noise ratio.
        partial: Whether some of the names may be those of no node, as where a file has more operators than its graph.
    """

    values: Mapping[str, Number | str]
    unit: str = ""
    combine: Combine = "max"
    low_is_bad: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TypeError: one is neither a number nor a word, or there are both.
            ValueError: there are none, or one is not finite.
        """
        wrong = {key: held for key, held in self.values.items() if not isinstance(held, int | float | str)}
        if wrong:
            key, held = next(iter(wrong.items()))
            raise TypeError(f"an overlay has {type(held).__name__} for {key!r}; wanted a number or a word")
        if not self.values:
            raise ValueError("an overlay has no values")
        if len({isinstance(held, str) for held in self.values.values()}) > 1:
            raise TypeError("an overlay has both numbers and words")
        for key, held in self.values.items():
            if isinstance(held, float) and not math.isfinite(held):
                raise ValueError(f"an overlay has {held} for {key!r}; wanted finite numbers")
