"""Latency, throughput, memory and size of ONNX files in ORT, side by side, and where the time goes by source line."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import ExportError, describe
from fxopt.export.coverage_run import Inputs, drawn_inputs, kernel_times
from fxopt.export.files import file_bytes
from fxopt.export.session import Session
from fxopt.report import text_table

__all__ = ["BenchReport", "FileTimes", "LineTime", "bench", "in_turn", "median_speed"]

_WARM_UP = 5


@dataclasses.dataclass(frozen=True)
class FileTimes:
    """What was measured of one file.

    Attributes:
        file: Its path.
        median_ms: Median latency of a run, in milliseconds.
        p95_ms: The 95th percentile.
        per_second: Rows of the first input (its first axis) per second, by the median.
        speed: How many times as fast as the first file: median over the pairs of runs in turn; 1 for the first.
        load_ms: Time to load and optimize the model.
        peak_mib: Peak memory of a process that loads and runs it, above that of a process that does not, in MiB; None
            if it was not measured.
        file_mib: Size of the file, its external weights included, in MiB.
    """

    file: str
    median_ms: float
    p95_ms: float
    per_second: float
    speed: float
    load_ms: float
    peak_mib: float | None
    file_mib: float

    def row(self) -> tuple[str, ...]:
        """Return the cells of a table."""
        times = (f"{self.median_ms:.3f}", f"{self.p95_ms:.3f}", f"{self.per_second:.1f}", f"{self.speed:.2f}x")
        peak = "-" if self.peak_mib is None else f"{self.peak_mib:.1f}"
        return (self.file, *times, f"{self.load_ms:.0f}", peak, f"{self.file_mib:.2f}")


@dataclasses.dataclass(frozen=True)
class LineTime:
    """What one line of the user's code costs.

    Attributes:
        source: The line; empty for kernels that no line is known of.
        ms: Median over runs of the time of all its kernels, in milliseconds.
        share: Of the time of all kernels, 0 to 1.
        kernels: Names of ORT's kernels, with how many of each.
    """

    source: str
    ms: float
    share: float
    kernels: dict[str, int]


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """Files side by side, and the lines of each.

    Attributes:
        files: In the order in which they were given.
        lines: For each file its lines, the dearest first.
        runs: Number of runs of each.
        threads: Threads within one operator; None for ORT's own choice.
    """

    files: tuple[FileTimes, ...]
    lines: tuple[tuple[LineTime, ...], ...]
    runs: int
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = ("file", "median ms", "p95 ms", "rows/s", "speed", "load ms", "peak MiB", "file MiB")
        text = [f"{self.runs} runs in turn, threads: {self.threads or 'as ORT chooses'}"]
        text += text_table([header, *(each.row() for each in self.files)])
        for each, lines in zip(self.files, self.lines, strict=True):
            text.append(f"{each.file} by line:")
            text += [f"  {line.share:6.1%}  {line.ms:8.3f} ms  {line.source or '(no line)'}" for line in lines[:10]]
        return "\n".join(text)


def bench(
    files: Sequence[str | os.PathLike[str]],
    inputs: Inputs | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    runs: int = 100,
    threads: int | None = None,
    memory: bool = True,
) -> BenchReport:
    """Measure files that take the same inputs.

    The files run in turn, in an order that changes with each run, so that what else the machine does disturbs all of
    them alike; the ratio of two files is the median over these pairs.

    Args:
        files: Paths of one or more ONNX files.
        inputs: What to run on; drawn by ``sizes`` if not given, as :func:`fxopt.export.coverage` does.
        sizes: Lengths of dynamic axes by name; 1 for the others.
        runs: Runs of each file.
        threads: Threads within one operator; ORT's choice if not given.
        memory: Measure the peak memory of each file, in a process of its own.

    Raises:
        ExportError: ORT cannot load or run a file, or the files take other inputs.
        ValueError: there is no file, or ``runs`` is less than 1.
    """
    if not files:
        raise ValueError("there is no file to measure")
    if runs < 1:
        raise ValueError(f"runs is {runs}; wanted 1 or more")
    paths = [Path(file) for file in files]
    loads, sessions = [], []
    for path in paths:
        started = time.perf_counter()
        sessions.append(Session(path, threads=threads))
        loads.append((time.perf_counter() - started) * 1e3)
    given = _positional(sessions[0], drawn_inputs(sessions[0], sizes) if inputs is None else inputs)
    for path, session in zip(paths, sessions, strict=True):
        _check_inputs(path, session, sessions[0])
        session.run(given)  # what cannot run fails here, with its own message
    times = in_turn(sessions, [session.values(given) for session in sessions], runs)
    rows = given[0].shape[0] if given and given[0].ndim else 1
    found = []
    for path, each, load in zip(paths, times, loads, strict=True):
        median = statistics.median(each)
        found.append(
            FileTimes(
                file=str(path),
                median_ms=median * 1e3,
                p95_ms=sorted(each)[min(len(each) - 1, int(0.95 * len(each)))] * 1e3,
                per_second=rows / median,
                speed=median_speed(times[0], each),
                load_ms=load,
                peak_mib=_peak_mib(path, given, threads) if memory else None,
                file_mib=file_bytes(path) / 2**20,
            )
        )
    lines = tuple(_lines(path, given, min(runs, 20), threads) for path in paths)
    return BenchReport(tuple(found), lines, runs, threads)


def _positional(session: Session, inputs: Inputs) -> list[torch.Tensor]:
    if isinstance(inputs, Mapping):
        return [inputs[name] for name in session.input_names]
    return list(inputs)


def _check_inputs(path: Path, session: Session, first: Session) -> None:
    wanted, got = ([held.type for held in each.ort.get_inputs()] for each in (first, session))
    if wanted != got:
        raise ExportError(
            describe(f"{path} takes other inputs than the first file", got=", ".join(got), wanted=", ".join(wanted))
        )


def in_turn(sessions: Sequence[Session], feeds: Sequence[Mapping[str, Any]], runs: int) -> list[list[float]]:
    """Return the seconds of each run of each session: of ORT's own call, not of turning tensors into its values.

    Args:
        sessions: What to run, in an order that changes with each run.
        feeds: The values of each session's inputs by name, as :meth:`Session.values` returns them.
        runs: Runs of each, beside those that warm up.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for index in range(runs + _WARM_UP):
        for place in range(len(sessions)):
            which = (place + index) % len(sessions)
            session = sessions[which]
            started = time.perf_counter()
            session.ort.run_with_ort_values(list(session.output_names), feeds[which])
            times[which].append(time.perf_counter() - started)
    return [each[_WARM_UP:] for each in times]


