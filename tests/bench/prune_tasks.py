"""Trained nets pruned to a share of their multiply-accumulates or of their time, fine-tuned, and run in ORT.

Beside Torch-Pruning (``pip install torch-pruning``) with the same importance (L2 of a group's weights), data, epochs,
optimizer and seed; its share is the smallest with which the multiply-accumulates fit. All are counted by torch's own
counter of operations. Scores are those of the files in ORT. The rows of a share of time have the time that the row of
multiply-accumulates above took, divided by 1.25, as their budget, so both can be compared at equal scores; the net of
such a row is quantized as well. Two more shares of time fill the gaps between them. Times are of one row on one thread:
medians of runs in turn.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxopt
from fxopt.errors import PassError
from fxopt.export import Session, to_onnx, width_costs
from fxopt.passes import Prune
from tests.bench.early_exit import in_turn, ort_run
from tests.bench.zoo_table import one_thread, write_row
from tests.zoo import data, weights

HEADER = ("net", "pruned to", "tool", "score", "MACs", "parameters", "KiB", "ms", "times as fast", "predicted")
SHARES = (0.5, 0.25)
SPEEDUP = 1.25
TIMES = (0.5, 0.4)
RUNS, SEED, BATCH = 400, 0, 64


@dataclasses.dataclass(frozen=True)
class Task:
    """A trained net, data to fine-tune it with, and what it scores on other data.

    Attributes:
        load: Returns the net in evaluation, with the trained weights.
        train: Inputs and targets.
        loss: Of outputs and targets.
        score: Of a function from inputs to a tuple of outputs; 1.0 is perfect.
        epochs: Over the training data.
        rate: Learning rate of Adam.
    """

    load: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Any], float]
    epochs: int
    rate: float


def tasks() -> dict[str, Task]:
    """Return the nets by name."""
    images, labels = data.digits()
    frames, hertz = data.other_tones(3840, SEED)

    def digits(predict: Any) -> float:
        (logits,) = predict(images[4000:])
        return float((logits.argmax(1) == labels[4000:]).double().mean())

    def tones(predict: Any) -> float:
        held, wanted = data.tones()
        cents = 1200 * torch.log2(data.pitch(predict(held)[0]) / wanted)
        return float((cents.abs() <= 25).double().mean())

    return {
        "mnist_cnn": Task(weights.mnist_cnn, (images[:4000], labels[:4000]), F.cross_entropy, digits, 4, 5e-4),
        "crepe_tiny": Task(
            lambda: weights.crepe("tiny"), (frames, data.salience_of(hertz)), F.binary_cross_entropy, tones, 12, 1e-3
        ),
    }


def fine_tune(model: nn.Module, task: Task) -> None:
    """Train with Adam; the same order of the same batches for every tool."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), task.rate)
    draw = torch.Generator().manual_seed(SEED)
    inputs, targets = task.train
    for _ in range(task.epochs):
        for rows in torch.randperm(len(inputs), generator=draw).split(BATCH):
            optimizer.zero_grad()
            task.loss(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    model.eval()


def operations(model: nn.Module, row: Tensor) -> int:
    """Return the operations of one row, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(row)
    return int(counter.get_total_flops())


def captured(model: nn.Module, task: Task) -> fxopt.CapturedModule:
    """Return the net as a graph of both modes."""
    return fxopt.capture(model, (task.train[0][:2],), dynamic_shapes=({0: "batch"},))


def with_fxopt(task: Task, budget: str) -> tuple[fxopt.CapturedModule, float | None]:
    """Prune to a budget, fine-tune with the masks, shrink; return the net and the time that was predicted for it."""
    gm = captured(task.load(), task)
    costs = width_costs if budget.startswith("latency") else None
    masked = fxopt.optimize(gm, passes=[Prune(budget=budget, costs=costs, multiple=1)], check="off", strict=True)
    fine_tune(masked, task)
    shrunk = fxopt.optimize(masked, passes=["shrink-masked"], strict=True)
    return shrunk, float(budget.partition(":")[2]) if costs else None


def with_torch_pruning(task: Task, share: float, *, hint: bool) -> nn.Module:
    """Prune with the smallest share of channels that fits, and fine-tune.

    A hint leaves the last convolution alone, for nets whose code has the number of its channels in it.
    """
    import torch_pruning as tp

    row = task.train[0][:1]
    full = task.load()
    most = share * operations(full, row)
    low, high = 0.0, 0.95
    found: nn.Module | None = None
    for _ in range(9):
        ratio = (low + high) / 2
        model = copy.deepcopy(full)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        last += [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1:] if hint else []
        pruner = tp.pruner.BasePruner(
            model, row, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=ratio, ignored_layers=last
        )
        pruner.step()
        if operations(model, row) <= most:
            found, high = model, ratio
        else:
            low = ratio
    assert found is not None
    fine_tune(found, task)
    return found


def _run(session: Session, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(session.run(inputs))


def milliseconds(files: Sequence[Path], row: Tensor) -> list[float]:
    """Return the median milliseconds of each file on one row, run in turn on one thread."""
    return [each / 1e3 for each in in_turn([ort_run(Session(file, threads=1)) for file in files], row, RUNS).medians]


def _measured(name: str, task: Task, console: Console, folder: Path, shares: Sequence[float]) -> None:
    row = task.train[0][:1]
    plain = task.load()
    whole, size = operations(plain, row), sum(p.numel() for p in plain.parameters())
    files = [folder / "fp32.onnx"]
    to_onnx(fxopt.optimize(captured(plain, task)), files[0])
    rows: list[tuple[str, str, nn.Module, float | None]] = [("100 %", "none", plain, None)]

    def fails(pruned_to: str, tool: str, error: Exception) -> None:
        reason = f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:120]}".replace("|", "/")
        write_row(console, (name, pruned_to, tool, reason, *("",) * 6))

    def add(pruned_to: str, tool: str, model: nn.Module, predicted: float | None = None) -> None:
        gm = model if isinstance(model, fxopt.CapturedModule) else captured(model, task)
        files.append(folder / f"{len(files)}.onnx")
        to_onnx(fxopt.optimize(gm), files[-1])
        rows.append((pruned_to, tool, model, predicted))

    for share in shares:
        if importlib.util.find_spec("torch_pruning") is not None:
            try:
                add(f"{share:.0%} of MACs", "Torch-Pruning", with_torch_pruning(task, share, hint=False))
            except Exception as error:  # whatever a peer raises is its result
                fails(f"{share:.0%} of MACs", "Torch-Pruning", error)
                add(f"{share:.0%} of MACs", "Torch-Pruning, hint", with_torch_pruning(task, share, hint=True))
        add(f"{share:.0%} of MACs", "fxopt", with_fxopt(task, f"macs:{share}")[0])
        first, last = milliseconds([files[0], files[-1]], row)
        wanted = max(round(last / first / SPEEDUP, 3), 0.05)
        try:
            small, predicted = with_fxopt(task, f"latency:{wanted}")
        except PassError as error:  # less time than the narrowest widths take
            fails(f"{wanted:.0%} of time", "fxopt", error)
            continue
        add(f"{wanted:.0%} of time", "fxopt", small, predicted)
        integers = fxopt.optimize(small, passes=["quantize"], calibration=[(task.train[0][:256],)], strict=True)
        files.append(folder / f"{len(files)}.onnx")
        to_onnx(integers, files[-1])
        rows.append((f"{wanted:.0%} of time, int8", "fxopt", small, None))
    for wanted in TIMES:
        add(f"{wanted:.0%} of time", "fxopt", *with_fxopt(task, f"latency:{wanted}"))
    times = milliseconds(files, row)
    for (pruned_to, tool, model, predicted), ms, file in zip(rows, times, files, strict=True):
        write_row(
            console,
            (
                name,
                pruned_to,
                tool,
                f"{task.score(functools.partial(_run, Session(file))):.4f}",
                f"{operations(model, row) / whole:.2f}",
                f"{sum(p.numel() for p in model.parameters()) / size:.2f}",
                f"{sum(part.stat().st_size for part in file.parent.glob(file.name + '*')) / 1024:.0f}",
                f"{ms:.3f}",
                f"{times[0] / ms:.2f}",
                "" if predicted is None else f"{1 / predicted:.2f}",
            ),
        )


def main(console: Console | None = None, *, quick: bool = False, models: Sequence[str] = ()) -> None:
    """Print the table, as Markdown."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---",) * len(HEADER))
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        for name, task in tasks().items():
            if name in (models or tasks()):
                torch.manual_seed(SEED)
                _measured(name, task, console, Path(folder), SHARES[:1] if quick else SHARES)
