"""Make branches smaller: what both sides compute, what decides nothing, what is decided twice.

    known predicate      cond(True, f, g, x)                         f(x)
    equal sides          cond(p, f, f, x)                            f(x)
    equal results        cond(p, x -> (x, a(x)), x -> (x, b(x)))     x itself, and cond(p, a, b, x)
    common work          cond(p, x -> h(a(x)), x -> k(a(x)))         cond(p, h, k, a(x))
    decided before       cond(p, x -> cond(p, f, g, x), k, x)        cond(p, f, k, x)
    the same predicate   cond(p, f, g, x); cond(p, h, k, y)          cond(p, (f, h), (g, k), x, y)

Work moves out of a branch only if both sides do it, so that nothing is computed that was not.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from fxopt import Contract, Pass, Rewriter, arg
from fxopt.attributes import get_path, owner_of
from fxopt.passes.branches.common_work import hoist, rebuilt, same_work
from fxopt.passes.branches.merge_branches import merge_with_next
from fxopt.passes.branches.sides import Branch, inline_side, insert_branch, line_of, nodes_among, replace_branch
from fxopt.regions import COND, results_of

__all__ = ["SimplifyBranches", "known_predicate"]

Node = torch.fx.Node
_FULL, _CLONE = torch.ops.aten.full.default, torch.ops.aten.clone.default


@dataclasses.dataclass(frozen=True)
class SimplifyBranches(Pass):
    """Drop branches that decide nothing, hoist what both sides compute, and merge branches on one predicate."""

    name: ClassVar[str] = "simplify-branches"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Apply the first rule that fits to each branch, and again to what it became."""
        for node in rw.calls(COND):
            current: Node | None = node
            while current is not None and not current._erased:
                current = _simplified(rw, Branch.of(current))


def _simplified(rw: Rewriter, branch: Branch) -> Node | None:
    """Apply one rule; return the branch that the rest may be applied to, or None."""
    where = line_of(branch.node)
    known = known_predicate(branch.predicate)
    if known is not None:
        inline_side(rw, branch, known, why=f"{where}: the predicate is always {str(known).lower()}")
        return None
    if same_work(branch):
        inline_side(rw, branch, True, why=f"{where}: both sides are the same")
        return None
    if _decide_inner(rw, branch):
        return branch.node
    _hand_on(rw, branch)
    if branch.node._erased:
        return None
    return _drop_unread(rw, branch) or hoist(rw, branch) or merge_with_next(rw, branch)


def known_predicate(predicate: Any) -> bool | None:
    """Return what a predicate always is, or None if that depends on the inputs."""
    if isinstance(predicate, bool):
        return predicate
    if predicate.op == "get_attr":
        owner, path = owner_of(predicate), str(predicate.target)
        held = get_path(owner, path)
        is_constant = isinstance(held, torch.Tensor) and path in owner._non_persistent_buffers_set
        return bool(held) if is_constant else None
    if predicate.target is _FULL and isinstance(value := arg(predicate, "fill_value"), bool | int | float):
        return bool(value)
    return None


def _decide_inner(rw: Rewriter, branch: Branch) -> bool:
    """Within a side, a branch on the same predicate goes the way that the side is on."""
    done = False
    for side in (True, False):
        bound = branch.bound(side)
        for node in list(branch.inner(side)):
            if node.target is COND and bound.get(node.args[0]) is branch.predicate:  # type: ignore[arg-type]  # it is a node
                inline_side(rw, Branch.of(node), side, why=f"{line_of(node)}: decided at {line_of(branch.node)}")
                done = True
    return done


def _hand_on(rw: Rewriter, branch: Branch) -> None:
    """Let readers of a result that both sides take from the same operand read the operand."""
    bound = branch.bound(True), branch.bound(False)
    ends = zip(results_of(branch.side(True)), results_of(branch.side(False)), strict=True)
    operands: list[list[Any]] = [
        [table.get(_without_copies(end)) for table, end in zip(bound, pair, strict=True)] for pair in ends
    ]
    for index, node in branch.results():
        first, second = operands[index]
        # What the caller gets must stay in memory of its own.
        if isinstance(first, Node) and first is second and not any(user.op == "output" for user in node.users):
            rw.replace_value(node, first, why=f"{line_of(branch.node)}: both sides hand it on")


def _without_copies(node: Any) -> Any:
    while isinstance(node, Node) and node.target is _CLONE:
        node = node.args[0]
    return node


def _drop_unread(rw: Rewriter, branch: Branch) -> Node | None:
    """Leave out results that nobody reads, and operands that neither side reads."""
    read = dict(branch.results())
    used = {
        outside
        for side in (True, False)
        for inner, outside in branch.bound(side).items()
        if inner.users and isinstance(outside, Node)
    }
    outer = [node for node in nodes_among(branch.operands) if node in used]
    if len(read) == len(results_of(branch.side(True))) and len(outer) == len(branch.operands):
        return None
    sides = [rebuilt(branch, side, {}, outer, keep=sorted(read)) for side in (True, False)]
    why = f"{line_of(branch.node)}: what nobody reads is left out"
    call, made = insert_branch(rw, sides, outer, like=branch, before=branch.node, why=why)
    results: list[Any] = [None] * len(results_of(branch.side(True)))
    for index, node in zip(sorted(read), made, strict=True):
        results[index] = node
    replace_branch(rw, branch, results, why=why)
    return call