def median_speed(first: Sequence[float], own: Sequence[float]) -> float:
    """Return how many times as fast as the first of two the second is: the median over pairs of runs in turn."""
    return statistics.median(a / b for a, b in zip(first, own, strict=True))


def _lines(path: Path, given: Sequence[torch.Tensor], runs: int, threads: int | None) -> tuple[LineTime, ...]:
    by_line: dict[str, list[float]] = {}
    kernels: dict[str, dict[str, int]] = {}
    for kernel, times in kernel_times(path, given, runs, threads):
        line = kernel.origin.source
        by_line[line] = [a + b for a, b in zip(by_line.get(line, [0.0] * runs), times, strict=True)]
        counts = kernels.setdefault(line, {})
        counts[kernel.node.op_type] = counts.get(kernel.node.op_type, 0) + 1
    medians = {line: statistics.median(times) for line, times in by_line.items()}
    whole = sum(medians.values()) or 1.0
    found = [LineTime(line, ms * 1e3, ms / whole, kernels[line]) for line, ms in medians.items()]
    return tuple(sorted(found, key=lambda each: -each.ms))


def _peak_mib(path: Path, given: Sequence[torch.Tensor], threads: int | None) -> float:
    """Return by how much loading and running a file raises the peak memory of a process."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(list(given), inputs)
        command = [sys.executable, "-m", "fxopt.export.bench_memory", str(path), str(inputs), str(threads or 0)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(describe(f"the memory of {path} cannot be measured", because=done.stderr.strip()[-400:]))
    return int(done.stdout) / 2**20
