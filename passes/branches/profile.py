"""Count which sides of its branches a graph takes on given inputs, and say which ones it never takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from fxopt import CapturedModule, Sample, source_line
from fxopt.eager_control_flow import observing
from fxopt.isolation import isolated
from fxopt.passes.branches.sides import Branch, branches_in, line_of

__all__ = ["BranchCount", "BranchProfile", "profile_branches"]


@dataclasses.dataclass(frozen=True)
class BranchCount:
    """How often a branch went either way.

    Attributes:
        line: File and line: ``net.py:23``.
        text: The line, with its function.
        number: Which of the branches that were captured it is; several may stand at a line. None if that is not known.
        true, false: How often each side was taken.
    """

    line: str
    text: str
    number: int | None
    true: int
    false: int

    @property
    def never(self) -> tuple[bool, ...]:
        """The sides that were never taken."""
        return tuple(side for side, count in ((True, self.true), (False, self.false)) if count == 0)

    def usual(self, min_share: float) -> bool | None:
        """Return the side that was taken at least this share of the times, or None if neither was, or none ran."""
        runs = self.true + self.false
        if not runs:
            return None
        for side, count in ((True, self.true), (False, self.false)):
            if count >= min_share * runs:
                return side
        return None


@dataclasses.dataclass(frozen=True)
class BranchProfile:
    """Which sides were taken: a coverage report when printed, a plan when given to ``SpecializeBranches``.

    Attributes:
        branches: The branches in the order of the graph.
        runs: How many inputs were run.
    """

    branches: tuple[BranchCount, ...]
    runs: int

    def __str__(self) -> str:
        width = max((len(count.text) for count in self.branches), default=6)
        lines = [f"{'branch':<{width}}  {'true':>6}  {'false':>6}  never taken ({self.runs} inputs)"]
        for count in self.branches:
            never = ", ".join(str(side).lower() for side in count.never)
            lines.append(f"{count.text:<{width}}  {count.true:>6}  {count.false:>6}  {never}".rstrip())
        return "\n".join(lines)

    def of(self, node: torch.fx.Node) -> list[BranchCount]:
        """Return the counts of a branch; of all branches at its line if it cannot be told apart from them."""
        at_line = [count for count in self.branches if count.line == line_of(node)]
        return [count for count in at_line if count.number == node.meta.get("branch", -1)] or at_line


def profile_branches(gm: CapturedModule, inputs: Iterable[Any] | None = None) -> BranchProfile:
    """Run a graph on inputs and count the sides that its branches take.

    Args:
        gm: A captured graph.
        inputs: Samples, as :func:`fxopt.capture` takes them; those of the graph if not given.

    Raises:
        InputError: a sample does not fit the graph.
    """
    branches = branches_in(gm)
    owners = {Branch.of(node).side(True): node for node in branches}
    counts = {node: [0, 0] for node in branches}

    def count(true_side: Any, taken: bool) -> None:
        node = owners.get(true_side)
        if node is not None:
            counts[node][0 if taken else 1] += 1

    runs = 0
    with observing(count):
        for sample in map(Sample.of, gm.samples if inputs is None else inputs):
            copy = sample.clone()
            with isolated(gm), torch.no_grad():
                gm(*copy.args, **copy.kwargs)
            runs += 1
    listed = [
        BranchCount(line_of(node), source_line(node) or node.name, node.meta.get("branch"), *counts[node])
        for node in branches
    ]
    return BranchProfile(tuple(listed), runs)
