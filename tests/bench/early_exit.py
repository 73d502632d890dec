"""What a Python ``if`` that leaves early saves: a trained CNN on real digits, captured unmodified and run in ORT.

"Easy" are the test images at which the net leaves, one by one; "hard" are the others. Beside it runs a net of the same
layers with the same weights that has no exit. All has one thread and batch 1. The two files run in turn, and so do the
three in eager; times are medians, and a ratio is the median of the ratios of neighbours. The row of all images weighs
the times by the share of images.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.tools.demo_net import Digits, accuracy, load_digits
from tests.bench.zoo_table import one_thread, write_row
from tests.models.early_exit import EarlyExitNet, WithoutExit, leaves_early, train

SEEDS = (0, 1, 2)  # of the training
RUNS = 1000  # of each of the nets, on easy and on hard images
HEADER = (
    "seed", "images", "share", "accuracy", "in ORT", "without exit", "graph = eager", "ORT predicts as eager",
    "differs by", "ORT µs", "without exit µs", "ratio", "eager µs", "eager without exit µs",
    "eager ratio", "graph in eager µs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Nets:
    """A trained net, its graph, the same layers without the exit, and ORT sessions of both.

    Attributes:
        eager, graph, plain: What runs in PyTorch.
        session, plain_session: The exported graph, and the exported net without an exit.
    """

    eager: EarlyExitNet
    graph: fxopt.CapturedModule
    plain: WithoutExit
    session: Session
    plain_session: Session


@dataclasses.dataclass(frozen=True)
class Times:
    """Median microseconds of several ways to run, in turn, and the ratios of the first to each of the others."""

    medians: list[float]
    ratios: list[float]


def build(digits: Digits, seed: int, folder: Path) -> Nets:
    """Train, capture and export."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = train(EarlyExitNet(), digits, seed)
    plain = WithoutExit(net)
    graphs = []
    for index, model in enumerate((net, plain)):
        graphs.append(fxopt.capture(model, (digits.train_images[:2],), dynamic_shapes=({0: "batch"},)))
        to_onnx(graphs[-1], folder / f"{index}.onnx")
    sessions = [Session(folder / f"{index}.onnx", threads=1) for index in range(2)]
    return Nets(net, graphs[0], plain, *sessions)


def in_turn(runs: Sequence[Callable[[Tensor], Any]], images: Tensor, count: int) -> Times:
    """Time each of ``runs`` on each image, ``count`` times in all, in changing order."""
    times: list[list[float]] = [[] for _ in runs]
    for index, image in zip(range(count + 5), itertools.cycle(images.split(1)), strict=False):
        for which in sorted(range(len(runs)), key=lambda which, shift=index: (which + shift) % len(runs)):
            started = time.perf_counter()
            runs[which](image)
            times[which].append((time.perf_counter() - started) * 1e6)
    times = [side[5:] for side in times]  # the first ones warm caches
    ratios = [statistics.median(a / b for a, b in zip(times[0], side, strict=True)) for side in times[1:]]
    return Times([statistics.median(side) for side in times], ratios)


def ort_run(session: Session) -> Callable[[Tensor], Any]:
    """Return ORT's own call: turning tensors into its values, as ``Session.run`` does, takes as long as a small net."""
    (name,) = session.input_names
    return lambda image: session.ort.run(None, {name: image.numpy()})


def one_by_one(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the scores of images that are each alone in their batch."""
    return torch.cat([run(image) for image in images.split(1)])


def rows(nets: Nets, digits: Digits, seed: int, runs: int) -> list[tuple[str, ...]]:
    """Return the rows of easy, hard and all test images."""
    images, labels = digits.test_images, digits.test_labels
    easy = leaves_early(nets.eager, images)
    eager, graph, plain = (one_by_one(net, images) for net in (nets.eager, nets.graph, nets.plain))
    ort = one_by_one(lambda image: nets.session.run([image])[0], images)
    groups = {"easy": easy, "hard": ~easy}
    in_ort, in_eager = {}, {}
    for name, mask in groups.items():
        in_ort[name] = in_turn([ort_run(nets.session), ort_run(nets.plain_session)], images[mask], runs)
        in_eager[name] = in_turn([nets.eager, nets.plain, nets.graph], images[mask], runs // 4)
    share = float(easy.double().mean())
    in_ort["all"], in_eager["all"] = (_mixed(times["easy"], times["hard"], share) for times in (in_ort, in_eager))
    table = []
    for name, mask in (groups | {"all": torch.ones_like(easy)}).items():
        count = int(mask.sum())
        same = int((ort.argmax(1) == eager.argmax(1))[mask].sum())
        ort_us, eager_us = in_ort[name].medians, in_eager[name].medians
        table.append(
            (
                str(seed),
                f"{name} {count}",
                f"{count / len(mask):.0%}",
                *(f"{accuracy(scores[mask], labels[mask]):.1%}" for scores in (eager, ort, plain)),
                f"{int((graph == eager).all(dim=1)[mask].sum())}/{count}",
                f"{same}/{count}",
                f"{float((ort - eager)[mask].abs().max()):.0e}",
                *(f"{us:.0f}" for us in ort_us),
                f"{in_ort[name].ratios[0]:.2f}",
                *(f"{us:.0f}" for us in eager_us[:2]),
                f"{in_eager[name].ratios[0]:.2f}",
                f"{eager_us[2]:.0f}",
            )
        )
    return table


def _mixed(easy: Times, hard: Times, share: float) -> Times:
    medians = [share * a + (1 - share) * b for a, b in zip(easy.medians, hard.medians, strict=True)]
    return Times(medians, [medians[0] / other for other in medians[1:]])


def main(console: Console | None = None, *, quick: bool = False) -> None:
    """Print the table, as Markdown.

    Args:
        console: Where to print.
        quick: One net, and a fifth of the runs.
    """
    console = console or Console()
    digits = load_digits()
    write_row(console, HEADER)
    write_row(console, ("---:", "---", *("---:",) * (len(HEADER) - 2)))
    with tempfile.TemporaryDirectory() as place, one_thread(), torch.no_grad():
        for seed in SEEDS[:1] if quick else SEEDS:
            with torch.enable_grad():
                nets = build(digits, seed, Path(place))
            for cells in rows(nets, digits, seed, RUNS // 5 if quick else RUNS):
                write_row(console, cells)


if __name__ == "__main__":
    main()
