"""Run a list of passes as transactions: check each, undo what is wrong, keep the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxopt.checks import fingerprint, verify
from fxopt.contracts import Contract
from fxopt.errors import ContractError, FxoptError, InvariantError, PassOrderError, describe
from fxopt.graph_module import CapturedModule
from fxopt.graph_text import graph_text
from fxopt.judge import Check, Judge
from fxopt.pass_base import Pass, PassResult
from fxopt.registry import resolve_all
from fxopt.report import Report, RolledBack, Step

__all__ = ["PassManager", "check_order"]

log = logging.getLogger("fxopt")
log.addHandler(logging.NullHandler())  # the report tells the same; whoever wants it in the log adds a handler


class PassManager:
    """Runs passes in order, each on a copy of the last good graph.

    Around each pass: the graph's invariants hold; the pass's record agrees with what changed; its contract holds on the
    example inputs, at the corners of the dynamic sizes, and in the other mode. Otherwise the guilty sites are found by
    running the pass again without them, and left out; if that does not help, the whole pass is.
    """

    def __init__(
        self, passes: str | Iterable[Any], *, strict: bool = False, check: Check = "all", keep_texts: bool = False,
        keep_graphs: bool = False, progress: Callable[[int, int, str], None] | None = None,
    ) -> None:  # fmt: skip
        """Prepare the list; nothing is run.

        Args:
            passes: Passes, names with options, torch passes, or functions of a GraphModule; or a comma-separated text.
            strict: Raise at the first pass that fails, instead of leaving it out.
            check: ``"all"``: samples, corners and both modes; ``"samples"``: no corners; ``"off"``: invariants only.
            keep_texts: Keep the text of the graph after each step in the report.
            keep_graphs: Keep the graph before the first step and after each in the report, for :func:`fxopt.view`.
            progress: Called before each pass with its index, the number of passes, and its name.

        Raises:
            PassError: a name or an option is unknown.
            PassOrderError: a pass stands behind one that ended what it needs.
        """
        if check not in ("all", "samples", "off"):
            raise ValueError(f"check is {check!r}; wanted 'all', 'samples' or 'off'")
        self.passes = resolve_all(passes)
        self.strict, self.check, self.progress = strict, check, progress
        self.keep_texts, self.keep_graphs = keep_texts, keep_graphs
        check_order(self.passes)

    def run(self, gm: CapturedModule) -> CapturedModule:
        """Return the rewritten graph, with its ``report``; ``gm`` is left alone.

        Raises:
            InvariantError: ``gm`` itself is malformed.
            PassError: with ``strict``, whatever a pass did wrong.
        """
        verify(gm)
        judge = Judge(gm, self.check)
        report = Report()
        good, contract = gm.clone(), Contract.EXACT
        if self.keep_graphs:
            report.graphs.append(good)
        for index, item in enumerate(self.passes):
            if self.progress is not None:
                self.progress(index, len(self.passes), item.name)
            step = Step(item.spec(), str(item.contract))
            before = good
            try:
                good = self._step(item, good, judge, step)
            except Exception as error:
                error.add_note(f"in pass {item.spec()}, step {index + 1} of {len(self.passes)}")
                if self.strict:
                    raise
                step.status, step.changes = "failed", ()
                step.rolled_back = (RolledBack((), f"{type(error).__name__}: {error}"),)
                log.warning("pass %s failed and is left out: %s: %s", item.spec(), type(error).__name__, error)
            if step.status in ("failed", "rolled back"):  # what was tried still says why; what was gained is gone
                step.notes = tuple(f"before it was undone: {note}" for note in step.notes)
            if good is not before:
                contract = contract.then(item.contract)
            step.nodes = (len(before.graph.nodes), len(good.graph.nodes))
            step.parameter_bytes = (tensor_bytes(before), tensor_bytes(good))
            if self.keep_texts:
                step.graph_text = graph_text(good)
            if self.keep_graphs:
                report.graphs.append(good)
            report.steps.append(step)
        report.contract = str(contract)
        report.notes += judge.refused
        # What is handed out may be trained or changed; the graphs of the steps stay as they were.
        handed_out = good.clone() if self.keep_graphs else good
        handed_out.report = report
        return handed_out

    def _step(self, item: Pass, good: CapturedModule, judge: Judge, step: Step) -> CapturedModule:
        """Run one pass and return the graph to go on with."""
        started = time.perf_counter()
        stamp = fingerprint(good)
        result = item(good)
        step.seconds = time.perf_counter() - started
        checking = time.perf_counter()
        try:
            _check_honesty(item, good, stamp, result)
            step.skips, step.notes = result.skips, result.notes
            if not result.modified:
                return good
            verify(result.gm, after=item.spec())
            problem, yielded = _judged(judge, item, result)
            if problem is not None:
                if self.strict:
                    raise ContractError(_contract_text(item, problem, result))
                result, yielded = self._without_guilty(item, good, judge, step, result, problem)
                if not result.modified:
                    return good
            step.changes, step.skips, step.notes, step.checked = result.changes, result.skips, result.notes, judge.runs
            step.errors = judge.accept(result.gm, item.contract, yielded, interface=item.interface)
            if step.status == "unchanged":
                step.status = "changed"
            return result.gm
        finally:
            step.check_seconds = time.perf_counter() - checking

    def _without_guilty(
        self, item: Pass, good: CapturedModule, judge: Judge, step: Step, result: PassResult, problem: str
    ) -> tuple[PassResult, list[tuple[Any, ...] | None]]:
        """Find the sites that break the contract, and return the pass's result without them."""
        sites = list(dict.fromkeys(change.site for change in result.changes))
        nothing = PassResult(good, (), result.skips)
        step.status = "rolled back"
        why = _contract_text(item, problem, result)
        step.rolled_back = (RolledBack((), why),)
        log.warning("pass %s breaks its contract: %s", item.spec(), problem)
        if not item.divisible or len(sites) < 2 or "" in sites:
            return nothing, []

        def holds(chosen: list[str]) -> bool:
            try:
                trial = item(good, only=chosen)
                verify(trial.gm, after=item.spec())
            except FxoptError:
                return False
            return _judged(judge, item, trial)[0] is None

        guilty = guilty_sites(sites, holds)
        innocent = [site for site in sites if site not in guilty]
        if not innocent:
            return nothing, []
        final = item(good, only=innocent)
        left, yielded = _judged(judge, item, final)
        if left is not None or not final.modified:
            return nothing, []
        step.status = "partly rolled back"
        step.rolled_back = (RolledBack(tuple(guilty), why),)
        return final, yielded


