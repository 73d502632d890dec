"""What one graph has that another had not: matched by where nodes come from, not by what they are called.

A pass that replaces a node lets the new one take over its name, and gives others new names. So a node that is new in
the second graph is compared with those of the first that went into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from fxopt.tools.viz.model import Edge, Graph, Node

__all__ = ["Comparison", "Difference", "compare"]

Status = Literal["added", "removed", "changed", "rewired"]
_GONE = " (before)"
_READS = "reads: "


@dataclasses.dataclass(frozen=True)
class Difference:
    """What became of one node.

    Attributes:
        status: ``added``, ``removed``, ``changed``, or ``rewired`` where it only reads other nodes than before.
        why: The reason, as the pass gave it; empty if it is not known.
        was: Id in the first graph of the node that it was changed from, or of those that it takes the place of.
        details: What is different: ``padding: [0, 0] > [1, 1]``.
    """

    status: Status
    why: str = ""
    was: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both graphs in one: the second, and what only the first has, with " (before)" behind the ids of these.

    Attributes:
        graph: All nodes.
        differences: By id, of those that are not the same in both.
    """

    graph: Graph
    differences: dict[str, Difference]


def compare(before: Graph, after: Graph, reasons: Mapping[str, str] | None = None) -> Comparison:
    """Compare two graphs.

    Args:
        before: What it was.
        after: What it is.
        reasons: Why a node was changed, by its id in either graph.
    """
    reasons = reasons or {}
    pairs = _pairs(before, after)  # after > before
    twins = {old: new for new, old in pairs.items()}
    old, new = before.by_id(), after.by_id()
    differences: dict[str, Difference] = {}
    gone = _by_origin(node for node in before.nodes if node.id not in twins and node.kind not in ("input", "output"))
    for node in after.nodes:
        if node.id not in pairs:
            replaced = tuple(dict.fromkeys(one.id for origin in node.origins for one in gone.get(origin, ())))
            why = node.why or _reason(node.id, reasons)
            differences[node.id] = Difference("added", why, replaced)
        elif details := _details(old[pairs[node.id]], node, pairs):
            why = _reason(node.id, reasons) or _reason(pairs[node.id], reasons)
            status: Status = "changed" if why or any(not text.startswith(_READS) for text in details) else "rewired"
            differences[node.id] = Difference(status, why, (pairs[node.id],), details)
    ghosts = _ghosts(before, twins, set(new))
    differences |= {ghost.id: Difference("removed", _reason(was, reasons), (was,)) for was, ghost in ghosts.items()}
    return Comparison(Graph(_merged(before, after, twins, ghosts), after.title, after.notes), differences)


def _by_origin(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in nodes:
        for origin in node.origins:
            found.setdefault(origin, []).append(node)
    return found


def _pairs(before: Graph, after: Graph) -> dict[str, str]:
    """Return for each node of ``after`` the node of ``before`` that it is, or was changed from.

    First those with the same operator and origins, of which there may be several, in order; then those of the same
    operator that have an origin in common; then those that took over a name from a node with an origin in common.
    """
    pairs: dict[str, str] = {}
    free = {node.id: node for node in before.nodes}

    def pair(new: Node, candidates: Iterable[Node]) -> None:
        old = next((one for one in candidates if one.id in free), None)
        if new.id not in pairs and old is not None:
            pairs[new.id] = old.id
            del free[old.id]

    same: dict[tuple[str, tuple[str, ...]], list[Node]] = {}
    by_origin = _by_origin(before.nodes)
    for node in before.nodes:
        same.setdefault((node.op, node.origins), []).append(node)
    for node in after.nodes:
        old = free.get(node.id)
        if old is not None and (old.op, old.origins) == (node.op, node.origins):
            pair(node, [old])
    for node in after.nodes:
        pair(node, same.get((node.op, node.origins), ()))
    for node in after.nodes:
        shared = [one for origin in node.origins for one in by_origin.get(origin, ())]
        pair(node, [one for one in shared if one.op == node.op])
    for node in after.nodes:
        shared = [one for origin in node.origins for one in by_origin.get(origin, ())]
        pair(node, [one for one in shared if one.id == node.id])
    return pairs


def _details(old: Node, new: Node, pairs: Mapping[str, str]) -> tuple[str, ...]:
    """Return what is different between a node and what it was before; what it reads may be called otherwise now."""
    found = []
    if old.op != new.op:
        found.append(f"operator: {old.op} > {new.op}")
    if old.outputs != new.outputs:
        found.append(f"type: {', '.join(old.outputs)} > {', '.join(new.outputs)}")
    was, now = dict(old.attributes), dict(new.attributes)
    found += [
        f"{name}: {was.get(name, '-')} > {now.get(name, '-')}"
        for name in dict.fromkeys((*was, *now))
        if was.get(name) != now.get(name)
    ]
    found += _weight_details(old, new)
    reads = [pairs.get(edge.source, edge.source) for edge in new.inputs]
    read = [edge.source for edge in old.inputs]
    if reads != read:
        found.append(f"{_READS}{', '.join(read) or '-'} > {', '.join(edge.source for edge in new.inputs) or '-'}")
    return tuple(found)


def _weight_details(old: Node, new: Node) -> list[str]:
    was, now = ({weight.argument: weight for weight in node.weights} for node in (old, new))
    found = []
    for name in dict.fromkeys((*was, *now)):
        before, after = was.get(name), now.get(name)
        if before is None or after is None or before.type != after.type:
            types = ("-" if weight is None else weight.type for weight in (before, after))
            found.append(f"weight {name}: {' > '.join(types)}")
        elif before.digest != after.digest:
            found.append(f"weight {name}: other values")
    return found


def _reason(identifier: str, reasons: Mapping[str, str]) -> str:
    """Return why a node was changed; in the graph of a branch or loop, passes give its name without the path."""
    return reasons.get(identifier) or reasons.get(identifier.rpartition("/")[2], "")


def _ghosts(before: Graph, twins: Mapping[str, str], taken: set[str]) -> dict[str, Node]:
    """Return the nodes that only the first graph has, by their ids there; they read what is left of what they read."""
    gone = {node.id: f"{node.id}{_GONE}" for node in before.nodes if node.id not in twins}

    def renamed(edge: Edge) -> Edge:
        source = gone.get(edge.source) or twins.get(edge.source) or edge.source
        return dataclasses.replace(edge, source=source)

    return {
        node.id: dataclasses.replace(node, id=gone[node.id], inputs=tuple(renamed(edge) for edge in node.inputs))
        for node in before.nodes
        if node.id in gone
    }


def _merged(before: Graph, after: Graph, twins: Mapping[str, str], ghosts: Mapping[str, Node]) -> tuple[Node, ...]:
    """Return the nodes of ``after``, each ghost behind the last node before it that is still there."""
    behind: dict[str | None, list[Node]] = {}
    last: str | None = None
    for node in before.nodes:
        if node.id in ghosts:
            behind.setdefault(last, []).append(ghosts[node.id])
        else:
            last = twins[node.id]
    merged = list(behind.get(None, ()))
    for node in after.nodes:
        merged += [node, *behind.get(node.id, ())]
    return tuple(merged)
