"""Operators that are written as several, because the one kernel of ONNX Runtime's CPU provider is slower than these.

    python -m tests.bench ort_forms [--quick]

A row is one call exported twice: as the operator that ONNX has for it (``to_onnx(runtime="onnx")``), and as fxopt
writes it for ONNX Runtime. Both run in turn in one process, one thread; times are medians, the ratio is the median over
neighbours. Inputs are normal, so that half of what PRelu reads is negative, as behind a convolution.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.export.dtypes import Runtime
from tests.bench.in_turn import in_turn
from tests.bench.zoo_table import write_row

RUNS = 300


def _prelu(slopes: Tensor) -> nn.Module:
    layer = nn.PReLU(len(slopes))
    layer.weight.data = slopes
    return layer


ROWS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "prelu, slopes up to 1": (_prelu(torch.linspace(-0.5, 0.9, 32)), (1, 32, 46, 46)),
    "prelu, any slopes": (_prelu(torch.linspace(0.0, 1.5, 32)), (1, 32, 46, 46)),
    "prelu, few numbers": (_prelu(torch.linspace(-0.5, 0.9, 256)), (1, 256)),
    "mish": (F.mish, (1, 32, 46, 46)),
    "softmax of 21 classes": (lambda x: F.softmax(x, 1), (1, 21, 64, 64)),
    "softmax of 2 classes": (lambda x: F.softmax(x, 1), (1, 2, 64, 64)),
    "log_softmax of 21 classes": (lambda x: F.log_softmax(x, 1), (1, 21, 64, 64)),
}


def microseconds(function: Callable[..., Any], x: Tensor, folder: Path, runs: int) -> tuple[float, float, float]:
    """Return the median microseconds as one operator and as fxopt writes it, and the median of their ratio."""
    gm = fxopt.capture(function, (x,))
    runtimes: tuple[Runtime, Runtime] = ("onnx", "ort-cpu")
    sessions = []
    for runtime in runtimes:
        path = folder / f"{runtime}.onnx"
        to_onnx(gm, path, runtime=runtime, validate=runtime == "ort-cpu")
        sessions.append(Session(path, threads=1))
    return in_turn(sessions, x, runs)


def main(console: Console | None = None, *, quick: bool = False, **unused: Any) -> None:
    """Print the table."""
    console = console or Console()
    write_row(console, ("call", "one operator", "as fxopt writes it", "times as fast"))
    write_row(console, ("---",) * 4)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, (function, shape) in ROWS.items():
            one, ours, ratio = microseconds(function, torch.randn(shape), Path(folder), 20 if quick else RUNS)
            write_row(console, (name, f"{one:.0f} us", f"{ours:.0f} us", f"{ratio:.2f}"))
