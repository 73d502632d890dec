"""Trained nets in ORT on this CPU, quantized with 16-bit sums that can overflow and without; ORT's own tool beside.

    python -m tests.bench saturation_in_ort [--quick]

A cell: score, SQNR of the main output on held-out inputs against the f32 file, channels whose sums can overflow. On a
CPU with VNNI the files compute what they say, and the cells with and without differ by what larger scales cost. On
one without it, those that can overflow are wrong: the line before the table says which this is.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fxopt.export import Session, coverage
from tests.bench.quantization_cell import run, sqnr_db
from tests.bench.quantization_peers import TOOLS, with_fxopt
from tests.bench.quantization_subjects import Subject, rows, subject
from tests.passes.quantize.avx2 import oracle_missing

MODELS = "mnist_cnn", "crepe_tiny", "mtcnn_onet", "minilm_l6", "mobilenetv2"
WAYS: dict[str, Callable[..., None]] = {
    "fxopt": with_fxopt,
    "fxopt, no_saturation=False": functools.partial(with_fxopt, no_saturation=False),
    "ORT quantize_static, uint8": TOOLS["ort_static_u8"].quantize,
    "the same, reduce_range": TOOLS["ort_static_7bit"].quantize,
}


def cell(net: Subject, way: Callable[..., None], folder: Path) -> str:
    """Quantize one net in one way and run the file; ``folder`` holds the f32 file."""
    path = folder / "integers.onnx"
    way(net.model, net.batches, net.example, net.dynamic_shapes, path)
    mine, plain = Session(path), Session(folder / "fp32.onnx")
    channels = sum(kernel.overflowing for kernel in coverage(path, rows(net.held_out, 0, 1)).layers)
    assert net.score is not None
    score = net.score(functools.partial(run, mine))
    return f"{score:.3f} · {sqnr_db(mine, plain, net):.1f} dB · {channels:,}"


def main(console: Console, *, quick: bool = False) -> None:
    """Print what this CPU does, and a line for each net."""
    missing = oracle_missing()
    console.print(f"no saturation here: {missing}" if missing else "16-bit sums saturate here", highlight=False)
    console.print(f"| model | {' | '.join(WAYS)} |\n| --- {'| --- ' * len(WAYS)}|", highlight=False, soft_wrap=True)
    for name in MODELS[: 2 if quick else None]:
        net = subject(name)
        with tempfile.TemporaryDirectory() as folder:
            TOOLS["fp32"].quantize(net.model, net.batches, net.example, net.dynamic_shapes, Path(folder) / "fp32.onnx")
            cells = [cell(net, way, Path(folder)) for way in WAYS.values()]
        console.print(f"| {name} | {' | '.join(cells)} |", highlight=False, soft_wrap=True)
