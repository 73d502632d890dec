"""The ledger of a pipeline: what every step cost and brought, measured on the file that each graph makes.

The graphs are those that :func:`fxopt.optimize` keeps. Each becomes an ONNX file, which must agree with its graph
before anything is told of it; then the files are scored, counted, and timed in turn. A step that changed nothing hands
on the graph itself, which is measured once.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.args import shape_text
from fxopt.checks import fingerprint
from fxopt.contracts import Contract
from fxopt.dimensions import Sample
from fxopt.errors import FxoptError, describe
from fxopt.export.bench import in_turn, median_speed
from fxopt.export.coverage import coverage as measure_coverage
from fxopt.export.files import file_bytes
from fxopt.export.ledger_model import OrtModel
from fxopt.export.ledger_report import Ledger, LedgerEntry, StageNumbers
from fxopt.export.session import Session
from fxopt.export.to_onnx import to_onnx
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.manager import tensor_bytes
from fxopt.metric import Metric, measured
from fxopt.numerics import measure
from fxopt.report import Report

__all__ = ["ledger"]

Outputs = Mapping[str, Any]


def ledger(
    model: CapturedModule | Report,
    metric: Metric | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    runs: int = 50,
    threads: int | None = None,
    latency: bool = True,
    coverage: bool = True,
    inputs: Any = None,
) -> Ledger:
    """Measure the captured graph and the graph after each step of a pipeline.

    The errors are those of the graphs in PyTorch, on the example inputs: the worst of all of them. A report may show
    larger ones, since passes are checked on other sizes, too. Score, latency and coverage are those of the files in
    ORT.

    Args:
        model: What ``fxopt.optimize(..., keep_graphs=True)`` returned, as it is now: it may have been trained since. Or
            its report. The graphs share the weights that no pass replaced, so that training in place counts for all.
        metric: Takes what is called as the model is, and returns how good it is, higher for better; here it is called
            with each file.
        sizes: Lengths of dynamic axes by name, as ``{"batch": 8}``, for latency and coverage; those of the first
            example if not given.
        runs: Runs of each file.
        threads: Threads within one operator; ORT's choice if not given.
        latency: Measure latencies.
        coverage: Count what runs in integer kernels.
        inputs: What to measure on instead of the example inputs of each graph: a tensor, a tuple, a mapping, or a
            :class:`fxopt.Sample`.

    Returns:
        One entry for the captured graph and one for each step. What cannot be measured of a graph is told with the
        reason, as that of a graph that cannot become a file; the other entries stand.

    Raises:
        FxoptError: there are no graphs, or no inputs.
        InputError: ``inputs`` do not fit the captured graph.
        TypeError: ``model`` is neither; or the metric returns no number.
        ValueError: ``runs`` is less than 1, ``sizes`` names a size that the graph does not have or comes along with
            ``inputs``; or the metric returns NaN.
        Exception: whatever the metric raises, with a note.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; wanted 1 or more")
    if inputs is not None and sizes is not None:
        raise ValueError("sizes are for the example inputs, and inputs are given: leave out one of them")
    report, graphs = _graphs(model)
    stages = _stages(report, graphs)
    first, *later = dict.fromkeys(stages)
    given = None if inputs is None else Sample.of(inputs)
    leaves = _first_leaves(first.gm, given, sizes)
    wanted = first.outputs(given)
    first.numbers |= {"max_abs": 0.0, "sqnr_db": float("inf")}
    for stage in later:
        stage.attempt("error", functools.partial(stage.compare, wanted, given))
    with tempfile.TemporaryDirectory() as folder:
        for index, stage in enumerate((first, *later)):
            stage.write(Path(folder) / f"{index}.onnx", threads, given, sizes)
            if coverage:
                stage.attempt("coverage", stage.count_kernels)
        if metric is not None:
            _score(metric, [first, *later])
        if latency:
            _time([first, *later], runs)
    entries = [LedgerEntry("captured", "captured", stages[0].frozen())]
    for step, stage in zip(report.steps, stages[1:], strict=True):
        record = (step.changes, step.skips, step.rolled_back, step.notes)
        entries.append(LedgerEntry(step.name, step.status, stage.frozen(), step.seconds, step.check_seconds, *record))
    shapes = (
        f"{spec.name}: {shape_text(leaf)}"
        for spec, leaf in zip(first.gm.inputs, leaves, strict=True)
        if isinstance(leaf, torch.Tensor)
    )
    notes = list(report.notes)
    if latency and first.session is None:
        notes.append("no speed: the captured graph does not run in ONNX Runtime")
    return Ledger(tuple(entries), tuple(shapes), runs if latency else 0, threads, tuple(notes))


