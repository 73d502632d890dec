"""Convolutions of integers whose result stays a float, beside those that round it to 8 bits and those of floats.

    python -m tests.bench float_results [--quick]

A row is one convolution from a float image to a float result: quantized with its result (QLinearConv between
quantizers), quantized without it (a product of the windows), and not quantized. Files run in turn in one process, one
thread; times are medians, ratios the medians over neighbours. The noise is that of the result against floats, on normal
inputs, with weights of which the last channel is ten times as large as the first. ``fewest_channels`` of
``fxopt.passes.quantize.target.ORT_CPU`` is read off here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt import numerics
from fxopt.export import Session, to_onnx
from fxopt.passes import Quantize
from tests.bench.in_turn import in_turn
from tests.bench.zoo_table import write_row

RUNS = 200
CONVOLUTIONS = (  # kernel, input channels, output channels, stride, size of the image
    (3, 32, 64, 1, 23), (3, 64, 64, 1, 10), (2, 64, 128, 1, 4), (3, 32, 64, 1, 56), (3, 256, 256, 1, 14),
    (3, 64, 128, 2, 28), (1, 256, 64, 1, 56), (1, 64, 256, 1, 28), (5, 48, 64, 1, 27), (3, 16, 32, 1, 56),
    (3, 8, 32, 1, 56), (3, 3, 32, 1, 56), (7, 3, 64, 2, 112), (16, 3, 192, 16, 224),
)  # fmt: skip


def _layer(kernel: int, channels: int, out: int, stride: int) -> nn.Module:
    layer = nn.Conv2d(channels, out, kernel, stride).eval()
    with torch.no_grad():
        layer.weight *= torch.logspace(0, 1, out)[:, None, None, None]
    return layer


def files_of(layer: nn.Module, x: Tensor, folder: Path) -> tuple[list[Session], list[float]]:
    """Return sessions of the result rounded, of the result as a float and of floats, and the noise of the first two."""
    gm = fxopt.capture(layer, (x,), modes="current")
    plan = Quantize(recipe="fast").make_plan(gm, [(x,)])
    plans = (plan, plan.without("conv2d"))
    quantizers = [Quantize(plan=held, min_sqnr_db=-100.0) for held in plans]
    graphs = [fxopt.optimize(gm, [quantizer], calibration=[(x,)], check="off") for quantizer in quantizers]
    with torch.no_grad():
        noise = [numerics.measure(layer(x), small(x)).sqnr_db for small in graphs]
    sessions = []
    for index, graph in enumerate((*graphs, gm)):
        path = folder / f"{index}.onnx"
        to_onnx(graph, path, validate=False)
        sessions.append(Session(path, threads=1))
    return sessions, noise


def main(console: Console | None = None, *, quick: bool = False, **unused: object) -> None:
    """Print the table."""
    console = console or Console()
    heads = ("layer", "rounded", "float result", "floats", "float result / rounded", "floats / float result")
    write_row(console, (*heads, "noise, rounded", "noise, float result"))
    write_row(console, ("---",) * 8)
    torch.manual_seed(0)
    runs = 20 if quick else RUNS
    with tempfile.TemporaryDirectory() as held:
        for kernel, channels, out, stride, size in CONVOLUTIONS:
            x = torch.randn(1, channels, size, size)
            (rounded, result, floats), noise = files_of(_layer(kernel, channels, out, stride), x, Path(held))
            microseconds, _, more = in_turn((rounded, result), x, runs)
            ours, theirs, less = in_turn((result, floats), x, runs)
            name = f"{kernel} x {kernel}, {channels} to {out}, stride {stride}, {size} px"
            times = (f"{time:.0f} us" for time in (microseconds, ours, theirs))
            write_row(console, (name, *times, f"{1 / more:.2f}", f"{1 / less:.2f}", *(f"{db:.1f} dB" for db in noise)))
