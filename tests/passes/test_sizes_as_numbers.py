"""Sizes of the inputs where an operator takes a number: every pass and every translation knows that they are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.export import to_onnx
from fxopt.passes import Prune, Quantize

NUMBERS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "add": lambda y, n: y + n,
    "add_alpha": lambda y, n: torch.add(y, y.flip(0), alpha=n),
    "add_number_alpha": lambda y, n: torch.add(y, 3.0, alpha=n),
    "addcmul": lambda y, n: torch.addcmul(y, y, y, value=n),
    "addmm": lambda y, n: torch.addmm(y[0, 0], y[0, 1], y[0, 2].t(), beta=n, alpha=1 / n),
    "affine_gate": lambda y, n: y * (y + 3).clamp(0, n) / n,
    "celu": lambda y, n: F.celu(y, n),
    "clamp": lambda y, n: y.clamp(-n, n),
    "clamp_min": lambda y, n: y.clamp(min=1 / n),
    "div": lambda y, n: y / n,
    "elu": lambda y, n: F.elu(y, n),
    "floor_divide": lambda y, n: y // n,
    "hard_gate": lambda y, n: (y + n).clamp(0, 6) / 6,
    "integers": lambda y, n: (y > 0).sum(1) * n - n,
    "leaky_relu": lambda y, n: F.leaky_relu(y, 1 / n),
    "lerp": lambda y, n: torch.lerp(y, y.flip(0), 1 / n),
    "linspace": lambda y, n: y * torch.linspace(-1, 1, n) + torch.linspace(0.5, n - 0.5, n)[:, None] / n,
    "masked_fill": lambda y, n: y.masked_fill(y > 0, n),
    "mish": lambda y, n: y * torch.tanh(F.softplus(y, 1, n)),
    "mul": lambda y, n: y * n,
    "pow": lambda y, n: (y.abs() + 0.1) ** (1 / n),
    "remainder": lambda y, n: y % n,
    "rms_norm": lambda y, n: y * torch.rsqrt(y.pow(2).sum(1, keepdim=True) / n + 1e-5),
    "rsub": lambda y, n: n - y,
    "rsub_alpha": lambda y, n: torch.rsub(y, 2.0, alpha=n),
    "silu": lambda y, n: y * torch.sigmoid(n * y),
    "softmax": lambda y, n: torch.softmax(y.flatten(2) @ y.flatten(2).transpose(1, 2) / n**0.5, -1),
    "softplus": lambda y, n: F.softplus(y, n),
    "sub": lambda y, n: y - n,
    "threshold": lambda y, n: F.threshold(y, 1 / n, n),
    "where": lambda y, n: torch.where(y > 0, y, n),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> list[Tensor]:
        n, y = x.shape[3], self.stem(x)
        return [function(self.layer(y.relu() + 1 / n), n) for function in NUMBERS.values()]


@pytest.fixture(scope="module")
def net() -> fxopt.CapturedModule:
    torch.manual_seed(0)
    axes = {0: "batch", 2: "side", 3: "side"}
    return fxopt.capture(Net().eval(), (torch.randn(2, 3, 6, 6),), dynamic_shapes=(axes,), modes="current")


@pytest.mark.ort
@pytest.mark.parametrize(
    "passes",
    [
        None,
        ["cast-half"],
        [Quantize(recipe="fast")],
        ["quantize-dynamic"],
        *(pytest.param(passes, marks=pytest.mark.slow) for passes in (["compose-layers"], ["quantize-weights"])),
        [Prune(0.5)],
    ],
    ids=lambda passes: "default" if passes is None else getattr(passes[0], "name", passes[0]),
)
def test_no_pass_takes_a_size_for_a_number(passes: Any, net: fxopt.CapturedModule) -> None:
    samples = [(torch.randn(2, 3, side, side),) for side in (4, 6, 6, 8)]
    optimized = fxopt.optimize(net, passes, calibration=samples, strict=True)
    to_onnx(optimized)  # compares all outputs, also at other sizes
