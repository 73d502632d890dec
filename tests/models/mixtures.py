"""Mixtures of experts whose tokens are sorted by expert, so that each expert is one product of a group of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxopt.grouped_ops import GROUPED_MM


class SortedExperts(nn.Module):
    """Two layers an expert; ``by_rows`` has the outputs of a matrix in its rows. f32[tokens, width] to the same."""

    def __init__(self, *, experts: int = 4, width: int = 32, by_rows: bool = True) -> None:
        super().__init__()
        self.by_rows = by_rows
        self.router = nn.Linear(width, experts, bias=False)
        shapes = (experts, 2 * width, width), (experts, width, 2 * width)
        self.up, self.down = (
            nn.Parameter(torch.randn(shape if by_rows else (shape[0], shape[2], shape[1])) * width**-0.5)
            for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = torch.topk(self.router(x).softmax(-1), 2)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.histc(chosen.float(), len(self.up), 0, len(self.up) - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        hidden = self._product(x[order // 2], self.up, offsets).relu()
        each = self._product(hidden, self.down, offsets) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // 2, each)

    def _product(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return GROUPED_MM(x, weight.transpose(-2, -1) if self.by_rows else weight, offsets)
