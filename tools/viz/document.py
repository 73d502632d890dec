"""Everything that the page shows, as plain values for JSON: steps, the graph of each, and what changed since.

Most nodes are the same in all steps, so each is written once, under ``records``, and a graph is a list of numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fxopt.tools.viz.differences import Difference, compare
from fxopt.tools.viz.groups import nest
from fxopt.tools.viz.model import Graph, Node, Overlay
from fxopt.tools.viz.overlays import BUILT_IN

__all__ = ["Stage", "document"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One position of the slider.

    Attributes:
        graph: The graph there.
        label: Name of the pass, or of the file.
        summary: What it did, in a line.
        reasons: Why it changed each node.
    """

    graph: Graph
    label: str
    summary: str = ""
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def document(stages: Sequence[Stage], title: str, overlays: Mapping[str, Overlay] | None = None) -> dict[str, Any]:
    """Return the content of the page, fit for JSON.

    Args:
        stages: At least one; the slider has as many positions.
        title: Of the page.
        overlays: What users gave; their values stand in the nodes already.
    """
    writer = _Writer()
    reasons: dict[str, str] = {}
    steps = []
    for index, stage in enumerate(stages):
        step: dict[str, Any] = {
            "label": stage.label,
            "summary": stage.summary,
            "graph": writer.graph(stage.graph, {}),
            "sincePrevious": None,
            "sinceFirst": None,
        }
        if index:
            reasons |= stage.reasons
            step["sincePrevious"] = writer.comparison(stages[index - 1].graph, stage.graph, stage.reasons)
            step["sinceFirst"] = (
                step["sincePrevious"] if index == 1 else writer.comparison(stages[0].graph, stage.graph, reasons)
            )
        steps.append(step)
    nodes = [node for stage in stages for node in stage.graph.nodes]
    return {
        "title": title,
        "notes": list(dict.fromkeys(note for stage in stages for note in stage.graph.notes)),
        "records": writer.records,
        "graphs": writer.graphs,
        "steps": steps,
        "overlays": _overlays(nodes, overlays or {}),
    }


class _Writer:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.graphs: list[dict[str, Any]] = []
        self._number: dict[str, int] = {}
        self._known: dict[str, int] = {}

    def comparison(self, before: Graph, after: Graph, reasons: Mapping[str, str]) -> int:
        """Write both graphs in one and return its number."""
        found = compare(before, after, reasons)
        return self.graph(found.graph, found.differences)

    def graph(self, graph: Graph, differences: Mapping[str, Difference]) -> int:
        """Write a graph, if there is none like it, and return its number."""
        places = {node.id: place for place, node in enumerate(graph.nodes)}
        nodes = [self._record(node) for node in graph.nodes]
        changed = {places[key]: _plain(found) for key, found in differences.items()}
        key = json.dumps([nodes, [node.path for node in graph.nodes], changed])
        if key not in self._known:
            nesting = nest(graph)
            self._known[key] = len(self.graphs)
            self.graphs.append(
                {
                    "nodes": nodes,
                    "groups": [[group.label, group.parent, group.like] for group in nesting.groups],
                    "groupOf": nesting.group_of,
                    "differences": changed,
                }
            )
        return self._known[key]

    def _record(self, node: Node) -> int:
        record = _plain(dataclasses.replace(node, path=(), inputs=(), weights=()))  # the groups tell the path
        record["inputs"] = [[edge.source, edge.argument, edge.type] for edge in node.inputs]
        record["weights"] = [_plain(weight) for weight in node.weights]
        key = json.dumps(record, sort_keys=True)
        if key not in self._number:
            self._number[key] = len(self.records)
            self.records.append(record)
        return self._number[key]


def _plain(item: Any) -> dict[str, Any]:
    """Return the fields of a description that say something."""
    return {key: held for key, held in dataclasses.asdict(item).items() if held not in ("", (), None, {})}


def _overlays(nodes: Sequence[Node], given: Mapping[str, Overlay]) -> dict[str, dict[str, Any]]:
    """Return how each overlay that has values is to be shown."""
    values: dict[str, list[Any]] = {}
    for node in nodes:
        for name, held in node.values.items():
            values.setdefault(name, []).append(held)
    found: dict[str, dict[str, Any]] = {}
    for name in (*BUILT_IN, *given):
        if name not in values:
            continue
        own = given.get(name)
        style = BUILT_IN.get(name, {}) if own is None else {"unit": own.unit, "combine": own.combine}
        shown = {"unit": "", "combine": "max", "lowIsBad": own is not None and own.low_is_bad} | style
        if isinstance(values[name][0], str):
            found[name] = shown | {"words": sorted(set(values[name]))}
        else:
            found[name] = shown
    return found
