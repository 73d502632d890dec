"""Which pass, and which single rewrite of it, broke a check.

The rewrites of a list of passes are a line: all of the first pass, then all of the second, and so on, each pass at its
sites in the order in which it works. A graph with the first k of them can be made for every k, since a pass can be run
at some of its sites alone. What is looked for is the k at which the check turns from good to bad: at most log2(k) runs
of the check, besides one at each end and one with the guilty rewrite alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fxopt.capture import capture
from fxopt.changes import Change
from fxopt.checks import verify
from fxopt.contracts import Contract
from fxopt.errors import FxoptError, PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.judge import Judge
from fxopt.pass_base import Pass
from fxopt.reduce import Reduced, reduce
from fxopt.registry import resolve_all
from fxopt.repro import write_repro

__all__ = ["BisectResult", "Check", "bisect"]

Check = Callable[[CapturedModule], Any]
"""A check of a graph: it is bad if it returns False or raises."""


@dataclasses.dataclass(frozen=True)
class BisectResult:
    """The rewrite at which a check turns from good to bad.

    Attributes:
        item: The pass.
        step: Its place in the list, from 0.
        site: Where it worked: the name of a node of ``before``; empty if the pass can only be taken as a whole.
        changes: What it did there.
        before: The graph with all rewrites that come earlier; the check is good.
        after: The graph with this one as well; the check is bad.
        alone: Whether this rewrite is bad without those of its pass that come earlier; None if there are none.
        reason: What the check said of ``after``.
        rewrites: Number of rewrites of all passes.
        runs: Number of runs of the check.
        contract: What the check was, if it was a contract.
    """

    item: Pass
    step: int
    site: str
    changes: tuple[Change, ...]
    before: CapturedModule
    after: CapturedModule
    alone: bool | None
    reason: str
    rewrites: int
    runs: int
    contract: Contract | None = None

    def __str__(self) -> str:
        where = f"at {self.site}" if self.site else "as a whole"
        lines = [f"{self.item.spec()} (step {self.step + 1}) {where} breaks the check: {self.reason}"]
        lines += [
            f"  {change.kind} {change.node}: {change.why}" + (f"; {change.source}" if change.source else "")
            for change in self.changes[:5]
        ]
        if self.alone is False:
            lines.append("  but not alone: only together with rewrites of the same pass before it")
        lines.append(f"found among {self.rewrites} rewrites in {self.runs} runs of the check")
        return "\n".join(lines)

    @functools.cached_property
    def reduced(self) -> Reduced:
        """Both graphs, cut down to the part in which they differ; see :func:`fxopt.reduce.reduce`."""
        return reduce(self.before, self.after, self.contract, one_place=bool(self.site))

    def save(self, folder: str | Path, *, whole: bool = False) -> Path:
        """Write what reproduces it to a folder, which is made; return the path of its script.

        The graphs are there twice, for fxopt (``before.fxopt``) and for torch alone (``before.pt2``), beside
        ``inputs.pt`` and ``repro.py``, which ends with status 1 if the graphs differ by more than the contract allows.

        Args:
            folder: Where to.
            whole: Write the whole graphs instead of the part in which they differ.

        Raises:
            OSError: the folder cannot be written.
        """
        pair = self.reduced.uncut() if whole else self.reduced
        return write_repro(
            folder,
            pair,
            f"{self.item.spec()} breaks a check.",
            {
                "pass": f"{self.item.spec()} (step {self.step + 1})",
                "site": self.site or "(the pass as a whole)",
                "source": next((change.source for change in self.changes if change.source), "unknown"),
                "reason": self.reason,
                "left": f"{pair.size()}" + (f", which compute {pair.value}" if pair.value else ""),
                "shows": pair.problem or None,
                "note": pair.note or None,
            },
        )


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A pass, the graph that it works on, and its sites in order; ``None`` stands for all of them at once."""

    step: int
    item: Pass
    graph: CapturedModule
    sites: tuple[str | None, ...]

    def made(self, chosen: tuple[str | None, ...]) -> CapturedModule:
        """Return the graph with the pass at some of its sites."""
        if not chosen:
            return self.graph
        only = None if None in chosen else [site for site in chosen if site is not None]
        return self.item(self.graph, only=only).gm


