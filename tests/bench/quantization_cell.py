"""One net quantized by one tool, measured in a process of its own: ``tests/bench/quantization.py`` starts it.

    python -m tests.bench.quantization_cell MODEL TOOL FOLDER THREADS [fixed]

writes ``FOLDER/TOOL.onnx`` and ``FOLDER/TOOL.json``; ``FOLDER/fp32.onnx`` must be there for all tools but "fp32".
THREADS are those of an ORT session whose latency is measured, 0 for ORT's own choice. With "fixed" the tool sees no
free size, and a batch of one row.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt import numerics
from fxopt.export import Session, coverage
from fxopt.export.bench_memory import fresh_peak_bytes, peak_bytes
from tests.bench.quantization_peers import TOOLS
from tests.bench.quantization_subjects import Subject, rows, single_rows, subject

HEAVY = ("conv", "linear", "matmul", "attention", "recurrent")  # the layers that multiply matrices
LEAST_RUNS, MOST_RUNS, SECONDS = 20, 500, 6.0  # of each session, for latency
BATCH = 16  # rows at once, for SQNR


@dataclasses.dataclass
class Cell:
    """What one tool made of one net.

    Attributes:
        seconds: From the net in memory to the file: capture, calibration, and export.
        peak_mib: The most memory that the process had until then, in MiB.
        rise_mib: How much of it came after the net and the data were loaded.
        score: Of ORT on the file; None for random weights.
        sqnr_db: Of the main output against the f32 file; None for random weights.
        ms: Median latency of one sample, in milliseconds.
        speed: How many times as fast as the f32 file; the median over runs in turn.
        integer: Matmul-like kernels in integers, after ORT's optimizer.
        kernels: All matmul-like kernels.
        mib: Size of the file.
    """

    seconds: float
    peak_mib: float
    rise_mib: float
    score: float | None
    sqnr_db: float | None
    ms: float
    speed: float
    integer: int
    kernels: int
    mib: float


class StepError(Exception):
    """A step failed; the cause says how."""


def measure(model: str, tool: str, folder: Path, *, threads: int = 0, fixed: bool = False) -> Cell:
    """Quantize and measure."""
    chosen, path = TOOLS[tool], folder / f"{tool}.onnx"
    for package in chosen.needs:
        __import__(package)  # not a part of the seconds
    net = subject(model).fixed() if fixed else subject(model)
    gc.collect()
    before = fresh_peak_bytes() / 2**20
    started = time.perf_counter()
    chosen.quantize(net.model, net.batches, net.example, net.dynamic_shapes, path)
    seconds = time.perf_counter() - started
    peak = peak_bytes() / 2**20
    try:
        files = (path, folder / "fp32.onnx")
        ms, speed = latency(files, net, threads)
        mine, plain = (Session(file) for file in files)
        integer, kernels = integer_kernels(path, net)
        score = sqnr = None
        if net.score is not None:
            score, sqnr = net.score(functools.partial(run, mine)), sqnr_db(mine, plain, net)
    except Exception as error:
        raise StepError("ORT on the result") from error
    size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*")) / 2**20
    return Cell(seconds, peak, peak - before, score, sqnr, ms, speed, integer, kernels, size)


def run(session: Session, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the outputs for any number of rows, also of a file that takes one row at a time."""
    if session.ort.get_inputs()[0].shape[0] != 1:
        return session.run(inputs)
    outputs = [session.run(row) for row in single_rows(inputs)]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def integer_kernels(path: Path, net: Subject) -> tuple[int, int]:
    """Return how many matmul-like kernels are left in integers after ORT's optimizer, and how many there are."""
    counts = coverage(path, rows(net.held_out, 0, 1)).kernels
    integer, every = zip(*(counts.get(layer, (0, 0)) for layer in HEAVY), strict=True)
    return sum(integer), sum(every)


def latency(files: Sequence[Path], net: Subject, threads: int) -> tuple[float, float]:
    """Run two files in turn on one sample; return the median milliseconds of the first, and of second over first."""
    import onnxruntime

    inputs = [tensor.numpy() for tensor in rows(net.held_out, 0, 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    # By default the threads of a session wait busily for its next run, on the cores that the other session needs now.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = []
    for file in files:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        sessions.append((session, {held.name: x for held, x in zip(session.get_inputs(), inputs, strict=True)}))
    times: tuple[list[float], list[float]] = ([], [])
    for session, feeds in sessions * 3:
        session.run(None, feeds)
    end = time.perf_counter() + SECONDS
    while len(times[0]) < MOST_RUNS and (len(times[0]) < LEAST_RUNS or time.perf_counter() < end):
        for index in (0, 1) if len(times[0]) % 2 else (1, 0):
            session, feeds = sessions[index]
            started = time.perf_counter()
            session.run(None, feeds)
            times[index].append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[0]), statistics.median(b / a for a, b in zip(*times, strict=True))


def sqnr_db(mine: Session, plain: Session, net: Subject) -> float:
    """Return the signal to noise of the main output on the held-out inputs, against the f32 file."""
    pairs = []
    for start in range(0, len(net.held_out[0]), BATCH):
        inputs = rows(net.held_out, start, start + BATCH)
        pairs.append([net.main(run(session, *inputs), inputs) for session in (plain, mine)])
    want, got = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return numerics.measure(want, got).sqnr_db


def reason(error: BaseException) -> tuple[str, str]:
    """Return an error's type, and its first line with that of the error at the bottom of its causes."""
    said = ""
    if isinstance(error, StepError):
        said, error = f"{error}: ", error.__cause__ or error
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    texts = (
        [_first_line(error)] if root is error else [_first_line(error), f"{type(root).__name__}: {_first_line(root)}"]
    )
    return type(error).__name__, said + " ← ".join(texts)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:240].replace("|", "/") if lines else "no message"


def main(model: str, tool: str, folder: str, threads: str, *fixed: str) -> None:
    """Measure one cell, and write it or its error as JSON."""
    os.environ["NNCF_CI"] = "1"  # its statistics of use stay at home
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found: dict[str, Any]
    try:
        found = dataclasses.asdict(measure(model, tool, Path(folder), threads=int(threads), fixed=bool(fixed)))
    except Exception as error:
        traceback.print_exc()
        kind, text = reason(error)
        found = {"error": kind, "reason": text}
    (Path(folder) / f"{tool}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
