"""Small nets that half precision breaks if all of them is cast: each with the operator that must stay float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CORPUS", "Case"]

FLOAT_LOWEST = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A net that float16 breaks.

    Attributes:
        name: What it shows.
        model: Makes it.
        inputs: Makes its inputs.
        islands: Beginnings of names of nodes that must stay float32, one of each.
        line: A part of the user's line that a reason must quote.
        dynamic: Dynamic sizes, as capture takes them.
        accumulate: How the device that it breaks on adds up.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    islands: tuple[str, ...]
    line: str
    dynamic: dict[str, Any] | None = None
    accumulate: str = "float32"


class Weighted(nn.Module):
    """A linear layer in front, so that there is something to be half, and what breaks behind it."""

    def __init__(self, width: int = 16, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.normal_(self.linear.weight, std=scale / width**0.5)


class LargeWeight(nn.Module):
    """Two layers whose weights cancel: the first is large, or too large, and the second small."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16).clamp(-1, 1) * size)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        large = nn.functional.linear(x, self.weight)
        return self.last(large / 30000.0)


class Counter(nn.Module):
    """Which frames are odd: one too many, and the answer is the opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        frame = torch.ones_like(x[:, 0]).cumsum(0)
        odd = frame - 2 * torch.floor(frame / 2)
        return self.linear(x) * odd.unsqueeze(1)


class Sinusoids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("inverse_frequency", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[0], dtype=torch.float32)
        angles = position[:, None] * self.inverse_frequency[None, :]
        return self.linear(x) + torch.cat([angles.sin(), angles.cos()], -1)


class MaskedAttention(nn.Module):
    def __init__(self, lowest: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.lowest = lowest

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 4
        masked = scores + (1.0 - kept[:, None, :]) * self.lowest
        masked = masked - masked.amax(-1, keepdim=True)
        return torch.softmax(masked, -1) @ self.value(x)


class RootMeanSquare(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h / torch.sqrt((h * h).sum(-1, keepdim=True))


class SumOfOnes(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return (h * 0 + 1).sum() / 70000 + h[0, 0]


class MeanOfMany(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return torch.tanh(h).mean() + 3 * h.mean()


class VarianceOfLarge(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        shifted = h + 3000.0
        return shifted.var(-1)


class Exponential(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return torch.log(torch.exp(h + 12).sum(-1))


class Reciprocal(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return 1.0 / (h.abs() * 1e-5 + 1e-6)


class LengthMean(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        length = torch.full((1,), 1.0) * h.shape[0]
        return h.cumsum(0)[-1] / length


class TinyLogarithm(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return torch.log(torch.softmax(h, -1) * 1e-3)


class ThereAndBack(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        small = h * 1e-8
        return small / 1e-8


class SmallNorms(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        small = h * 1e-3
        energy = (small * small).sum(-1)
        return (small[:, :8] * small[:, 8:]).sum(-1) / energy


class RunningSum(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h.abs().cumsum(0)


class Normalized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def _rows(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale + shift,)

    return make


def _masked() -> tuple[Tensor, ...]:
    x = _rows(2, 6, 16)()[0]
    kept = torch.ones(2, 6)
    kept[0, 3:] = 0
    kept[1] = 0  # a row without any key, as padding has: all scores are as low
    return x, kept


BATCH = {"x": {0: "batch"}}

CORPUS: tuple[Case, ...] = (
    Case("rms norm of large values", lambda: RootMeanSquare(scale=400.0), _rows(4, 16), ("mul",), "h * h", BATCH),
    Case("mask of -1e9", lambda: MaskedAttention(-1e9), _masked, ("mul", "add"), "self.lowest"),
    Case("mask of the lowest float", lambda: MaskedAttention(FLOAT_LOWEST), _masked, ("mul", "add"), "self.lowest"),
    Case("weight of 3e4", lambda: LargeWeight(3e4), _rows(4, 16, scale=2.0), ("linear",), "self.weight", BATCH),
    Case("weight of 1e5", lambda: LargeWeight(1e5), _rows(4, 16), ("linear",), "self.weight", BATCH),
    Case("sum of 70,000 ones", lambda: SumOfOnes(10), _rows(7000, 10), ("sum",), ".sum()"),
    Case(
        "mean of 70,000 values", lambda: MeanOfMany(10), _rows(7000, 10, shift=5.0), ("mean",), "h.mean()", None, "half"
    ),
    Case("variance of a large mean", VarianceOfLarge, _rows(4, 16), ("add", "var"), "h + 3000", BATCH),
    Case("exponential of 12", Exponential, _rows(4, 16), ("exp",), "torch.exp", BATCH),
    Case("reciprocal near 0", Reciprocal, _rows(4, 16), ("reciprocal",), "1.0 /", BATCH),
    Case("eps of 1e-12", Normalized, _rows(4, 16, scale=1e-6), ("add",), "1e-12", BATCH),
    Case("frame counter", Counter, _rows(4100, 4), ("cumsum",), "cumsum", BATCH),
    Case("length of a dynamic size", LengthMean, _rows(5000, 16, shift=20.0), ("cumsum",), "cumsum", BATCH),
    Case("sinusoids at 4,096", Sinusoids, _rows(4100, 8), ("arange",), "torch.arange", BATCH),
    Case("logarithm of tiny numbers", lambda: TinyLogarithm(scale=9.0), _rows(4, 16), ("log",), "torch.log", BATCH),
    Case("there and back by 1e-8", ThereAndBack, _rows(4, 16), ("mul", "div"), "1e-8", BATCH),
    Case("cosine of small norms", SmallNorms, _rows(4, 16, scale=0.1), ("mul",), "small * small", BATCH),
    Case("running sum", RunningSum, _rows(20000, 16, scale=8.0), ("cumsum",), "cumsum(0)", BATCH),
)  # fmt: skip
