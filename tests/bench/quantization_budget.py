"""int8 under an accuracy budget: how many layers stay float where the score may fall by 0.003, and what the file does.

    python -m tests.bench quantization_budget [--quick]

Nets, data and columns are those of ``quantization.py``: the score is that of ONNX Runtime on the file and the metric
of the search is that score, so it says what a budget keeps, not what the score of other data will be. Layers are
weighed by their measured times (``fxopt.export.layer_costs``), and speed is the median over runs in turn with the
float file, one thread. Seconds are those of the search, which calls the score several times.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fxopt
from fxopt.export import Session, layer_costs, to_onnx
from fxopt.passes import DEFAULT, Quantize
from tests.bench.quantization_cell import integer_kernels, latency, run, sqnr_db
from tests.bench.quantization_subjects import TRAINED, Subject, rows, subject
from tests.bench.zoo_table import write_row

QUICK = ("mnist_cnn",)
MAX_DROP = 0.003


def row(net: Subject, folder: Path) -> tuple[str, ...]:
    """Return the cells of one net."""
    given: dict[str, Any] = {
        "example_inputs": net.example,
        "dynamic_shapes": net.dynamic_shapes,
        "calibration": net.batches,
        "check": "off",
        "strict": True,
    }
    assert net.score is not None  # nets of TRAINED have one
    score = net.score

    def metric(model: Any) -> float:
        return score(lambda *batch: _all_of(model(*batch)))

    gm = fxopt.optimize(net.model, DEFAULT, **given)
    float_file = to_onnx(gm, folder / "fp32.onnx", validate=False)
    integer_file = to_onnx(
        fxopt.optimize(net.model, [*DEFAULT, Quantize(recipe="fast", min_sqnr_db=-100.0)], **given), validate=False
    )
    costs = layer_costs({"float": float_file, 8: integer_file}, rows(net.held_out, 0, 1))
    started = time.perf_counter()
    small = fxopt.optimize(net.model, [*DEFAULT, Quantize(metric=metric, max_drop=MAX_DROP, costs=costs)], **given)
    seconds = time.perf_counter() - started
    path = folder / "small.onnx"
    to_onnx(small, path, validate=False)
    session, plain = Session(path), Session(folder / "fp32.onnx")
    _, speed = latency((path, folder / "fp32.onnx"), net, 1)
    integer, kernels = integer_kernels(path, net)
    wanted, found = (score(functools.partial(run, each)) for each in (plain, session))
    error = f"{sqnr_db(session, plain, net):.1f} dB"
    return net.name, f"{wanted:.3f}", f"{found:.3f}", error, f"{speed:.2f}×", f"{integer}/{kernels}", f"{seconds:.0f} s"


def _all_of(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


def main(console: Console | None = None, *, quick: bool = False, **unused: Any) -> None:
    """Print the table."""
    console = console or Console()
    write_row(console, ("model", "score in float", f"at most {MAX_DROP} less", "SQNR", "speed", "integer", "search"))
    write_row(console, ("---",) * 7)
    for name in QUICK if quick else TRAINED:
        with tempfile.TemporaryDirectory() as folder:
            write_row(console, row(subject(name), Path(folder)))
