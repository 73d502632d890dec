"""fxopt against ``torch.onnx.export(dynamo=True)``: seconds to export, and latency of both files in ONNX Runtime.

Both get the same model in eval mode, the same inputs and the same free sizes, in one process and in turn. "Capture" is
``fxopt.capture``, which traces both modes, and ``torch.export.export``; "passes" are fxopt's default ones, and the part
of that time that goes into checking them; "export" is from there to the file on disk. Neither validates the file.
All has one thread. Latency is that of one sample: the two files run in turn, and the ratio is the median of the ratios
of neighbours, so that other work on the machine weighs on both.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from rich.console import Console
from torch.utils import _pytree as pytree

import fxopt
from fxopt.export import Session, to_onnx
from tests.bench.zoo_table import one_thread, write_row
from tests.zoo import architectures, journeys
from tests.zoo.architectures import Built

NAMES = (
    "swin_t",
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "vit_b_16",
    "convnext_tiny",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "bert",
)
QUICK = ("resnet18", "mobilenet_v3_small")
RUNS, LATENCY_SECONDS = 100, 15.0  # of each file: as many runs as asked for, or as fit into the time
HEADER = (
    "model", "capture s", "torch.export s", "passes (checks) s", "export s", "torch.onnx s", "export / torch.onnx",
    "all / all", "ms", "torch.onnx ms", "ms / ms", "nodes", "torch.onnx nodes", "outputs differ by",
)  # fmt: skip


@dataclasses.dataclass
class Side:
    """What one exporter took, in seconds, and made."""

    path: Path
    capture: float
    export: float
    passes: float = 0.0
    checks: float = 0.0
    nodes: int = 0

    def __post_init__(self) -> None:
        self.nodes = journeys.node_count(ir.load(self.path))

    @property
    def all(self) -> float:
        """Seconds from the model to the file."""
        return self.capture + self.passes + self.export


def ours(built: Built, path: Path) -> Side:
    """Capture, optimize and export with fxopt."""
    moments = [time.perf_counter()]
    sample = fxopt.Sample(built.args, built.kwargs)
    gm = fxopt.capture(built.model, sample, dynamic_shapes=built.dynamic_shapes)
    moments.append(time.perf_counter())
    gm = fxopt.optimize(gm)
    moments.append(time.perf_counter())
    to_onnx(gm, path, validate=False)
    moments.append(time.perf_counter())
    capture, passes, export = (end - start for start, end in itertools.pairwise(moments))
    return Side(path, capture, export, passes, gm.report.check_seconds if gm.report else 0.0)


def theirs(built: Built, path: Path) -> Side:
    """Capture and export with torch."""
    started = time.perf_counter()
    shapes = {name: _dims(axes) for name, axes in built.dynamic_shapes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(built.model, built.args, built.kwargs, dynamic_shapes=shapes)
        captured = time.perf_counter()
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    return Side(path, captured - started, time.perf_counter() - captured)


def _dims(axes: dict[int, str]) -> dict[int, Any]:
    """Translate {1: "length<=512"} for torch.export."""
    dims = {}
    for axis, text in axes.items():
        name, _, greatest = text.partition("<=")
        dims[axis] = torch.export.Dim(name, max=int(greatest) if greatest else None)
    return dims


def latency(files: Sequence[Path], inputs: Sequence[torch.Tensor]) -> tuple[list[float], float, float]:
    """Run two ONNX files in turn.

    Returns:
        The median milliseconds of each, the median ratio of the first to the second, and the greatest difference of
        their first outputs, as a part of the greatest value.
    """
    sessions = [Session(path, threads=1) for path in files]
    first, second = (session.run(inputs)[0] for session in sessions)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + LATENCY_SECONDS
    while len(times[0]) < RUNS and (len(times[0]) < 5 or time.perf_counter() < end):
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for index in order:
            started = time.perf_counter()
            sessions[index].run(inputs)
            times[index].append((time.perf_counter() - started) * 1e3)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    difference = float((first - second).abs().max() / second.abs().max())
    return [statistics.median(side) for side in times], ratio, difference


def row(name: str, folder: Path) -> tuple[str, ...]:
    """Export one model both ways, time both files, and return the row."""
    torch.manual_seed(0)
    built = architectures.build(name, real=True)
    mine, error = _attempt(ours, built, folder / "fxopt.onnx")
    if mine is None:
        return (name, *("-",) * (len(HEADER) - 2), f"fxopt fails: {error}")
    passes = f"{mine.passes:.1f} ({mine.checks:.1f})"
    peer, error = _attempt(theirs, built, folder / "torch.onnx")
    if peer is None:
        cells = (f"{mine.capture:.1f}", "-", passes, f"{mine.export:.2f}", *("-",) * 6, f"{mine.nodes:,}", "-")
        return (name, *cells, f"torch fails: {error}")
    inputs = [leaf[:1] for leaf in pytree.tree_leaves((built.args, built.kwargs)) if isinstance(leaf, torch.Tensor)]
    (ms, peer_ms), ratio, difference = latency((mine.path, peer.path), inputs)
    return (
        name,
        f"{mine.capture:.1f}",
        f"{peer.capture:.1f}",
        passes,
        f"{mine.export:.2f}",
        f"{peer.export:.1f}",
        f"{mine.export / peer.export:.3f}",
        f"{mine.all / peer.all:.2f}",
        f"{ms:.1f}",
        f"{peer_ms:.1f}",
        f"{ratio:.2f}",
        f"{mine.nodes:,}",
        f"{peer.nodes:,}",
        f"{difference:.1e}",
    )


def _attempt(make: Callable[[Built, Path], Side], built: Built, path: Path) -> tuple[Side | None, str]:
    gc.collect()
    try:
        return make(built, path), ""
    except Exception as error:  # a table with a hole is worth more than none
        traceback.print_exc()
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def main(console: Console | None = None, *, quick: bool = False, names: Sequence[str] = ()) -> None:
    """Print the table row by row, as Markdown.

    Args:
        console: Where to print.
        quick: Two small models only.
        names: Models of ``tests/zoo/architectures.py``, in the sizes that people deploy; the ten of ``NAMES`` if none.
    """
    console = console or Console()
    with tempfile.TemporaryDirectory() as place, one_thread():
        folder = Path(place)
        warm = journeys.build("vit_small")  # the first export of each side loads its tables of operators
        ours(warm, folder / "warm_fxopt.onnx")
        theirs(warm, folder / "warm_torch.onnx")
        write_row(console, HEADER)
        write_row(console, ("---", *("---:",) * (len(HEADER) - 1)))
        for name in names or (QUICK if quick else NAMES):
            write_row(console, row(name, folder))


if __name__ == "__main__":
    import sys

    main(names=sys.argv[1:])
