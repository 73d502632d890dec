"""The type in which an output was rounded, where it is stored in another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import to_onnx, validate
from fxopt.rounding_units import rounding_units

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.float32, torch.float64)}


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x: x.sum().double(), torch.float32),
        (lambda x: torch.stack([x.sum().double(), x.double().sum()]), torch.float32),
        (lambda x: x.sin().double() * 2.5, torch.float32),
        (lambda x: x.double().sin(), torch.float64),
        (lambda x: x.double().sin().float(), torch.float32),
        (lambda x: x.sin().half().float(), torch.float16),
        (lambda x: x.half().sin()[:, 0].relu().float(), torch.float16),
        (lambda x: x.half().float().mean(), torch.float32),
        (lambda x: x[0], None),
        (lambda x: (x > 0).sum(), None),
    ],
)
def test_the_coarsest_type_that_rounded(function: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> None:
    gm = fxopt.capture(function, (torch.randn(3, 4),))
    assert rounding_units(gm) == [0.0 if dtype is None else EPS[dtype]]


def test_outputs_are_told_apart():
    gm = fxopt.capture(lambda x: {"a": x.sin().double(), "b": (x, x.double().sin())}, (torch.randn(3),))
    assert rounding_units(gm) == [EPS[torch.float32], 0.0, EPS[torch.float64]]


@pytest.mark.ort
@pytest.mark.parametrize("seed", range(8))
def test_sums_of_float32_that_are_returned_as_float64_may_differ_by_their_own_rounding(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30))
    to_onnx(fxopt.capture(lambda x: net(x).sum().double(), (torch.randn(4, 30),), modes="current"))


@pytest.mark.ort
def test_a_wrong_float64_output_is_still_found():
    gm = fxopt.capture(lambda x: x.sin().sum().double(), (torch.randn(4, 3),))
    file = to_onnx(gm)
    (sine,) = [node for node in file.model.graph if node.op_type == "Sin"]
    sine.op_type = "Tanh"
    with pytest.raises(fxopt.NumericsError):
        validate(file.to_bytes(), gm)
