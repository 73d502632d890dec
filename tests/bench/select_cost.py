"""What a small branch costs in ORT, against computing both sides: the cost model of branches-to-select."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.passes import BranchesToSelect

SIZES = (16, 256, 1024, 4096, 16_384, 65_536)
OPERATORS = 6  # of both sides together


def branch(x: torch.Tensor) -> torch.Tensor:
    """Run three element-wise operators on either side."""
    return (x * 2 + 1).relu() if x[0] > 0 else (x * 3 - 1).abs()


def row(size: int, folder: Path, runs: int) -> str:
    """Return the medians of both forms at one size, run in turn on one thread."""
    x = torch.rand(size)
    graph = fxopt.capture(branch, (x,)).eval()
    forms = (graph, BranchesToSelect(max_elements=2 * OPERATORS * size)(graph).gm)
    sessions = []
    for number, form in enumerate(forms):
        to_onnx(form, folder / f"{size}_{number}.onnx", validate=False)
        sessions.append(Session(folder / f"{size}_{number}.onnx", threads=1))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for session, taken in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.ort.run(None, {session.input_names[0]: x.numpy()})
            taken.append((time.perf_counter() - started) * 1e6)
    first, second = (statistics.median(taken) for taken in times)
    return f"| {size * OPERATORS:,} | {first:.1f} | {second:.1f} | {second / first:.2f} |"


def main(console: Console, *, quick: bool = False) -> None:
    """Print the table."""
    console.print(
        "| computed elements | If µs | where µs | where / If |\n| ---: | ---: | ---: | ---: |", highlight=False
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            console.print(row(size, Path(folder), 50 if quick else 400), highlight=False)
