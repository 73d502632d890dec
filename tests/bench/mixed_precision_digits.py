"""Loss curves of a small residual CNN on real digits, trained in float32 and in half precision in several ways.

Columns are the mean training loss of single epochs, then the accuracy on images that training never saw; rows are means
over the seeds. All rows of a seed start from the same weights and see the same batches. "spread" is the largest
difference of two seeds in float32: differences between rows that are smaller say nothing.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt.passes import AdaptivePrecision, MixedPrecision
from fxopt.tools.demo_net import Digits, DigitsNet, accuracy, load_digits
from tests.bench.zoo_table import one_thread, write_row

SEEDS = (0, 1, 2)
EPOCHS = 5
_BATCH = 64
_SHOWN = (1, 2, 3, 5)


def main(console: Console, *, quick: bool = False) -> None:
    """Print the table."""
    digits, seeds = load_digits(), SEEDS[:1] if quick else SEEDS
    with one_thread():  # such small convolutions are slower on several
        write_row(console, ("training", *(f"epoch {epoch}" for epoch in _SHOWN), "accuracy", "skipped steps", "moves"))
        write_row(console, ["---"] * (len(_SHOWN) + 4))
        found = {name: [run(digits, seed) for seed in seeds] for name, run in WAYS.items()}
    for name, runs in found.items():
        write_row(console, _row(name, runs))
    plain = found["float32"]
    spread = [max(run[0][epoch - 1] for run in plain) - min(run[0][epoch - 1] for run in plain) for epoch in _SHOWN]
    write_row(console, ("spread", *(f"{number:.4f}" for number in spread), "", "", ""))


Run = tuple[list[float], float, int, int]


def _row(name: str, runs: list[Run]) -> list[str]:
    losses = [f"{statistics.mean(run[0][epoch - 1] for run in runs):.4f}" for epoch in _SHOWN]
    scores = f"{100 * statistics.mean(run[1] for run in runs):.2f} %"
    return [name, *losses, scores, *(f"{statistics.mean(run[column] for run in runs):.1f}" for column in (2, 3))]


def _start(digits: Digits, seed: int) -> tuple[DigitsNet, fxopt.CapturedModule]:
    """Return a net that is not trained, and its graph; they share parameters."""
    torch.manual_seed(seed)
    net = DigitsNet().train()
    return net, fxopt.capture(net, digits.train_images[:_BATCH], dynamic_shapes={"image": {0: "batch"}})


def _train(
    model: nn.Module,
    digits: Digits,
    seed: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
    context: Callable[[], Any] = contextlib.nullcontext,
    behind: Callable[[Any], Any] = lambda batch: None,
) -> tuple[list[float], float, int]:
    """Train, and return the mean loss of each epoch, the accuracy, and how many steps were skipped."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    means, skipped = [], 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(digits.train_images))
        losses = []
        for chosen in order[: len(order) // _BATCH * _BATCH].split(_BATCH):
            batch = digits.train_images[chosen], digits.train_labels[chosen]
            optimizer.zero_grad()
            with context():
                loss = _loss(model, batch)
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale
            behind(batch)
            losses.append(loss.item())
        means.append(statistics.mean(losses))
    with torch.no_grad(), context():
        return means, accuracy(model.eval()(digits.test_images).float(), digits.test_labels), skipped


def _loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def _float32(digits: Digits, seed: int) -> Run:
    return *_train(_start(digits, seed)[1], digits, seed), 0


def _autocast(dtype: torch.dtype) -> Callable[[Digits, int], Run]:
    def run(digits: Digits, seed: int) -> Run:
        scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
        context = lambda: torch.autocast("cpu", dtype)  # noqa: E731  (a fresh context for each step)
        return *_train(_start(digits, seed)[0], digits, seed, scaler=scaler, context=context), 0

    return run


def _graph(dtype: str) -> Callable[[Digits, int], Run]:
    def run(digits: Digits, seed: int) -> Run:
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
        return *_train(MixedPrecision(dtype)(_start(digits, seed)[1]).gm, digits, seed, scaler=scaler), 0

    return run


def _adaptive(digits: Digits, seed: int) -> Run:
    scaler = torch.amp.GradScaler("cpu", growth_interval=50)
    adaptive = AdaptivePrecision(_start(digits, seed)[1], _loss, dtype="float16", scaler=scaler, every=10)
    found = _train(adaptive.gm, digits, seed, scaler=scaler, behind=adaptive.step)
    return *found, len(adaptive.log)


WAYS: dict[str, Callable[[Digits, int], Run]] = {
    "float32": _float32,
    "bfloat16, eager autocast": _autocast(torch.bfloat16),
    "bfloat16, graph": _graph("bfloat16"),
    "float16, eager autocast and GradScaler": _autocast(torch.float16),
    "float16, graph and GradScaler": _graph("float16"),
    "float16, adaptive graph and GradScaler": _adaptive,
}


if __name__ == "__main__":
    main(Console())
