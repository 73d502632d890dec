"""Find what both sides of a branch compute from the same operands, and compute it once, before the branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt import Rewriter
from fxopt.effects import is_pure
from fxopt.passes.branches.builder import SideBuilder
from fxopt.passes.branches.sides import Branch, insert_branch, line_of, nodes_among, replace_branch
from fxopt.regions import results_of

__all__ = ["hoist", "rebuilt", "same_work"]

Node = torch.fx.Node
_STAYS = {torch.ops.aten.clone.default, torch.ops.aten.full.default}  # no work, and a result of its own memory


def same_work(branch: Branch) -> bool:
    """Return whether both sides yield the same, computed in the same way."""
    if branch.has_effect(True) or branch.has_effect(False):
        return False
    first, second = _works(branch, True), _works(branch, False)
    ends = zip(results_of(branch.side(True)), results_of(branch.side(False)), strict=True)
    return all(first.get(a, a) == second.get(b, b) for a, b in ends)


def hoist(rw: Rewriter, branch: Branch) -> Node | None:
    """Compute before a branch what both sides compute from its operands; return the branch that is left."""
    first, second = _works(branch, True), _works(branch, False)
    common = {work for work in second.values() if isinstance(work, str)}
    ready: dict[Node, Any] = dict(branch.bound(True))
    given: dict[Any, Node] = {}
    why = f"{line_of(branch.node)}: both sides compute it"
    for node in branch.inner(True):
        movable = first[node] in common and node.target not in _STAYS
        if movable and all(source in ready for source in node.all_input_nodes):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: ready[source])
            ready[node] = given[first[node]] = rw.copy_call(node, args, kwargs, before=branch.node, why=why)
    if not given:
        return None
    outer = nodes_among([*branch.operands, *given.values()])
    sides = []
    for side, works in ((True, first), (False, second)):
        known = {node: given[work] for node, work in works.items() if isinstance(work, str) and work in given}
        sides.append(rebuilt(branch, side, known, outer))
    call, made = insert_branch(rw, sides, outer, like=branch, before=branch.node, why=why)
    replace_branch(rw, branch, made, why=why)
    return call


def rebuilt(
    branch: Branch, side: bool, known: Mapping[Node, Node], outer: Sequence[Node], keep: Sequence[int] | None = None
) -> torch.fx.GraphModule:
    """Return a side once more.

    Args:
        branch: The branch.
        side: Which side.
        known: Nodes of the side that it gets from around, and what they are there.
        outer: What the side gets.
        keep: Which results it yields; all if None.
    """
    builder = SideBuilder(outer)
    bound = {inner: builder.env.get(given, given) for inner, given in branch.bound(side).items()}
    bound |= {node: builder.env[given] for node, given in known.items()}
    env = builder.add([node for node in branch.inner(side) if node not in known], bound)
    results = results_of(branch.side(side))
    return builder.finished([env[results[index]] for index in (range(len(results)) if keep is None else keep)])


def _works(branch: Branch, side: bool) -> dict[Node, Any]:
    """Return for every node of a side what it computes: equal texts stand for equal work, anything else for itself."""
    works: dict[Node, Any] = dict(branch.bound(side))
    for node in branch.inner(side):
        works[node] = _work(node, works)
    return works


def _work(node: Node, works: Mapping[Node, Any]) -> Any:
    if node.op != "call_function" or not is_pure(node) or "modes" in node.meta:
        return ("its own", id(node))
    args, kwargs = pytree.tree_map_only(Node, lambda source: _Operand(works[source]), (node.args, node.kwargs))
    return f"{node.target}{args!r}{sorted(kwargs.items())!r}"


class _Operand:
    """An argument, printed as what it computes."""

    def __init__(self, work: Any) -> None:
        self.text = f"<node {id(work)}>" if isinstance(work, Node) else f"<{work}>"

    def __repr__(self) -> str:
        return self.text
