"""int8 quantization beside the peers: score, error, latency, integer kernels, time and memory of each tool and net.

    python -m tests.bench quantization [--models mnist_cnn,minilm_l6] [--tools fp32,ort_static,fxopt]
        [--random] [--threads 1]

The peers need packages of their own: ``pip install 'fxopt[bench]'``; a column whose package is missing says so. Rows
are trained nets on real data (``quantization_subjects.py``), with ``--random`` known architectures with random weights
at 224 px, which tell latency and coverage only. Columns are tools (``quantization_peers.py``). A cell:

    score · SQNR of the main output against f32 on inputs not calibrated on · times as fast as the f32 file in ORT ·
    matmul-like kernels (conv, matmul, gemm) in integers / all, after ORT's optimizer · size of the file · seconds from
    the net in memory to the file, capture and calibration included · peak memory of the process until then, the
    libraries' own included (in brackets what came after the net and the data were loaded)

The cell of f32 has milliseconds in place of SQNR and ratio. A tool that fails with a free batch is tried with a fixed
batch of one row; such a cell says "fixed batch". Each cell is a process of its own, one at a time. Both files run in
turn there, one sample at a time, with ORT's own number of threads; ratios are medians over neighbours. On a busy
machine threads wait for each other and ratios mean little: take ``--threads 1``. On x86 without VNNI ORT adds pairs of
products in int16, which saturates: scores depend on the processor, also with the same file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.quantization_peers import TOOLS
from tests.bench.quantization_subjects import RANDOM_NAMES, TRAINED
from tests.bench.zoo_table import write_row

QUICK = ("mnist_cnn",)
TRANSFORMERS = ("minilm_l6", "vit_b_16", "bert")
LONGEST = 1200.0  # seconds a cell may take


def cell(model: str, tool: str, folder: Path, threads: int, *options: str) -> dict[str, Any]:
    """Measure one cell in a process of its own; return its fields, or "error" and "reason"."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.quantization_cell",
        model,
        tool,
        os.fspath(folder),
        str(threads),
        *options,
    ]
    written = folder / f"{tool}.json"
    written.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "TimeoutExpired", "reason": f"not done in {LONGEST:.0f} s"}
    if not written.exists():  # killed, or it could not even start
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"exit status {done.returncode}", "reason": last[0][:240]}
    found: dict[str, Any] = json.loads(written.read_text())
    return found


def text(tool: str, found: dict[str, Any]) -> str:
    """Return a cell as it stands in the table."""
    parts = [] if found["score"] is None else [f"{found['score']:.3f}"]
    if tool == "fp32":
        parts.append(f"{found['ms']:.2f} ms")
    else:
        parts += [] if found["sqnr_db"] is None else [f"{found['sqnr_db']:.1f} dB"]
        parts.append(f"{found['speed']:.2f}×")
    parts += [f"{found['integer']}/{found['kernels']}", f"{found['mib']:.1f} MiB", f"{found['seconds']:.1f} s"]
    parts.append(f"{found['peak_mib']:,.0f} (+{found['rise_mib']:,.0f}) MiB")
    return " · ".join(parts)


def row(model: str, tools: Sequence[str], folder: Path, failures: list[str], threads: int = 0) -> list[str]:
    """Measure one net with all tools; return the cells, and add to ``failures`` what failed and why."""
    cells, plain = [], cell(model, "fp32", folder, threads)
    for tool in tools:
        chosen = TOOLS[tool]
        if any(importlib.util.find_spec(package) is None for package in chosen.needs):
            cells.append("not installed")
            continue
        if chosen.transformers_only and model not in TRANSFORMERS:
            cells.append("")
            continue
        found, free = plain if tool == "fp32" or "error" in plain else cell(model, tool, folder, threads), ""
        if "error" in found:
            failures.append(f"{model}, {chosen.title}: {found['error']}: {found['reason']}")
            if found is not plain and "error" not in (again := cell(model, tool, folder, threads, "fixed")):
                found, free = again, " · fixed batch"
        cells.append(f"fails: {found['error']}" if "error" in found else text(tool, found) + free)
    return cells


def main(
    console: Console | None = None,
    *,
    quick: bool = False,
    models: Sequence[str] = (),
    tools: Sequence[str] = (),
    random: bool = False,
    threads: int = 0,
) -> None:
    """Print the table row by row, as Markdown, and below it what failed and why.

    Args:
        console: Where to print.
        quick: The smallest net only.
        models: Names of ``TRAINED`` or ``RANDOM_NAMES``; all of the former if none.
        tools: Names of ``TOOLS``; all if none.
        random: Take the nets with random weights if no model is named.
        threads: Of each ORT session for latency; ORT's own choice if 0.

    Raises:
        ValueError: a model or a tool is not known.
    """
    console = console or Console()
    names = models or (RANDOM_NAMES if random else QUICK if quick else tuple(TRAINED))
    columns = tools or tuple(TOOLS)
    for given, known in ((names, (*TRAINED, *RANDOM_NAMES)), (columns, tuple(TOOLS))):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"unknown: {', '.join(unknown)}; there is {', '.join(known)}")
    failures: list[str] = []
    write_row(console, ("model", *(TOOLS[tool].title for tool in columns)))
    write_row(console, ("---",) * (len(columns) + 1))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_row(console, (name, *row(name, columns, Path(folder), failures, threads)))
    for line in failures:
        console.print(f"- {line}", soft_wrap=True, markup=False, highlight=False)
