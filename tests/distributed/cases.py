"""Graphs to train in one process and in several, and one loop for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.passes import MergeTeacher, PrepareQat, Prune, ResponseLoss

STEPS = 5
X = torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """A residual block of a transformer without attention."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Blocks(nn.Module):
    """Two blocks, and a head on the mean."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """An LSTM, and a head on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.head(y[:, -1])


class Normed(nn.Module):
    """Convolution, batch norm and dropout: what differs between the modes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x)).relu().mean(2)))


def captured(net: Callable[[], nn.Module]) -> fxopt.CapturedModule:
    """Return the graph of a net with the same random weights in every process."""
    torch.manual_seed(0)
    return fxopt.capture(net().train(), (X,), dynamic_shapes=({0: "batch"},))


def masked(net: Callable[[], nn.Module]) -> fxopt.CapturedModule:
    return Prune(0.5, "weights", min_sqnr_db=-1000.0)(captured(net)).gm


def merged() -> fxopt.CapturedModule:
    """Return a student with a frozen teacher of the same shape and other weights."""
    torch.manual_seed(1)
    teacher = Blocks().eval()
    return MergeTeacher(teacher, losses=(ResponseLoss(),))(captured(Blocks)).gm.train()


def quantized(gm: fxopt.CapturedModule, **options: Any) -> fxopt.CapturedModule:
    return PrepareQat(weight_bits=4, **options)(gm).gm.train()


GRAPHS: dict[str, Callable[[], fxopt.CapturedModule]] = {
    "plain": lambda: captured(Blocks),
    "masked": lambda: masked(Blocks),
    "quantized": lambda: quantized(captured(Blocks)),
    "masked and quantized": lambda: quantized(masked(Blocks)),
    "recurrent": lambda: masked(Recurrent),
    "merged": merged,
}
"""Graphs whose gradient for a batch is the mean of those for its parts."""


def covered(name: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a graph: that of slow tests if another one has all that it has."""
    return [] if name in ("masked and quantized", "recurrent", "merged") else [pytest.mark.slow]


LEARNED: Callable[[], fxopt.CapturedModule] = lambda: quantized(masked(Blocks), learn_scales=True)  # noqa: E731  (listed like the others)


def scores_of(result: Any) -> Tensor:
    """Return the scores among what a graph returns, a student's among what it returns with its teacher."""
    return result["output"] if isinstance(result, dict) else result


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)


def train(
    model: Callable[..., Any], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = STEPS
) -> list[float]:
    """Train with one batch, and return the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        result = model(x)
        loss = F.cross_entropy(scores_of(result), y)
        if isinstance(result, dict):
            loss = loss + result["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
