"""The demo: train a small net on real digits, optimize it, export it, prove it in ONNX Runtime, and show what it cost.

python -m fxopt.tools.demo [--output DIR]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor

import fxopt
from fxopt.errors import FxoptError
from fxopt.export import OnnxFile, Session, to_onnx, validate
from fxopt.tools.console import describe_bytes, error_text, stderr, stdout
from fxopt.tools.demo_net import Digits, DigitsNet, accuracy, load_digits, train
from fxopt.tools.tables import print_report

__all__ = ["main", "run"]

_OUTPUT = Path("build/demo")
_BATCH = 32
_ROUNDS = 100


@dataclasses.dataclass(frozen=True)
class _Side:
    """One column of the table.

    Attributes:
        gm: The graph.
        file: Its export.
        path: Where that was written.
        eager, ort: Scores f32[n, 10] of the test images, by the graph in PyTorch and by ORT.
    """

    gm: fxopt.CapturedModule
    file: OnnxFile
    path: Path
    eager: Tensor
    ort: Tensor


def run(output: Path | None = None) -> int:
    """Run the demo and print its table.

    Args:
        output: Folder for ``before.onnx`` and ``digits.onnx``; ``build/demo`` if not given.

    Returns:
        0, or 1 if the demo cannot run or ORT computes something else than the trained model.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a net is much slower on several: they wait for each other
    try:
        return _run(_OUTPUT if output is None else output)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path) -> int:
    try:
        digits = load_digits()
    except ModuleNotFoundError as error:
        stderr().print(error_text(f"the demo needs scikit-learn: {error}\n  try   pip install 'fxopt[demo]'"))
        return 1
    print(f"training on {len(digits.train_images)} digits ...", flush=True)
    started = time.perf_counter()
    model = train(digits)
    seconds = time.perf_counter() - started
    print(f"trained in {seconds:.1f} s; the {len(digits.test_images)} digits below were never trained on")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _show(folder, model, digits)
    except (FxoptError, OSError) as error:
        stderr().print(error_text(str(error)))
        return 1
    return 0


def _show(folder: Path, model: DigitsNet, digits: Digits) -> None:
    """Optimize, export, prove and print.

    Raises:
        NumericsError: a file computes something else than the captured model; it is not written.
    """
    example = (digits.test_images[:_BATCH],)
    captured = fxopt.capture(model, example, dynamic_shapes={"image": {0: "batch"}})
    optimized = fxopt.optimize(captured)
    before = _export(captured, captured, folder / "before.onnx", digits)
    after = _export(optimized, captured, folder / "digits.onnx", digits)
    with torch.no_grad():
        wanted = model(digits.test_images)
    proof = validate(after.path, captured, inputs=[example, (digits.test_images,)])

    assert optimized.report is not None
    print("\nWhat the passes did:")
    print_report(optimized.report)
    print()
    stdout().print(_table(before, after, wanted, digits))
    print(
        f"\nORT against the graph before any pass, contract {proof.contract}: kept in all {proof.runs} runs.\n"
        "With its optimizer on, ORT folds batch norms itself while it loads a file, so both files should run alike.\n"
        f"The model is in {after.path}"
    )


def _export(gm: fxopt.CapturedModule, original: fxopt.CapturedModule, path: Path, digits: Digits) -> _Side:
    """Write ``gm`` to ``path`` once its export has been proved against itself and against ``original``."""
    draft = to_onnx(gm)
    if gm is not original:
        validate(draft, original)
    file = draft.save(path)
    with torch.no_grad():
        eager = gm(digits.test_images)
    (scores,) = file.session().run([digits.test_images])
    return _Side(gm, file, path, eager, scores)


def _table(before: _Side, after: _Side, wanted: Tensor, digits: Digits) -> Table:
    """Return the comparison; ``wanted`` are the scores of the model itself, f32[n, 10]."""
    off = _latencies([before, after], "none", digits)
    on = _latencies([before, after], "all", digits)
    table = Table(title="digits, before and after", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    sides = (before, after)
    table.add_row("graph nodes", *(f"{len(side.gm.graph.nodes)}" for side in sides))
    table.add_row("ONNX nodes", *(f"{len(side.file.model.graph)}" for side in sides))
    table.add_row("parameters and buffers", *(f"{_elements(side.gm):,}" for side in sides))
    table.add_row("file size", *(describe_bytes(side.path.stat().st_size) for side in sides))
    table.add_row(f"ms for {_BATCH} digits, ORT optimizer off", *(f"{ms:.3f}" for ms in off))
    table.add_row(f"ms for {_BATCH} digits, ORT optimizer on", *(f"{ms:.3f}" for ms in on))
    table.add_row("accuracy, PyTorch", *(f"{accuracy(side.eager, digits.test_labels):.2%}" for side in sides))
    table.add_row("accuracy, ORT", *(f"{accuracy(side.ort, digits.test_labels):.2%}" for side in sides))
    table.add_row("largest error of ORT's scores", *(f"{float((side.ort - wanted).abs().max()):.1e}" for side in sides))
    table.caption = f"times: median of {_ROUNDS} runs on one thread; scores reach {float(wanted.abs().max()):.0f}"
    table.caption_justify = "left"
    return table


def _latencies(sides: Sequence[_Side], optimization: Literal["none", "all"], digits: Digits) -> list[float]:
    """Return each side's median time in ms. The sides take turns, so that a busy machine slows all of them."""
    images = [digits.test_images[:_BATCH]]
    sessions = [Session(side.path, optimization=optimization, threads=1) for side in sides]
    times: list[list[float]] = [[] for _ in sides]
    for index in range(_ROUNDS + 5):
        for session, held in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(images)
            if index >= 5:  # the first runs also allocate
                held.append((time.perf_counter() - started) * 1e3)
    return [statistics.median(held) for held in times]


def _elements(gm: fxopt.CapturedModule) -> int:
    return sum({id(tensor): tensor.numel() for tensor in [*gm.parameters(), *gm.buffers()]}.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m fxopt.tools.demo", description="Train, optimize, export and prove a small net."
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder for the ONNX files (default: {_OUTPUT})")
    return run(parser.parse_args(arguments).output)


if __name__ == "__main__":
    sys.exit(main())
