"""Keep one side of a branch, and guard it.

    before:  y = cond(p, f, g, x)
    after:   guard(p, "net.py:23 ... is specialized to its true side", values);  y = f(x)

The side is chosen by the user, by what the samples did, or by proof. Where inputs ask for the side that was cut off,
the graph raises :class:`fxopt.GuardError`, and an ONNX file yields false as its output ``guards_hold``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fxopt import Contract, Pass, PassError, Rewriter, source_line
from fxopt.errors import describe
from fxopt.ops import GUARD
from fxopt.passes.branches.profile import BranchProfile, profile_branches
from fxopt.passes.branches.sides import Branch, inline_side, line_of
from fxopt.passes.branches.simplify_branches import known_predicate
from fxopt.regions import COND

__all__ = ["SpecializeBranches"]

Node = torch.fx.Node
aten = torch.ops.aten
_UNCHANGED = {aten.detach.default, aten.reshape.default, aten.to.dtype, aten.logical_not.default, aten.clone.default}


@dataclasses.dataclass(frozen=True)
class SpecializeBranches(Pass):
    """Keep one side of branches, under a guard.

    Attributes:
        sides: Which side to keep, by line: ``{"net.py:23": True}``, or texts ``"net.py:23=true"``.
        samples: Keep the side that all samples of the graph took, where they took one only.
        profile: The same for inputs that were run before, from :func:`fxopt.passes.profile_branches`.
        min_share: The share of the runs, above a half, in which a side must have been taken.
    """

    name: ClassVar[str] = "specialize-branches"
    contract: ClassVar[Contract] = Contract.EXACT
    sides: tuple[str, ...] = ()
    samples: bool = False
    profile: BranchProfile | None = None
    min_share: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.sides, Mapping):
            listed = tuple(f"{line}={str(side).lower()}" for line, side in self.sides.items())
            object.__setattr__(self, "sides", listed)
        for text in self.sides:
            if text.rpartition("=")[2].lower() not in ("true", "false") or ":" not in text:
                raise ValueError(f"side {text!r} is not of the form 'net.py:23=true'")
        if not 0.5 < self.min_share <= 1.0:
            raise ValueError(f"min_share is {self.min_share}; wanted more than 0.5 and at most 1")

    def run(self, rw: Rewriter) -> None:
        """Specialize the outer branches first; those inside the side that is kept come into reach by that.

        Raises:
            PassError: ``sides`` names a line where no branch is.
        """
        chosen = {text.rpartition("=")[0]: text.rpartition("=")[2].lower() == "true" for text in self.sides}
        known = {line_of(node) for node in rw.calls(COND, GUARD)}
        missing = [line for line in chosen if line not in known]
        if missing:
            raise PassError(
                describe(
                    f"specialize-branches: there is no branch at {', '.join(missing)}",
                    wanted=f"one of {', '.join(sorted(known)) or '(the graph has no branch)'}",
                )
            )
        # On a copy: whatever a run leaves in the tensors of this graph would count as a change.
        profile = self.profile or (profile_branches(rw.gm.clone(copy_tensors=True)) if self.samples else None)
        while self._specialized_one(rw, chosen, profile):
            pass
        for node in rw.calls(COND):
            if chosen.get(line_of(node), self._usual(node, profile)) is not None:
                rw.skip(node, "it stands inside a loop or another branch, where a guard cannot stand")

    def _specialized_one(self, rw: Rewriter, chosen: Mapping[str, bool], profile: BranchProfile | None) -> bool:
        outer = rw.gm.graph
        for node in rw.calls(COND):
            branch, line = Branch.of(node), line_of(node)
            proved = known_predicate(branch.predicate)
            side = proved if proved is not None else chosen.get(line, self._usual(node, profile))
            if side is None:
                continue
            if node.graph is not outer and proved is None:
                continue  # a guard stands in the outer graph, where the branch comes if its own side is kept
            if proved is None:
                _guard(rw, branch, side)
            inline_side(rw, branch, side, why=f"{line}: specialized to the {str(side).lower()} side")
            return True
        return False

    def _usual(self, node: Node, profile: BranchProfile | None) -> bool | None:
        counts = profile.of(node) if profile is not None else []
        sides = {count.usual(self.min_share) for count in counts if count.true + count.false}
        return sides.pop() if len(sides) == 1 else None


def _guard(rw: Rewriter, branch: Branch, side: bool) -> None:
    node, holds = branch.node, branch.predicate
    why = f"{line_of(node)}: guards the {str(side).lower()} side"
    if not side:
        holds = rw.insert_call(aten.logical_not.default, (holds,), before=node, why=why)
    values = _deciding_values(branch.predicate)
    message = (
        f"{source_line(node) or node.name} was specialized to its {str(side).lower()} side, "
        "and these inputs ask for the other"
    )
    args = (holds, message, values, [value.name for value in values])
    rw.insert_call(GUARD, args, before=node, why=why)


def _deciding_values(predicate: Any) -> list[Node]:
    """Return the numbers that a predicate compares, to be shown when the guard does not hold."""
    node = predicate
    while node.op == "call_function" and node.target in _UNCHANGED:
        node = node.all_input_nodes[0]
    sources = node.all_input_nodes if node.op == "call_function" else [node]
    numbers = [source for source in sources if getattr(source.meta.get("val"), "ndim", None) == 0]
    return [_first_written(source) for source in numbers] or [predicate]


def _first_written(node: Node) -> Node:
    """Return the value under its own name, before it was widened to the number that Python compares."""
    while node.target in (aten.to.dtype, aten.detach.default):
        node = node.all_input_nodes[0]
    return node
