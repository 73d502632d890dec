"""The MNIST net as its own teacher: a student of it with masks and quantizers, trained at once, shrunk, in integers.

    student = prune(net) + quantizers        trained on 4,000 digits, moved about, with the net as the teacher
    extract-student, shrink-masked, convert-qat, to_onnx

Budgets are shares of the float net's time. Score: the other 1,000 digits in ORT. Latency: of one digit on one thread,
runs in turn; "times as fast" is the median over the pairs of runs with the teacher's float file. "alone" is the same
student with the labels for its only teacher.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import fxopt
from fxopt import passes
from fxopt.export import Session, bench, to_onnx, width_costs
from fxopt.passes.distill import ResponseLoss
from tests.bench.zoo_table import one_thread, write_row
from tests.zoo import data, weights

HEADER = ("net", "score", "KiB", "times smaller", "ms", "times as fast")
BUDGETS = ("latency:0.2", "latency:0.15")
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


def student(budget: str, losses: Sequence[Any]) -> fxopt.CapturedModule:
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
        calibration=[(images[:256],)],
    ).train()
    trained = [parameter for parameter in both.parameters() if parameter.requires_grad]
    steps = EPOCHS * -(-TRAINED // BATCH)
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    draw = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED, generator=draw).split(BATCH):
            optimizer.zero_grad()
            both(moved(images[rows], draw), labels[rows])["loss"].backward()
            optimizer.step()
            schedule.step()
    steps_after = ["extract-student", "shrink-masked", passes.ConvertQat(min_sqnr_db=-60.0)]
    return fxopt.optimize(both.eval(), steps_after, strict=True)


def score(file: Path) -> float:
    """Return the share of the digits not trained on that ORT names right."""
    images, labels = data.digits()
    (logits,) = Session(file).run([images[TRAINED:]])
    return float((logits.argmax(1) == labels[TRAINED:]).double().mean())


def main(console: Console | None = None, *, quick: bool = False, **unused: Any) -> None:
    """Print the table; ``quick`` takes one budget."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---",) * len(HEADER))
    with tempfile.TemporaryDirectory() as name, one_thread():
        files = {"teacher, float32": Path(name) / "teacher.onnx"}
        teacher = fxopt.capture(weights.mnist_cnn(), (data.digits()[0][:2],), dynamic_shapes=({0: "batch"},))
        to_onnx(fxopt.optimize(teacher), files["teacher, float32"])
        for budget in BUDGETS[:1] if quick else BUDGETS:
            for way, losses in WAYS.items():
                file = Path(name) / f"{len(files)}.onnx"
                to_onnx(student(budget, losses), file)
                files[f"{budget}, int8, {way}"] = file
        report = bench(list(files.values()), [data.digits()[0][:1]], runs=400, threads=1, memory=False)
        for label, times in zip(files, report.files, strict=True):
            smaller = report.files[0].file_mib / times.file_mib
            sizes = (f"{times.file_mib * 1024:.0f}", f"{smaller:.1f}")
            speed = (f"{times.median_ms:.3f}", f"{times.speed:.2f}")
            write_row(console, (label, f"{score(files[label]):.4f}", *sizes, *speed))