def _graphs(model: CapturedModule | Report) -> tuple[Report, list[CapturedModule]]:
    """Return the record, and the graph before the first step and after each, the last one as it is now."""
    if not isinstance(model, CapturedModule | Report):
        raise TypeError(
            f"the ledger is of a graph that was optimized, or of its report, and got a {type(model).__name__}"
        )
    report = model.report if isinstance(model, CapturedModule) else model
    if report is None or not report.graphs:
        raise FxoptError(
            describe(
                "the report holds no graphs" if report is not None else "no pass was run on this graph",
                because="graphs are kept only if asked for, and not saved with a file",
                try_="fxopt.optimize(..., keep_graphs=True)",
            )
        )
    graphs = list(report.graphs)
    if report.steps and isinstance(model, CapturedModule) and fingerprint(model) != fingerprint(graphs[-1]):
        graphs[-1] = model  # trained, or switched to training, since
    return report, graphs


def _stages(report: Report, graphs: Sequence[CapturedModule]) -> list[_Stage]:
    """Return a stage for each graph: the same one for the same graph."""
    stages = [_Stage("the captured graph", graphs[0], Contract.EXACT, ())]
    for number, (step, gm) in enumerate(zip(report.steps, graphs[1:], strict=True), start=1):
        before = stages[-1]
        if gm is before.gm:
            stages.append(before)
            continue
        contract = before.contract.then(Contract.parse(step.contract))
        passes = (*before.passes, step.name) if step.changes else before.passes
        stages.append(_Stage(f"the graph after step {number}, {step.name}", gm, contract, passes))
    return stages


def _first_leaves(gm: CapturedModule, given: Sample | None, sizes: Mapping[str, int] | None) -> list[Any]:
    """Return the flat inputs of the captured graph, after a check that they can be had."""
    if given is None and not gm.samples:
        raise FxoptError(describe("the graph has no example inputs", try_="ledger(..., inputs=...)"))
    if unknown := sorted(set(sizes or ()) - set(gm.dims)):
        raise ValueError(f"sizes names {', '.join(unknown)}; the graph has {', '.join(gm.dims) or 'none'}")
    return _leaves(gm, given, sizes)


def _leaves(gm: CapturedModule, given: Sample | None, sizes: Mapping[str, int] | None) -> list[Any]:
    sample = given if given is not None else gm.resized(sizes) if sizes else gm.samples[0]
    return gm.flatten_inputs(*sample.args, **dict(sample.kwargs))


