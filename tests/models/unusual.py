"""Nets with unusual inputs, outputs, types and side effects: what capture has to survive."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.base import Example, Net, settle


class DictOutput(Net):
    """A dict of a tensor, a nested tuple, an input passed through, one value twice, and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box, self.score = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = F.relu(self.body(x))
        box = self.box(y)
        return {"box": box, "pair": (self.score(y), [y, x]), "again": box, "nothing": None}

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 6))


class KeywordOnly(Net):
    """Keyword-only inputs, one of them left at its default, given in another order than declared."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, *, left: Tensor, right: Tensor, bias: Tensor | None = None, scale: float = 0.5) -> Tensor:
        y = self.left(left) - scale * self.right(right)
        return y if bias is None else y + bias

    def example(self, batch: int = 2) -> Example:
        inputs = {"right": torch.randn(batch, 5), "left": torch.randn(batch, 4)}
        return Example((), inputs, {"left": {0: "batch"}, "right": {0: "batch"}})


class NestedInputs(Net):
    """Inputs in a dict that holds a list, and a tuple beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, features: dict[str, Any], pair: tuple[Tensor, Tensor]) -> Tensor:
        first, second = features["levels"]
        return self.lin(first * features["gate"] - second) + pair[0] / (1 + pair[1].abs())

    def example(self, batch: int = 2) -> Example:
        features = {"levels": [torch.randn(batch, 4), torch.randn(batch, 4)], "gate": torch.randn(batch, 1)}
        rows = {0: "batch"}
        return Example(
            (features, (torch.randn(batch, 3), torch.randn(batch, 3))),
            {},
            {"features": {"levels": [rows, rows], "gate": rows}, "pair": (rows, rows)},
        )


class SliceWriter(Net):
    """Writes into slices, views and an alias: each write must be seen through every alias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.lin(x)
        view = y.view(-1, 2, 3)
        y[:, 0] = 0.0
        view[:, 1, 1:] += 2.0
        y[:, ::2].mul_(0.5)
        alias = y.t()
        alias[3].relu_()
        return y.masked_fill_(x > 1.0, -1.0), view.sum(-1)

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 6))


class StochasticDepth(Net):
    """A branch that training drops per row: ``if self.training`` with a draw in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        branch = self.norm(self.conv2(F.relu(x)))
        if self.training:
            keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < 0.8
            branch = branch * keep / 0.8
        return x + branch

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 3, 6, 6))


class RunningMean(Net):
    """Writes its own buffers in forward: a moving average in train mode, a call counter always."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        if self.training:
            self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        self.calls += 1
        return y - self.mean

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 4))


class IntegerNet(Net):
    """No parameter and no float: lookups, comparisons, floor division, bit masks, a cumulative sum, argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(-50, 50, (16,)))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        values = self.table[ids & 15]
        total = torch.cumsum(torch.where(values > 0, values, -values), dim=1) // 3 - (ids % 7)
        return total, (total > ids).to(torch.int32).argmax(1)

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randint(-40, 40, (batch, 6)), ids={0: "batch"})


class MixedDtype(Net):
    """f16, f32, f64, i64, u8 and bool meet: promotions and casts of which none may be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("fine", torch.randn(4).half())
        self.register_buffer("wide", torch.randn(4).double())

    def forward(self, image: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        x = self.lin(image.float() / 255.0) * self.fine
        wide = x.double() * self.wide + count[:, None]
        return wide.to(torch.float32).to(x.dtype), (wide > 0) * count[:, None]

    def example(self, batch: int = 2) -> Example:
        image = torch.randint(0, 256, (batch, 4), dtype=torch.uint8)
        return self._batched(image, torch.randint(-5, 5, (batch,)), image={0: "batch"}, count={0: "batch"})


class Redundant(Net):
    """Food for the cleanup passes: constants, a repeated value, dead code, identities, two transposes in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop = nn.Linear(6, 6), nn.Dropout(0.4)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.arange(6, dtype=torch.float32) * 2 + self.shift.exp()
        unused = torch.softmax(x, 1)
        unused = unused + 1
        y = self.drop(self.lin(x)).view(x.shape[0], 6).to(torch.float32)
        z = y.transpose(0, 1).transpose(0, 1)[:, 0:6] * scale
        return z * torch.sigmoid(x) + torch.sigmoid(x) * 1.0

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 6))


class Noise(Net):
    """Two draws of the same form, which are two values: never one common subexpression, never a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x) - torch.rand_like(x) + x

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 5))
