"""The demo's network and its data: the handwritten digits that scikit-learn brings along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Digits", "DigitsNet", "accuracy", "fit", "load_digits", "train"]

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Digits:
    """Real digits, split once: three quarters to train on, one quarter that training never sees.

    Attributes:
        train_images, test_images: f32[n, 1, 8, 8], ink from 0 to 1.
        train_labels, test_labels: i64[n], the digit from 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class DigitsNet(nn.Module):
    """A small residual network for images of 8 by 8: convolutions with batch norm, a shortcut, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16)
        self.first = _conv(16, 16)
        self.second = _conv(16, 16)
        self.down = _conv(16, 32, stride=2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return a score for each digit, f32[batch, 10], for images f32[batch, 1, 8, 8]."""
        x = F.relu(self.stem(image))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        x = F.relu(self.down(x))
        x = self.dropout(x.mean(dim=(2, 3)))
        scores: Tensor = self.head(x)
        return scores


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


def load_digits() -> Digits:
    """Return the 1,797 digits of scikit-learn; the split is the same on each run.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    import sklearn.datasets
    import sklearn.model_selection

    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    parts = sklearn.model_selection.train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


def train(digits: Digits, *, epochs: int = 12, seed: int = 0) -> DigitsNet:
    """Return a network trained on the digits, in eval mode; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
        fit(model, digits, lambda images, labels: F.cross_entropy(model(images), labels), epochs=epochs, rate=1e-2)
    return model


def fit(
    model: nn.Module, digits: Digits, loss: Callable[[Tensor, Tensor], Tensor], *, epochs: int, rate: float
) -> None:
    """Train ``model`` until ``loss(images, labels)`` is small, and leave it in eval mode."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate)
    steps = epochs * (len(digits.train_images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_images))
        for chosen in order[: len(order) // _BATCH * _BATCH].split(_BATCH):
            optimizer.zero_grad()
            loss(digits.train_images[chosen], digits.train_labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the share of rows of ``scores`` that are largest at their label."""
    return float((scores.argmax(dim=1) == labels).double().mean())
