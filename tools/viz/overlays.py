"""What nodes can be coloured by: what the description itself tells, and what users give, an error report among it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fxopt.errors import describe
from fxopt.export.blame_report import BlameReport
from fxopt.export.node_times import NodeTimes
from fxopt.tools.viz.model import Graph, Node, Number, Overlay

__all__ = ["BUILT_IN", "read_overlays", "with_overlays"]

BUILT_IN: dict[str, dict[str, Any]] = {
    "MACs": {"unit": "", "combine": "sum"},
    "activation bytes": {"unit": "B", "combine": "sum"},
    "weight bytes": {"unit": "B", "combine": "sum"},
    "sparsity": {"unit": "", "combine": "max"},
    "dtype": {},
    "quantized": {},
}
"""Unit, and what a group shows of the numbers inside it, of the overlays that every description has."""


def read_overlays(given: Mapping[str, Any] | None) -> dict[str, Overlay]:
    """Return overlays by name.

    Args:
        given: By name, an :class:`Overlay`, a dictionary of numbers or words by node, or a report of
            :func:`fxopt.export.blame`, which becomes two: what each node adds, and what has come together at it. A
            value that ORT computes exactly has no number there. :class:`fxopt.export.NodeTimes` become milliseconds.

    Raises:
        TypeError: one is something else.
        ValueError: one has no values, or a number that is not finite, or a name is taken.
    """
    found: dict[str, Overlay] = {}
    for name, item in (given or {}).items():
        if name in BUILT_IN or name == "kind":
            raise ValueError(f"{name!r} is the name of a built-in overlay")
        if isinstance(item, BlameReport):
            for part in ("local", "total"):
                rows = {row.node: getattr(row, part) for row in item.values if getattr(row, part) is not None}
                numbers = {node: error.sqnr_db for node, error in rows.items() if math.isfinite(error.sqnr_db)}
                if numbers:
                    found[f"{name}: {part}"] = Overlay(numbers, unit="dB", combine="min", low_is_bad=True, partial=True)
        elif isinstance(item, NodeTimes):
            found[name] = Overlay(item.ms, unit="ms", combine="sum", partial=True)
        elif isinstance(item, Overlay):
            found[name] = item
        elif isinstance(item, Mapping):
            found[name] = Overlay(item)
        else:
            raise TypeError(f"overlay {name!r} is a {type(item).__name__}; wanted a dictionary of numbers by node")
    return found


def with_overlays(graph: Graph, overlays: Mapping[str, Overlay]) -> Graph:
    """Return the graph, each node with its values.

    Raises:
        ValueError: a name in an overlay is that of no node; of one that may be partial, all are.
    """
    known = {key for node in graph.nodes for key in (node.id, *node.origins)}
    for name, overlay in overlays.items():
        strange = [key for key in overlay.values if key not in known]
        if strange and not (overlay.partial and len(strange) < len(overlay.values)):
            raise ValueError(
                describe(
                    f"overlay {name!r} has values for what is no node of the graph",
                    got=", ".join(strange[:5]),
                    wanted=", ".join(node.id for node in graph.nodes[:5]) + ", ...",
                )
            )
    return _with_values(graph, overlays) if overlays else graph


def _with_values(graph: Graph, overlays: Mapping[str, Overlay]) -> Graph:
    last_of = {origin: node.id for node in graph.nodes for origin in node.origins}
    ids = {node.id for node in graph.nodes}
    nodes = []
    for node in graph.nodes:
        found: dict[str, Number | str] = {}
        for name, overlay in overlays.items():
            for key in _keys(node, last_of, ids):
                if key in overlay.values:
                    found[name] = overlay.values[key]
                    break
        nodes.append(dataclasses.replace(node, values={**node.values, **found}) if found else node)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _keys(node: Node, last_of: Mapping[str, str], ids: set[str]) -> Iterable[str]:
    """Yield the names that a node answers to: of several nodes made from one, the last answers for it."""
    yield node.id
    yield from (origin for origin in node.origins if origin not in ids and last_of[origin] == node.id)
