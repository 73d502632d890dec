"""A small student on 200 real digits, alone and with a larger teacher that saw all 1,347: accuracy on 450 others.

Every row trains the same student from the same start on the same batches; "labels" is cross entropy, and each other row
adds the losses that it names. The student is taken out of the graph again before it is tested. Means over the seeds of
student and batches, with the standard deviation; the teacher is the same for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt.passes.distill import AttentionLoss, DistillationLoss, HintLoss, MergeTeacher, ResponseLoss, SimilarityLoss
from fxopt.tools.demo_net import Digits, accuracy, fit, load_digits
from tests.bench.zoo_table import one_thread, write_row

SEEDS = (0, 1, 2, 3, 4)
IMAGES, BATCH, EPOCHS, RATE = 200, 50, 60, 1e-2
HEADER = ("losses", "accuracy", "deviation", "seeds")
_LABELS = ResponseLoss(alpha=0.0)
_RESPONSE = ResponseLoss(temperature=4.0, alpha=0.9)
_FEATURES = (
    HintLoss("body", "body", weight=0.1),
    AttentionLoss("body", "body", weight=10.0),
    SimilarityLoss("body", "body", weight=1.0),
)
WAYS: dict[str, Sequence[DistillationLoss]] = {
    "labels": (_LABELS,),
    "response": (_RESPONSE,),
    "response, standardized": (ResponseLoss(temperature=2.0, alpha=0.9, standardize=True),),
    "labels and hint": (_LABELS, _FEATURES[0]),
    "labels and attention": (_LABELS, _FEATURES[1]),
    "labels and similarity": (_LABELS, _FEATURES[2]),
    "response, hint, attention and similarity": (_RESPONSE, *_FEATURES),
}


class Net(nn.Module):
    """Two convolutions with batch norm, f32[batch, 1, 8, 8] to f32[batch, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(image).mean((2, 3)))
        return scores


def trained_teacher(digits: Digits) -> Net:
    """Return the teacher, trained on all training images."""
    torch.manual_seed(0)
    teacher = Net(32)
    fit(
        teacher,
        digits,
        lambda images, labels: nn.functional.cross_entropy(teacher(images), labels),
        epochs=15,
        rate=RATE,
    )
    return teacher


def student_accuracy(teacher: Net, digits: Digits, losses: Sequence[DistillationLoss], seed: int) -> float:
    """Train a student with these losses and return its accuracy on the test images."""
    torch.manual_seed(seed)
    images, labels = digits.train_images[:IMAGES], digits.train_labels[:IMAGES]
    graph = fxopt.capture(Net(8), (images[:BATCH],), dynamic_shapes={"image": {0: "batch"}})
    merge = MergeTeacher(teacher, losses, labels[:BATCH], seed=seed)
    both = fxopt.optimize(graph, passes=[merge], strict=True, check="samples").train()
    torch.manual_seed(seed)  # the same batches for every way
    optimizer = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=EPOCHS * (IMAGES // BATCH))
    for _ in range(EPOCHS):
        for chosen in torch.randperm(IMAGES).split(BATCH):
            optimizer.zero_grad()
            both(images[chosen], labels[chosen])["loss"].backward()
            optimizer.step()
            schedule.step()
    student = fxopt.optimize(both.eval(), passes=["extract-student"], strict=True, check="samples")
    with torch.no_grad():
        return accuracy(student(digits.test_images), digits.test_labels)


def main(console: Console | None = None, *, quick: bool = False) -> None:
    """Print the table, as Markdown.

    Args:
        console: Where to print.
        quick: One seed.
    """
    console = console or Console()
    digits, seeds = load_digits(), SEEDS[:1] if quick else SEEDS
    write_row(console, HEADER)
    write_row(console, ("---", *("---:",) * (len(HEADER) - 1)))
    with one_thread():
        teacher = trained_teacher(digits)
        with torch.no_grad():
            score = accuracy(teacher(digits.test_images), digits.test_labels)
        write_row(console, ("the teacher", f"{score:.1%}", "-", "1"))
        for name, losses in WAYS.items():
            found = [student_accuracy(teacher, digits, losses, seed) for seed in seeds]
            spread = f"{statistics.stdev(found):.1%}" if len(found) > 1 else "-"
            write_row(console, (name, f"{statistics.mean(found):.1%}", spread, str(len(found))))


if __name__ == "__main__":
    main()
