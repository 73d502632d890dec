"""Nets that fill up or cut a dynamic size, as windows, chunks and limits make people write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ROWS", "Map", "Rows"]


class Rows(nn.Module):
    """Takes f32[batch, n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def in_chunks(self, x: Tensor) -> Tensor:
        """Mix the rows of each chunk of 8."""
        return self.linear(x).reshape(x.shape[0], -1, 8, 4).softmax(2).reshape(x.shape[0], -1, 4)


class AlwaysFilled(Rows):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return self.in_chunks(F.pad(x, (0, 0, 0, (8 - n % 8) % 8)))[:, :n]


class FilledAndCut(Rows):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        missing = (8 - n % 8) % 8
        if missing > 0:
            x = F.pad(x, (0, 0, 0, missing))
        x = self.in_chunks(x)
        if missing > 0:
            x = x[:, :n]
        return x


class FilledWithItsLength(Rows):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        missing, length = -n % 8, n
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
            length = n + missing
        return self.linear(x).view(x.shape[0], length // 8, 8, 4).mean(2) + length


class FilledUnless(Rows):
    def forward(self, x: Tensor) -> Tensor:
        rest = x.shape[1] % 8
        if not rest == 0:  # noqa: SIM201  (as people write it)
            x = F.pad(x, (0, 0, 0, 8 - rest))
        return self.linear(x).unflatten(1, (-1, 8)).amax(2)


class JoinedUnless(Rows):
    def forward(self, x: Tensor) -> Tensor:
        rest = x.shape[1] % 8
        if rest == 0:
            y = x
        else:
            y = torch.cat([x, x.new_zeros(x.shape[0], 8 - rest, 4)], 1)
        return self.linear(y).unflatten(1, (-1, 8)).amax(2)


class AtMost(Rows):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 8:
            x = x[:, :8]
        return self.linear(x)


class AtLeast(Rows):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 8:
            x = F.pad(x, (0, 0, 0, 8 - x.shape[1]))
        return self.linear(x)


class FilledInABranch(Rows):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        missing = (8 - n % 8) % 8
        if x.mean() > 0:
            if missing > 0:
                x = F.pad(x, (0, 0, 0, missing))
            x = self.in_chunks(x)
            if missing != 0:
                x = x[:, :n]
        return x


class FilledInADict(Rows):
    def forward(self, x: Tensor) -> Tensor:
        missing = (8 - x.shape[1] % 8) % 8
        held = {"x": x, "mask": x[:, :, 0]}
        if missing > 0:
            held["x"] = F.pad(x, (0, 0, 0, missing))
            held["mask"] = F.pad(held["mask"], (0, missing))
        return self.linear(held["x"]) * held["mask"].unsqueeze(-1)


ROWS: tuple[type[Rows], ...] = (
    AlwaysFilled, FilledAndCut, FilledWithItsLength, FilledUnless, JoinedUnless, AtMost, AtLeast, FilledInABranch,
    FilledInADict,
)  # fmt: skip


class Map(nn.Module):
    """Mixes the rows and columns of windows of 4 x 4 of f32[batch, 3, height, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        below, right = (4 - height % 4) % 4, (4 - width % 4) % 4
        x = self.conv(F.pad(x, (0, right, 0, below)))
        windows = x.view(len(x), 4, x.shape[2] // 4, 4, x.shape[3] // 4, 4)
        x = windows.softmax(3).softmax(5).reshape(x.shape)
        was_filled = below > 0 or right > 0
        if was_filled:
            x = x[:, :, :height, :width].contiguous()
        return x
