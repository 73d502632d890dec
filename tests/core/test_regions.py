"""Writes inside ``torch.no_grad()``: a buffer may be written, a value that gradients flow through may not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxopt


class RunningAverage(nn.Module):
    """Keeps an average of what it sees, and a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            view = self.mean[:2]
            view += 1
        return x * self.table - self.mean


def test_buffer_written_without_gradients_follows_eager() -> None:
    model = RunningAverage()
    gm = fxopt.capture(copy.deepcopy(model), torch.randn(3, 4), dynamic_shapes=({0: "batch"},))
    for seed in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(gm(x), model(x))
    assert torch.equal(gm.mean, model.mean)


def test_unsaved_buffer_stays_unsaved() -> None:
    model = RunningAverage()
    gm = fxopt.capture(model, torch.randn(3, 4))
    gm.load_state_dict(model.state_dict(), strict=True)
    assert list(gm.state_dict()) == ["mean"]


def test_hidden_write_into_a_differentiable_value_is_refused() -> None:
    class HiddenWrite(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            with torch.no_grad():
                y[:, 0] = 1
            return y

    with pytest.raises(fxopt.CaptureError, match="writes without gradients into 'mul'") as caught:
        fxopt.capture(HiddenWrite(), torch.randn(3, 4))
    assert "test_regions.py" in str(caught.value)
    assert "y[:, 0] = 1" in str(caught.value)
