"""Layers among floats, in integers and left as they are: from how many products on integers are faster in ORT.

    python -m tests.bench float_layers [--quick]

The first rows are nets of a first convolution, a function without an integer kernel, and a second convolution, which is
in integers in both files; the last rows a layer norm and a linear layer. ``fewest_products`` and ``fewest_macs`` of
``fxopt.passes.quantize.target.ORT_CPU`` are read off here. Both files run in turn in one process, one thread; times are
medians, the ratio is the median over neighbours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.passes import Quantize
from tests.bench.in_turn import in_turn
from tests.bench.zoo_table import write_row

RUNS = 200
CONVOLUTIONS = (  # kernel, input channels, output channels, stride, size of the image
    (3, 1, 32, 1, 28), (5, 1, 32, 1, 28), (3, 3, 16, 2, 224), (3, 3, 32, 1, 48), (3, 3, 64, 1, 64), (4, 3, 96, 4, 224),
    (3, 8, 32, 1, 56), (5, 3, 32, 1, 64), (7, 3, 64, 2, 224), (16, 3, 192, 16, 224),
)  # fmt: skip
LINEAR = ((256, 4), (256, 64), (256, 256), (1024, 256))


def _first_convolution(kernel: int, channels: int, out: int, stride: int) -> nn.Module:
    padding = kernel // 2 if stride < 3 else 0
    first = nn.Conv2d(channels, out, kernel, stride, padding)
    return nn.Sequential(first, nn.Hardswish(), nn.Conv2d(out, 32, 1)).eval()


def compare(net: nn.Module, x: Tensor, layer: str, folder: Path, runs: int) -> tuple[float, float, float]:
    """Return the median microseconds with ``layer`` in integers and in floats, and the median of their ratio."""
    sessions = []
    gm = fxopt.capture(net, (x,))
    for name, skip in (("integers", ()), ("floats", (layer,))):
        quantize = Quantize(recipe="fast", skip=skip, min_sqnr_db=-100.0)
        small = fxopt.optimize(gm, [quantize], calibration=[(x,)], check="off")
        path = folder / f"{name}.onnx"
        to_onnx(small, path, validate=False)
        sessions.append(Session(path, threads=1))
    return in_turn(sessions, x, runs)


def main(console: Console | None = None, *, quick: bool = False, **unused: object) -> None:
    """Print the table."""
    console = console or Console()
    write_row(console, ("layer", "products", "integers", "floats", "integers / floats"))
    write_row(console, ("---",) * 5)
    torch.manual_seed(0)
    runs = 20 if quick else RUNS
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        for kernel, channels, out, stride, size in CONVOLUTIONS:
            net, x = _first_convolution(kernel, channels, out, stride), torch.randn(1, channels, size, size)
            found = compare(net, x, "conv2d", folder, runs)
            name = f"conv {kernel} x {kernel}, {channels} to {out}, stride {stride}, {size} px"
            _row(console, name, f"{kernel**2 * channels} each", found)
        for wide, out in LINEAR:
            norm = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, out)).eval()
            found = compare(norm, torch.randn(1, wide), "linear", folder, runs)
            _row(console, f"linear {wide} to {out}", f"{wide * out:,} in all", found)


def _row(console: Console, name: str, products: str, found: tuple[float, float, float]) -> None:
    integers, floats, ratio = found
    write_row(console, (name, products, f"{integers:.0f} us", f"{floats:.0f} us", f"{ratio:.2f}"))
