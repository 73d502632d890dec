"""Nests the nodes of a graph in groups, so that a picture can close them: by module, and in sections where one is long.

At each level the groups and single nodes form a graph without cycles, as a layout in layers wants it: a module that
is called twice, or whose parts run between others, becomes several groups. A group of one node is no group.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence

import networkx

from fxopt.tools.viz.model import Graph

__all__ = ["Group", "Nesting", "nest"]

_LONGEST = 48  # items of a level that are shown side by side
TOP = -1


@dataclasses.dataclass
class Group:
    """A group of nodes.

    Attributes:
        label: Its name: a module, a branch, a section.
        parent: The group around it, by its place in the list; -1 at the top.
        like: Another group of the same structure before this one, or -1: it tells nothing new.
    """

    label: str
    parent: int = TOP
    like: int = -1


@dataclasses.dataclass
class Nesting:
    """The groups of a graph, and for each node, in the graph's order, the group right around it; -1 for none."""

    groups: list[Group]
    group_of: list[int]


def nest(graph: Graph) -> Nesting:
    """Return the nesting of a graph whose nodes stand in an order in which they can be computed."""
    builder = _Builder(graph)
    builder.fill(list(range(len(graph.nodes))), 0, TOP)
    _mark_alike(builder.nesting, graph)
    return builder.nesting


Unit = tuple[str | None, list[int]]
"""The label of a group, or None of a single node, and the places of the nodes."""


class _Builder:
    def __init__(self, graph: Graph) -> None:
        self.nesting = Nesting([], [TOP] * len(graph.nodes))
        places = {node.id: place for place, node in enumerate(graph.nodes)}
        self._reads = [[places[edge.source] for edge in node.inputs if edge.source in places] for node in graph.nodes]
        self._paths = _paths(graph, self._reads)

    def fill(self, members: list[int], depth: int, parent: int) -> None:
        """Put nodes into a group, and into groups inside it."""
        units = self._in_order(self._without_cycles(self._units(members, depth)))
        if len(units) > _LONGEST:
            self._fill_sections(units, depth, parent)
        else:
            self._place(units, depth, parent)

    def _place(self, units: Sequence[Unit], depth: int, parent: int) -> None:
        for label, places in units:
            if label is None or len(places) == 1:
                for place in places:
                    self.nesting.group_of[place] = parent
                continue
            inner = depth + 1
            while (following := self._shared_label(places, inner)) is not None:
                label, inner = following, inner + 1
            self.fill(places, inner, self._new_group(label, parent))

    def _fill_sections(self, units: list[Unit], depth: int, parent: int) -> None:
        """Cut a long level into sections of equal length, and these again if there are too many of them."""
        sections = -(-len(units) // _LONGEST)
        sections = min(sections, _LONGEST)
        bounds = [len(units) * at // sections for at in range(sections + 1)]
        for number, (start, end) in enumerate(itertools.pairwise(bounds), start=1):
            part = units[start:end]
            group = self._new_group(f"part {number} of {sections}", parent)
            if len(part) > _LONGEST:
                self._fill_sections(part, depth, group)
            else:
                self._place(part, depth, group)

    def _new_group(self, label: str, parent: int) -> int:
        self.nesting.groups.append(Group(label, parent))
        return len(self.nesting.groups) - 1

    def _shared_label(self, places: list[int], depth: int) -> str | None:
        labels = {self._paths[place][depth] if depth < len(self._paths[place]) else None for place in places}
        return labels.pop() if len(labels) == 1 else None

    def _units(self, members: list[int], depth: int) -> list[Unit]:
        units: list[Unit] = []
        known: dict[str, list[int]] = {}
        for place in members:
            path = self._paths[place]
            if depth >= len(path):
                units.append((None, [place]))
            elif path[depth] in known:
                known[path[depth]].append(place)
            else:
                known[path[depth]] = [place]
                units.append((path[depth], known[path[depth]]))
        return units

    def _quotient(self, units: Sequence[Unit]) -> networkx.DiGraph:
        unit_of = {place: index for index, (_, places) in enumerate(units) for place in places}
        quotient = networkx.DiGraph()
        quotient.add_nodes_from(range(len(units)))
        for place, reader in unit_of.items():
            quotient.add_edges_from(
                (unit_of[source], reader)
                for source in self._reads[place]
                if source in unit_of and unit_of[source] != reader
            )
        return quotient

    def _without_cycles(self, units: list[Unit]) -> list[Unit]:
        """Cut the groups that lie on a cycle into runs: what follows each other in the graph's order stays together."""
        found: list[Unit] = []
        for component in networkx.strongly_connected_components(self._quotient(units)):
            if len(component) == 1:
                found.append(units[next(iter(component))])
                continue
            labels = {place: units[index][0] for index in component for place in units[index][1]}
            found += _runs(labels)
        return found

    def _in_order(self, units: list[Unit]) -> list[Unit]:
        quotient = self._quotient(units)
        try:
            order = networkx.lexicographical_topological_sort(quotient, key=lambda index: units[index][1][0])
            return [units[index] for index in order]
        except networkx.NetworkXUnfeasible:  # a comparison of two graphs may run in circles
            return sorted(units, key=lambda unit: unit[1][0])


def _paths(graph: Graph, reads: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
    """Return the groups around each node; what is made of weights alone, for one reader, belongs to its reader."""
    paths = [node.path for node in graph.nodes]
    readers: list[set[int]] = [set() for _ in graph.nodes]
    for place, sources in enumerate(reads):
        for source in sources:
            readers[source].add(place)
    for place in reversed(range(len(paths))):
        if not paths[place] and not reads[place] and graph.nodes[place].kind != "input" and len(readers[place]) == 1:
            paths[place] = paths[next(iter(readers[place]))]
    return paths


def _runs(labels: dict[int, str | None]) -> list[Unit]:
    runs: list[Unit] = []
    for place in sorted(labels):
        label = labels[place]
        if runs and label is not None and runs[-1][0] == label:
            runs[-1][1].append(place)
        else:
            runs.append((label, [place]))
    return runs


def _mark_alike(nesting: Nesting, graph: Graph) -> None:
    """Note for each group an earlier one in which the same operators read each other in the same way."""
    members: list[list[int]] = [[] for _ in nesting.groups]
    for place, around in enumerate(nesting.group_of):
        while around != TOP:
            members[around].append(place)
            around = nesting.groups[around].parent
    places = {node.id: place for place, node in enumerate(graph.nodes)}
    first: dict[str, int] = {}
    for index, group in enumerate(nesting.groups):
        position = {place: at for at, place in enumerate(members[index])}
        shape = [
            (graph.nodes[place].op, tuple(_inner(position, places, [e.source for e in graph.nodes[place].inputs])))
            for place in members[index]
        ]
        group.like = first.setdefault(hashlib.sha256(repr(shape).encode()).hexdigest(), index)
        if group.like == index:
            group.like = -1


def _inner(position: dict[int, int], places: dict[str, int], sources: Iterable[str]) -> Iterable[int]:
    return (position.get(places.get(source, TOP), TOP) for source in sources)
