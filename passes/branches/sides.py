"""A branch as the passes see it: its predicate, its two sides, what they get and what comes out."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fxopt import Rewriter
from fxopt.args import source_location
from fxopt.attributes import get_path, owner_of
from fxopt.effects import has_effect
from fxopt.graph_module import graph_modules
from fxopt.regions import COND, body_of, results_of

__all__ = [
    "Branch", "branches_in", "copy_side", "dependents", "discard_unread", "inline_side", "insert_branch", "line_of",
    "nodes_among", "nodes_between", "replace_branch",
]  # fmt: skip

Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class Branch:
    """A call of ``cond``.

    Attributes:
        node: The call.
        predicate: The node that decides, or a number that is known.
        sides: Graph of the true side, graph of the false side.
        operands: What both sides get.
    """

    node: Node
    predicate: Any
    sides: tuple[torch.fx.GraphModule, torch.fx.GraphModule]
    operands: tuple[Any, ...]

    @staticmethod
    def of(node: Node) -> Branch:
        """Return the branch that a ``cond`` node is."""
        predicate, first, second, *rest = node.args
        sides = body_of(first), body_of(second)  # type: ignore[arg-type]  # both are get_attr nodes
        return Branch(node, predicate, sides, tuple(rest[0]) if rest else ())  # type: ignore[arg-type]  # a sequence

    def results(self) -> Iterator[tuple[int, Node]]:
        """Yield the nodes that take the results apart, with the index of the result."""
        for user in list(self.node.users):
            if user.target is operator.getitem:
                yield user.args[1], user  # type: ignore[misc]  # an index

    def has_effect(self, side: bool) -> bool:
        """Return whether a side does something beside what it yields."""
        return any(has_effect(node) for node in self.inner(side))

    def inner(self, side: bool) -> Iterator[Node]:
        """Yield the nodes of a side that compute something."""
        for node in self.side(side).graph.nodes:
            if node.op not in ("placeholder", "output"):
                yield node

    def side(self, side: bool) -> torch.fx.GraphModule:
        """Return the graph of the true side, or of the false one."""
        return self.sides[0 if side else 1]

    def bound(self, side: bool) -> dict[Node, Any]:
        """Return what each placeholder of a side stands for in the graph around it."""
        placeholders = [node for node in self.side(side).graph.nodes if node.op == "placeholder"]
        return dict(zip(placeholders, self.operands, strict=True))


def line_of(node: Node) -> str:
    """Return file and line of a branch as ``net.py:23``; the text for users, and what they choose by."""
    where = source_location(node)
    return f"{where[0].replace(chr(92), '/').rpartition('/')[2]}:{where[1]}" if where else node.name


def inline_side(rw: Rewriter, branch: Branch, side: bool, *, why: str) -> None:
    """Put the nodes of one side in the place of a branch, whose results they then yield."""
    results = copy_side(rw, branch, side, why=why)
    replace_branch(rw, branch, results, why=why)


def copy_side(rw: Rewriter, branch: Branch, side: bool, *, why: str) -> list[Any]:
    """Insert the nodes of one side before a branch, and return what they yield."""
    env = branch.bound(side)
    for node in branch.inner(side):
        env[node] = _copied(rw, node, env, branch.node, why)
    return [_looked_up(result, env) for result in results_of(branch.side(side))]


def replace_branch(rw: Rewriter, branch: Branch, results: Sequence[Any], *, why: str) -> None:
    """Let the readers of a branch read other values, and drop it."""
    for index, node in branch.results():
        rw.replace_value(node, results[index], why=why)
    discard_unread(rw, [branch.node], why=why)


def insert_branch(
    rw: Rewriter,
    sides: Sequence[torch.fx.GraphModule],
    outer: Sequence[Node],
    *,
    like: Branch,
    before: Node,
    why: str,
    names: Sequence[str] = (),
) -> tuple[Node, list[Node]]:
    """Insert a branch on the predicate of another one, with other sides; return it and the nodes of its results."""
    names = names or [str(node.target) for node in like.node.args[1:3]]  # type: ignore[union-attr]  # get_attr nodes
    for side in sides:
        side.graph.eliminate_dead_code(is_impure_node=has_effect)
        side.recompile()
    graphs = [rw.graph(name, side, near=before, why=why) for name, side in zip(names, sides, strict=True)]
    args = (like.predicate, *graphs, tuple(outer))
    call = rw.insert_call(COND, args, before=before, why=why, sources=[like.node])
    results = [
        rw.insert_call(operator.getitem, (call, index), before=before, why=why, sources=[like.node])
        for index in range(len(results_of(sides[0])))
    ]
    return call, results


def branches_in(gm: torch.fx.GraphModule) -> list[Node]:
    """Return the branches of a graph and of the graphs inside it."""
    return [node for module in graph_modules(gm) for node in module.graph.nodes if node.target is COND]


def nodes_between(first: Node, last: Node) -> list[Node]:
    """Return the nodes that stand after ``first`` and before ``last``."""
    found, node = [], first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def dependents(roots: set[Node], nodes: Sequence[Node]) -> list[Node]:
    """Return those of ``nodes``, in order, that are no roots and read one of them or of each other."""
    known, found = set(roots), []
    for node in nodes:
        if node not in roots and any(source in known for source in node.all_input_nodes):
            known.add(node)
            found.append(node)
    return found


def discard_unread(rw: Rewriter, nodes: Sequence[Node], *, why: str) -> None:
    """Erase those of ``nodes`` that nobody reads, the last ones first."""
    for node in reversed(nodes):
        if not node._erased and not node.users:
            rw.discard(node, why=why)


def nodes_among(items: Iterable[Any]) -> list[Node]:
    """Return the nodes with a value among some items, each once, in order; the reads of graphs have none."""
    return list(dict.fromkeys(item for item in items if isinstance(item, Node) and "val" in item.meta))


def _copied(rw: Rewriter, node: Node, env: Mapping[Node, Any], before: Node, why: str) -> Node:
    if node.op == "get_attr":
        name = str(node.target)
        found = get_path(owner_of(node), name)
        if isinstance(found, torch.fx.GraphModule):
            return rw.graph(name, found, near=before, why=why)
        return rw.constant(name, found, near=before, trainable=isinstance(found, torch.nn.Parameter), why=why)
    args, kwargs = _looked_up(node.args, env), _looked_up(node.kwargs, env)
    return rw.copy_call(node, args, kwargs, before=before, why=why)


def _looked_up(item: Any, env: Mapping[Node, Any]) -> Any:
    return torch.fx.map_arg(item, lambda node: env[node])