@dataclasses.dataclass(eq=False)
class _Stage:
    """One graph, and what is known of it so far."""

    what: str
    gm: CapturedModule
    contract: Contract
    passes: tuple[str, ...]
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    session: Session | None = None
    tensors: list[torch.Tensor] = dataclasses.field(default_factory=list)
    _frozen: StageNumbers | None = None

    def attempt(self, what: str, act: Callable[[], None]) -> None:
        """Do it, or keep the reason why it cannot be done: the other entries of the ledger stand."""
        try:
            act()
        except Exception as error:
            self.missing[what] = _told(error)

    def outputs(self, given: Sample | None) -> list[Outputs]:
        """Return the outputs of the graph in PyTorch by name, for each sample."""
        found: list[Outputs] = []
        for sample in self.gm.samples if given is None else (given,):
            copy = sample.clone()
            with isolated(self.gm):
                flat = self.gm.flat_outputs(*copy.args, **dict(copy.kwargs))
            kept = (value for value in flat if value is not None)
            found.append(dict(zip(self.gm.output_names, kept, strict=True)))
        return found

    def compare(self, wanted: Sequence[Outputs], given: Sample | None) -> None:
        """Measure the error against the outputs of the first graph: of the worst output on the worst sample."""
        errors = [
            measure(want[name], got[name])
            for want, got in zip(wanted, self.outputs(given), strict=True)
            for name in want.keys() & got.keys()
            if isinstance(want[name], torch.Tensor)
            and isinstance(got[name], torch.Tensor)
            and want[name].shape == got[name].shape
        ]
        if not errors:
            raise FxoptError("no output has the name and the shape of an output of the captured graph")
        worst = max(errors, key=lambda each: (each.max_abs, -each.sqnr_db))
        self.numbers |= {"max_abs": worst.max_abs, "sqnr_db": worst.sqnr_db}

    def write(self, path: Path, threads: int | None, given: Sample | None, sizes: Mapping[str, int] | None) -> None:
        """Export the graph, let ORT agree with it, and load the file."""
        self.attempt("file", lambda: self._export(path))
        if self.path is not None:
            self.attempt("run in ONNX Runtime", lambda: self._load(threads, _leaves(self.gm, given, sizes)))

    def _export(self, path: Path) -> None:
        contract = self.contract if self.contract.kind == "LOSSY" else Contract.ROUNDING
        # As if the pipeline had ended here, so that the bytes are those of the file that it would have written.
        told = {"fxopt.passes": ", ".join(self.passes), "fxopt.contract": str(self.contract)}
        to_onnx(self.gm, path, contract=contract, metadata=told)
        self.path = path
        self.numbers["file_bytes"] = file_bytes(path)

    def _load(self, threads: int | None, leaves: Sequence[Any]) -> None:
        session = Session(self.path, threads=threads)  # type: ignore[arg-type]  # written before
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        session.run(self.tensors)
        self.session = session

    def count_kernels(self) -> None:
        """Measure the share of multiply-accumulates in integer kernels."""
        if self.session is None or self.path is None:
            return  # the reason is known
        found = measure_coverage(self.path, self.tensors)
        if not found.macs:
            raise FxoptError("the graph has no multiply-accumulates")
        self.numbers["integer_share"] = found.integer_share

    def frozen(self) -> StageNumbers:
        """Return what was measured; one object, however often it is asked for."""
        if self._frozen is None:
            self._frozen = StageNumbers(
                nodes=len(self.gm.graph.nodes),
                parameter_bytes=tensor_bytes(self.gm),
                missing=dict(self.missing),
                **self.numbers,
            )
        return self._frozen


def _score(metric: Metric, stages: Sequence[_Stage]) -> None:
    """Ask the metric about each file. What is wrong with the metric itself is an error, not a gap in the ledger."""
    ready = [stage for stage in stages if stage.session is not None]
    for stage in ready:
        assert stage.session is not None
        model = OrtModel(stage.gm, stage.session)
        try:
            stage.numbers["score"] = measured(metric, stage.gm, stage.what, of="the ledger", model=model)
        except Exception as error:
            # The metric has done well before: this graph takes or returns something else, or refuses its inputs.
            is_new = _interface(stage.gm) != _interface(ready[0].gm) or isinstance(error, FxoptError)
            if stage is ready[0] or not is_new:
                raise
            stage.missing["score"] = _told(error)


def _interface(gm: CapturedModule) -> tuple[Any, ...]:
    return tuple((spec.name, spec.dtype) for spec in gm.inputs), gm.output_names


def _time(stages: Sequence[_Stage], runs: int) -> None:
    """Measure the latency of all files in turn, and their speed against that of the captured graph, if it has one."""
    ready = [(stage, stage.session) for stage in stages if stage.session is not None]
    feeds = [session.values(stage.tensors) for stage, session in ready]
    times = in_turn([session for _, session in ready], feeds, runs)
    for (stage, _), own in zip(ready, times, strict=True):
        stage.numbers["median_ms"] = statistics.median(own) * 1e3
        if ready[0][0] is stages[0]:
            stage.numbers["speed"] = median_speed(times[0], own)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, FxoptError) else f"{type(error).__name__}: {error}"
