"""Time of pruned models in ONNX Runtime: what a budget predicts, and what the exported file takes.

    python -m tests.bench prune_latency --models resnet18,mobilenet_v2

Models of torchvision have random weights and one image of 96 x 96. A file's time is the mean
of its four shortest runs in one thread, without what other processes take: whatever disturbs a run makes it longer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

import fxopt
from fxopt.export import to_onnx, width_costs
from fxopt.passes.prune import Prune, ShrinkMasked
from tests.models.randomized import randomized
from tests.zoo import data, weights

MODELS = ("mnist_cnn", "crepe_tiny", "mobilenet_v2", "resnet18")
SHARES = (0.8, 0.6, 0.4, 0.25)
_SECONDS = 3.0  # of runs for each file


def model_of(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a model and one input."""
    if name == "mnist_cnn":
        return weights.mnist_cnn(), data.digits()[0][:1]
    if name == "crepe_tiny":
        return weights.crepe("tiny"), data.tones()[0][:1]
    import torchvision

    return randomized(getattr(torchvision.models, name)(weights=None).eval()), torch.randn(1, 3, 96, 96)


def latency(gm: fxopt.CapturedModule, x: torch.Tensor) -> float:
    """Return the time of a run in microseconds."""
    session = to_onnx(gm, validate=False).session(threads=1).ort
    feed = {session.get_inputs()[0].name: x.numpy()}
    times = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        began = time.thread_time()
        session.run(None, feed)
        times.append(1e6 * (time.thread_time() - began))
    return sum(sorted(times)[:4]) / 4


def predicted(note: str) -> tuple[float, float]:
    """Return the times before and after of the first line that the pass reports."""
    before, _, after = note.partition(": ")[2].partition(" time, ")
    return float(before.replace(",", "")), float(after.split()[0].replace(",", ""))


def main(console: Console | None = None, *, quick: bool = False, models: Sequence[str] = (), **unused: Any) -> None:
    """Print a line for each model and share."""
    console = console or Console()
    console.print("model          share   predicted us   measured us    error   measured share")
    for name in models or MODELS[: 2 if quick else None]:
        torch.manual_seed(0)
        model, x = model_of(name)
        gm = fxopt.capture(model, (x,))
        held: dict[str, Any] = {}

        def measure(graph: fxopt.CapturedModule, regions: Sequence[Any], held: dict[str, Any] = held) -> Any:
            if not held:
                held |= width_costs(graph, regions, say=console.print)
            return held

        whole = latency(gm, x)
        for share in SHARES:
            result = Prune(budget=f"latency:{share}", costs=measure)(gm)
            before, after = predicted(result.notes[0])
            small = latency(ShrinkMasked()(result.gm).gm, x)
            if share == SHARES[0]:
                console.print(_line(name, 1.0, before, whole, whole), highlight=False)
            console.print(_line(name, share, after, small, whole), highlight=False)


def _line(name: str, share: float, wanted: float, got: float, whole: float) -> str:
    return f"{name:14} {share:5.2f} {wanted:14.0f} {got:13.0f} {wanted / got - 1:+8.1%} {got / whole:16.2f}"


if __name__ == "__main__":
    main()
