"""Make one branch of two on the same predicate.

    before:  a = cond(p, f, g, x);  b = relu(a);  c = cond(p, h, k, b)
    after:   c = cond(p, x -> h(relu(f(x))), x -> k(relu(g(x))), x)

What stands between both and reads the first moves into the sides; it must be read by the second branch only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt import Rewriter
from fxopt.effects import is_pure
from fxopt.passes.branches.builder import SideBuilder
from fxopt.passes.branches.sides import (
    Branch,
    dependents,
    discard_unread,
    insert_branch,
    line_of,
    nodes_among,
    nodes_between,
    replace_branch,
)
from fxopt.regions import COND, results_of

__all__ = ["merge_with_next"]

Node = torch.fx.Node


def merge_with_next(rw: Rewriter, branch: Branch) -> Node | None:
    """Merge a branch with the next one on its predicate; return the branch that does the work of both."""
    later = _later(branch)
    if later is None:
        return None
    between = nodes_between(branch.node, later.node)
    own = {branch.node, *(node for _, node in branch.results())}
    moving = dependents(own, between)
    problem = _problem(branch, later, between, own, moving)
    if problem is not None:
        rw.skip(later.node, f"not merged with the branch at {line_of(branch.node)}: {problem}")
        return None
    return _merged(rw, branch, later, moving)


def _later(branch: Branch) -> Branch | None:
    node = branch.node.next
    while node.op != "output":
        if node.target is COND and node.args[0] is branch.predicate:
            return Branch.of(node)
        node = node.next
    return None


def _problem(
    first: Branch, later: Branch, between: Sequence[Node], own: set[Node], moving: Sequence[Node]
) -> str | None:
    """Return why two branches cannot become one, or None."""
    effects = any(branch.has_effect(side) for branch in (first, later) for side in (True, False))
    calls = [node for node in between if node.op == "call_function" and node not in own]
    if any(not is_pure(node) for node in calls) and (effects or any(not is_pure(node) for node in moving)):
        return "something with an effect stands between"
    stays = {*own, *moving, later.node}
    for node in (*moving, *own):
        reader = next((user for user in node.users if user not in stays), None)
        if reader is not None and (node not in own or reader in between):
            return f"{reader.name} reads {node.name}, which would stand after it"
    return None


def _merged(rw: Rewriter, first: Branch, later: Branch, moving: Sequence[Node]) -> Node:
    results = dict(first.results())
    inside = {first.node, *results.values(), *moving}
    reads = [source for node in moving for source in node.all_input_nodes]
    outer = [node for node in nodes_among([*first.operands, *reads, *later.operands]) if node not in inside]
    sides = [_both(first, later, side, results, moving, outer) for side in (True, False)]
    why = f"{line_of(later.node)}: decided together with {line_of(first.node)}"
    call, made = insert_branch(rw, sides, outer, like=first, before=later.node, why=why)
    shift = len(results_of(first.side(True)))
    replace_branch(rw, later, made[shift:], why=why)
    discard_unread(rw, moving, why=why)
    replace_branch(rw, first, made[:shift], why=why)
    return call


def _both(
    first: Branch, later: Branch, side: bool, results: dict[int, Node], moving: Sequence[Node], outer: Sequence[Node]
) -> torch.fx.GraphModule:
    """Return the side that does what both branches do there."""
    builder = SideBuilder(outer)
    made = builder.add_side(first, side)
    around = builder.add(moving, {node: made[index] for index, node in results.items()})
    return builder.finished([*made, *builder.add_side(later, side, around)])