def bisect(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., Any],
    passes: str | Iterable[Any],
    check: Check | Contract | None = None,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    calibration: Any = None,
) -> BisectResult:
    """Find the rewrite that breaks a check.

    Args:
        model: A module, or a captured graph; see :func:`fxopt.optimize`.
        passes: The passes, which are run unchecked; see :func:`fxopt.optimize`.
        check: A function of a graph that returns False, or raises, if it is bad. A contract, ROUNDING if nothing is
            given, compares with the graph that came in: on its samples, at other sizes, in both modes.
        example_inputs: See :func:`fxopt.capture`.
        dynamic_shapes: See :func:`fxopt.capture`.
        calibration: See :func:`fxopt.optimize`.

    Raises:
        PassError: the check is bad before the first pass, or good after the last one; a pass is unknown or raises.
        CaptureError: the model cannot become one graph.
    """
    items = resolve_all(passes)
    gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    if calibration is not None:
        gm = gm.clone()
        gm.calibration = calibration
    stages = _stages(gm, items)
    check = Contract.ROUNDING if check is None else check
    runs = _Runs(_check_of(gm, check))
    if (problem := runs.problem(gm)) is not None:
        raise PassError(
            describe(
                "the check is bad before the first pass, so no pass is to blame",
                found=problem,
                try_="a check that the model itself passes",
            )
        )
    line = [(stage, count) for stage in stages for count in range(1, len(stage.sites) + 1)]
    last = runs.problem(_graph_at(line[-1])) if line else None
    if last is None:
        raise PassError(
            describe(
                "the check is good after the last pass: there is nothing to find",
                got=f"{len(line)} rewrites of {len(items)} passes",
                try_="the check, inputs and passes with which it went wrong",
            )
        )
    good, bad, reason = -1, len(line) - 1, last
    while bad - good > 1:
        middle = (good + bad) // 2
        found = runs.problem_at(line[middle])
        good, bad, reason = (middle, bad, reason) if found is None else (good, middle, found)
    result = _result(line[bad], reason, runs, len(line))
    return dataclasses.replace(result, contract=check if isinstance(check, Contract) else None)


def _stages(gm: CapturedModule, items: Iterable[Pass]) -> list[_Stage]:
    """Run the passes, and return those that changed something."""
    stages = []
    for step, item in enumerate(items):
        try:
            result = item(gm)
        except Exception as error:
            error.add_note(f"in pass {item.spec()}, step {step + 1}")
            raise
        if result.modified:
            sites = tuple(dict.fromkeys(change.site for change in result.changes))
            whole = not item.divisible or "" in sites
            stages.append(_Stage(step, item, gm, (None,) if whole else sites))
            gm = result.gm
    return stages


def _graph_at(at: tuple[_Stage, int]) -> CapturedModule:
    stage, count = at
    return stage.made(stage.sites[:count])


def _result(at: tuple[_Stage, int], reason: str, runs: _Runs, rewrites: int) -> BisectResult:
    stage, count = at
    site = stage.sites[count - 1]
    changes = stage.item(stage.graph, only=None if site is None else [site]).changes
    alone = None if count == 1 else runs.problem_at_sites(stage, (site,)) is not None
    return BisectResult(
        item=stage.item, step=stage.step, site=site or "", changes=tuple(changes),
        before=stage.made(stage.sites[: count - 1]), after=_graph_at(at),
        alone=alone, reason=reason, rewrites=rewrites, runs=runs.count,
    )  # fmt: skip


class _Runs:
    """Runs the check, and counts."""

    def __init__(self, check: Callable[[CapturedModule], str | None]) -> None:
        self._check = check
        self.count = 0

    def problem(self, gm: CapturedModule) -> str | None:
        """Return what is bad about a graph, or None."""
        self.count += 1
        gm.recompile()
        return self._check(gm)

    def problem_at(self, at: tuple[_Stage, int]) -> str | None:
        """Return what is bad about the graph at a place of the line, or None."""
        stage, count = at
        return self.problem_at_sites(stage, stage.sites[:count])

    def problem_at_sites(self, stage: _Stage, sites: tuple[str | None, ...]) -> str | None:
        """Return what is bad about the graph with some rewrites of a pass; one that cannot be made is bad as well."""
        try:
            graph = stage.made(sites)
            verify(graph, after=stage.item.spec())
        except FxoptError as error:
            self.count += 1
            return f"the graph cannot be made: {error}"
        return self.problem(graph)


def _check_of(gm: CapturedModule, check: Check | Contract) -> Callable[[CapturedModule], str | None]:
    if isinstance(check, Contract):
        judge = Judge(gm, "all")
        return lambda candidate: judge.judge(candidate, check, evaluation_only=False)[0]

    def problem(candidate: CapturedModule) -> str | None:
        try:
            answer = check(candidate)
        except Exception as error:  # whatever a user's check raises is its verdict
            return f"{type(error).__name__}: {error}"
        return "it returned False" if answer is False else None

    return problem
