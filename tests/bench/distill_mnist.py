"""The MNIST net becomes a student with masks and quantizers, trained at once, shrunk, in integers.

    student = prune(net) + quantizers        trained on 4,000 digits, moved about, with a teacher
    extract-student, shrink-masked, convert-qat, to_onnx

The teacher is the net itself, or a larger one, trained here. Budgets are shares of the float net's time. Score: the
other 1,000 digits in ORT. Latency: of one digit on one thread, runs in turn; "times smaller" and "times as fast" are
against the teacher's float file, the latter the median over the pairs of runs. "alone" is the same student with the
labels for its only teacher.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt import passes
from fxopt.export import Session, bench, to_onnx, width_costs
from fxopt.passes.distill import ResponseLoss
from tests.bench.zoo_table import one_thread, write_row
from tests.zoo import data, weights

HEADER = ("net", "score", "KiB", "times smaller", "ms", "times as fast")
BUDGETS = ("latency:0.3", "latency:0.2")
EPOCHS, BATCH, RATE, SEED, TRAINED = 14, 64, 2e-3, 0, 4000
WAYS = {
    "distilled": [ResponseLoss(temperature=2.0, alpha=0.5)],
    "alone": [ResponseLoss(alpha=0.0)],
}


def moved(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return images f32[n, 1, 28, 28] turned by up to 10 degrees, scaled by a tenth, shifted by 2 pixels."""
    count = len(images)
    angle, scale, x, y = (2 * torch.rand(4, count, generator=draw) - 1).unbind()
    angle, scale = angle * torch.pi / 18, 1 + scale / 10
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    first = torch.stack([cosine, -sine, x * 2 / 14], 1)
    second = torch.stack([sine, cosine, y * 2 / 14], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images - images.min(), grid, align_corners=False) + images.min()


class Larger(nn.Module):
    """Four convolutions and two linear layers, f32[n, 1, 28, 28] to f32[n, 10]: 1.4 M parameters, 43 M MACs."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 96, 96)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.hidden, self.last = nn.Linear(96 * 49, 256), nn.Linear(256, 10)

    def forward(self, image: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            image = norm(conv(image)).relu()
            if index % 2:
                image = F.max_pool2d(image, 2)
        logits: Tensor = self.last(self.hidden(image.flatten(1)).relu())
        return logits


def trained(net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """Train on the digits, moved about, and return the net in evaluation."""
    images, labels = data.digits()
    images, labels = images[:TRAINED], labels[:TRAINED]
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    steps = EPOCHS * -(-TRAINED // BATCH)
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    draw = torch.Generator().manual_seed(SEED)
    net.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED, generator=draw).split(BATCH):
            optimizer.zero_grad()
            loss(moved(images[rows], draw), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def larger_teacher() -> nn.Module:
    """Return the larger net, trained on the labels."""
    torch.manual_seed(SEED)
    net = Larger()
    return trained(net, lambda images, labels: F.cross_entropy(net(images), labels))


def student(budget: str, losses: Sequence[Any], teacher: nn.Module) -> fxopt.CapturedModule:
    """Return the trained student in integers."""
    images, labels = data.digits()
    images, labels = images[:TRAINED], labels[:TRAINED]
    both = passes.distilled_student(
        weights.mnist_cnn(),
        [
            passes.Prune(budget=budget, costs=width_costs, multiple=4, min_sqnr_db=-60.0),
            passes.PrepareQat(learn_scales=True, min_sqnr_db=-60.0),
        ],
        (images[:2],),
        dynamic_shapes=({0: "batch"},),
        losses=losses,
        labels=labels[:2],
        teacher=teacher,
        calibration=[(images[:256],)],
    )
    trained(both, lambda rows, wanted: both(rows, wanted)["loss"])
    steps_after = ["extract-student", "shrink-masked", passes.ConvertQat(min_sqnr_db=-60.0)]
    return fxopt.optimize(both, steps_after, strict=True)


def score(file: Path) -> float:
    """Return the share of the digits not trained on that ORT names right."""
    images, labels = data.digits()
    (logits,) = Session(file).run([images[TRAINED:]])
    return float((logits.argmax(1) == labels[TRAINED:]).double().mean())


def measured(console: Console, name: str, teacher: nn.Module, budgets: Sequence[str]) -> None:
    """Print the rows of a teacher and its students."""
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{name}, float32": Path(folder) / "teacher.onnx"}
        graph = fxopt.capture(teacher, (data.digits()[0][:2],), dynamic_shapes=({0: "batch"},))
        to_onnx(fxopt.optimize(graph), files[f"{name}, float32"])
        for budget in budgets:
            for way, losses in WAYS.items():
                file = Path(folder) / f"{len(files)}.onnx"
                to_onnx(student(budget, losses, teacher), file)
                files[f"{budget}, int8, {way}"] = file
        report = bench(list(files.values()), [data.digits()[0][:1]], runs=400, threads=1, memory=False)
        for label, times in zip(files, report.files, strict=True):
            smaller = report.files[0].file_mib / times.file_mib
            sizes = (f"{times.file_mib * 1024:.0f}", f"{smaller:.1f}")
            speed = (f"{times.median_ms:.3f}", f"{times.speed:.2f}")
            write_row(console, (label, f"{score(files[label]):.4f}", *sizes, *speed))


def main(console: Console | None = None, *, quick: bool = False, **unused: Any) -> None:
    """Print the table; ``quick`` takes one budget and the net itself as the teacher."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---",) * len(HEADER))
    with one_thread():
        measured(console, "the net itself", weights.mnist_cnn(), BUDGETS[:1] if quick else BUDGETS)
        if not quick:
            measured(console, "a larger teacher", larger_teacher(), BUDGETS)