def _judged(judge: Judge, item: Pass, result: PassResult) -> tuple[str | None, list[tuple[Any, ...] | None]]:
    """Judge what a pass made by what the pass promises."""
    return judge.judge(result.gm, item.contract, evaluation_only=item.evaluation_only, interface=item.interface)


def guilty_sites(sites: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """Return the sites without which the check holds, testing groups and halving those that fail.

    Costs about ``g log2(n)`` checks for ``g`` guilty of ``n`` sites.
    """
    kept: list[str] = []
    guilty: list[str] = []
    stack = [sites]
    while stack:
        group = stack.pop()
        if len(group) < len(sites) and holds(kept + group):
            kept += group
        elif len(group) == 1:
            guilty += group
        else:
            middle = len(group) // 2
            stack += [group[middle:], group[:middle]]
    return guilty


def check_order(passes: list[Pass]) -> None:
    """Check that each pass stands where what it needs holds, before anything is run.

    Raises:
        PassOrderError: naming the pass, what it needs, which earlier pass ended it, and where to move it.
    """
    ended: dict[str, tuple[int, str]] = {}
    given: dict[str, tuple[int, str]] = {}
    for step, item in enumerate(passes, start=1):
        for fact in sorted(item.needs):
            if fact in ended:
                at, by = ended[fact]
                raise PassOrderError(
                    f"{item.name} (step {step}) needs {fact!r}, but {by} (step {at}) ended it; "
                    f"move {item.name} before step {at}"
                )
            if not fact.startswith("no-") and fact not in given:
                later = next((f"{p.name} (step {i})" for i, p in enumerate(passes, start=1) if fact in p.gives), None)
                hint = f"; move it behind {later}" if later else "; no pass of the list gives it"
                raise PassOrderError(f"{item.name} (step {step}) needs {fact!r}, which nothing before it gives{hint}")
        for fact in item.ends:
            ended[fact] = (step, item.name)
            given.pop(fact, None)
        for fact in item.gives:
            given[fact] = (step, item.name)
            ended.pop(fact, None)


def _check_honesty(item: Pass, good: CapturedModule, stamp: str, result: PassResult) -> None:
    if fingerprint(good) != stamp:
        raise InvariantError(f"{item.spec()} changed the graph that it was given, not its copy")
    differs = fingerprint(result.gm) != stamp
    if differs and not result.changes:
        raise InvariantError(
            describe(
                f"{item.spec()} changed the graph without a record of it",
                got="no change reported",
                wanted="every change made through the Rewriter",
                try_="rw.replace_call, rw.insert_call, rw.set_arg, rw.constant; never node.args = ...",
            )
        )


def _contract_text(item: Pass, problem: str, result: PassResult) -> str:
    changes = "; ".join(
        f"{c.kind} {c.node} ({c.why})" + (f" at {c.source}" if c.source else "") for c in result.changes[:3]
    )
    more = f"; and {len(result.changes) - 3} more" if len(result.changes) > 3 else ""
    return describe(
        f"{item.spec()} breaks its contract {item.contract}",
        found=problem,
        changes=changes + more,
        try_=item.remedy or None,
    )


def tensor_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones counted once."""
    seen = {id(t): t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()]}
    return sum(seen.values())


__all__ += ["guilty_sites", "tensor_bytes"]
