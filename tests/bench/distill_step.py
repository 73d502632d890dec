"""What one graph of student, teacher and losses costs in a training step, against eager nets with forward hooks.

All do the same: forward, the weighted losses, backward, and a step of SGD, on one thread. They run in turn; times are
medians, and the ratios, to hooks, are medians of the ratios of neighbours. "folded" is one graph with the teacher's
BatchNorms folded into its convolutions by ``teacher_passes``; its losses differ by rounding.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

import fxopt
from fxopt.passes.distill import AttentionLoss, HintLoss, MergeTeacher, ResponseLoss, SimilarityLoss
from fxopt.passes.distill.losses import attention_loss, hint_loss, response_loss, similarity_loss
from tests.bench.early_exit import in_turn
from tests.bench.zoo_table import one_thread, write_row

STEPS = 100
BATCH, SIZE, CLASSES = 16, 32, 10
HEADER = (
    "student", "teacher", "losses", "hooks ms", "one graph ms", "folded ms", "ratio", "folded",
    "difference of the losses",
)  # fmt: skip
LOSSES = (
    ResponseLoss(temperature=4.0, alpha=0.7),
    HintLoss("stages.1", "stages.1", weight=0.1),
    AttentionLoss("stages.2", "stages.2", weight=100.0),
    SimilarityLoss("stages.2", "stages.2", weight=10.0),
)


class Net(nn.Module):
    """Three stages of two convolutions each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(*(_stage(a, b) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.head(self.stages(image).mean((2, 3)))
        return scores


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


def graph_step(
    student: Net, teacher: Net, labels: Tensor, image: Tensor, teacher_passes: Sequence[str] = ()
) -> Callable[[Tensor], float]:
    """Return a training step of the merged graph."""
    graph = fxopt.capture(student, (image,), dynamic_shapes={"image": {0: "batch"}})
    merge = MergeTeacher(teacher, LOSSES, labels, teacher_passes=teacher_passes)
    both = fxopt.optimize(graph, passes=[merge], strict=True).train()
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], 1e-3)

    def step(image: Tensor) -> float:
        optimizer.zero_grad()
        loss = both(image, labels)["loss"]
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def hook_step(student: Net, teacher: Net, labels: Tensor, width: int, teacher_width: int) -> Callable[[Tensor], float]:
    """Return the training step that is written by hand today."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = nn.Conv2d(2 * width, 2 * teacher_width, 1)
    teacher.eval().requires_grad_(False)
    student.train()
    kept: dict[tuple[int, str], Tensor] = {}
    for which, net in enumerate((student, teacher)):
        for path in ("stages.1", "stages.2"):
            net.get_submodule(path).register_forward_hook(
                lambda module, args, result, key=(which, path): kept.__setitem__(key, result)
            )
    optimizer = torch.optim.SGD([*student.parameters(), *adapter.parameters()], 1e-3)

    def step(image: Tensor) -> float:
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(image)
        loss = (
            response_loss(student(image), target, labels, temperature=4.0, alpha=0.7)
            + 0.1 * hint_loss(adapter(kept[0, "stages.1"]), kept[1, "stages.1"])
            + 100 * attention_loss(kept[0, "stages.2"], kept[1, "stages.2"])
            + 10 * similarity_loss(kept[0, "stages.2"], kept[1, "stages.2"])
        )
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def row(width: int, teacher_width: int, steps: int) -> tuple[str, ...]:
    """Return the row of a student and a teacher of these widths."""
    torch.manual_seed(0)
    student, teacher = Net(width), Net(teacher_width).eval()
    image, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))
    graph = graph_step(copy.deepcopy(student), teacher, labels, image)
    hooks = hook_step(student, copy.deepcopy(teacher), labels, width, teacher_width)
    folded = graph_step(copy.deepcopy(student), copy.deepcopy(teacher), labels, image, ["fold-batch-norm"])
    worst = max(abs(graph(image) - hooks(image)) for _ in range(3))
    # in_turn hands out single images; the batch is the same each time.
    times = in_turn([lambda _: hooks(image), lambda _: graph(image), lambda _: folded(image)], image[:1], steps)
    milliseconds = [f"{us / 1000:.2f}" for us in times.medians]
    ratios = [f"{1 / ratio:.3f}" for ratio in times.ratios]
    return str(width), str(teacher_width), str(len(LOSSES)), *milliseconds, *ratios, f"{worst:.0e}"


def main(console: Console | None = None, *, quick: bool = False) -> None:
    """Print the table, as Markdown.

    Args:
        console: Where to print.
        quick: One row, and a fifth of the steps.
    """
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---:",) * len(HEADER))
    with one_thread():
        for width, teacher_width in ((8, 16), (16, 32)) if not quick else ((8, 16),):
            write_row(console, row(width, teacher_width, STEPS // 5 if quick else STEPS))


if __name__ == "__main__":
    main()
