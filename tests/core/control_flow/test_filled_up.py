"""Code that fills up or cuts a dynamic size: the size stays dynamic, and is the one that eager has for every value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxopt
from fxopt.errors import CaptureError
from fxopt.export import to_onnx
from tests.models.filled_up import ROWS, FilledAndCut, FilledInABranch, Map, Rows

SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 40)


def runs_as_eager(model: torch.nn.Module, gm: fxopt.CapturedModule, path: Path, inputs: list[Tensor]) -> None:
    to_onnx(gm, path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in inputs:
        want = model(x)
        torch.testing.assert_close(gm(x), want)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_rows_of_every_number_come_out_as_in_eager(kind: type[Rows], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    gm = fxopt.capture(model, (torch.randn(2, 11, 4),), dynamic_shapes=({0: "batch", 1: "n"},))
    runs_as_eager(model, gm, tmp_path / "rows.onnx", [torch.randn(3, n, 4) for n in SIZES])


def test_two_sizes_decide_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Map().eval()
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    gm = fxopt.capture(model, (torch.randn(2, 3, 9, 10),), dynamic_shapes=shapes)
    sizes = [(9, 10), (8, 8), (8, 9), (9, 8), (1, 1), (1, 4), (4, 1), (13, 12), (3, 20)]
    runs_as_eager(model, gm, tmp_path / "map.onnx", [torch.randn(3, 3, *size) for size in sizes])


@pytest.mark.parametrize("kind", [FilledAndCut, FilledInABranch], ids=lambda kind: kind.__name__)
def test_gradients_go_through_what_is_filled_up(kind: type[Rows]) -> None:
    torch.manual_seed(0)
    model = kind()
    gm = fxopt.capture(model, (torch.randn(2, 11, 4),), dynamic_shapes=({0: "batch", 1: "n"},))
    for n in (3, 8):
        x = torch.rand(2, n, 4, requires_grad=True)
        (want,) = torch.autograd.grad(model(x).square().sum(), x)
        (got,) = torch.autograd.grad(gm(x).square().sum(), x)
        torch.testing.assert_close(got, want)


def test_a_net_that_fills_up_is_quantized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = fxopt.capture(FilledAndCut().eval(), (torch.randn(2, 11, 4),), dynamic_shapes=({0: "batch", 1: "n"},))
    small = fxopt.optimize(gm, passes=["quantize"], calibration=[torch.randn(2, n, 4) for n in (3, 8, 16)])
    assert "undone" not in str(small.report)
    to_onnx(small, tmp_path / "rows.onnx")


class OneMoreIfOdd(Rows):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 8 == 1:
            x = F.pad(x, (0, 0, 0, 1))
        return self.linear(x)


class OneMoreIfPositive(Rows):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = F.pad(x, (0, 0, 0, 1))
        return self.linear(x)


@pytest.mark.parametrize("kind", [OneMoreIfOdd, OneMoreIfPositive], ids=lambda kind: kind.__name__)
def test_sides_that_differ_where_one_of_them_runs_are_refused(kind: type[Rows]) -> None:
    with pytest.raises(CaptureError, match=r"cannot become one value: 'x' is .* on one side and .* on the other"):
        fxopt.capture(kind().eval(), (torch.randn(2, 11, 4),), dynamic_shapes=({0: "batch", 1: "n"},))


class OtherwiseForOneRow(Rows):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = self.in_chunks(F.pad(x, (0, 0, 0, (8 - n % 8) % 8)))[:, :n]
        return x + 1 if n == 1 else x


def test_a_single_row_that_the_model_treats_apart_is_a_branch() -> None:
    model, x = OtherwiseForOneRow().eval(), torch.randn(2, 11, 4)
    for dimension, least, branches in (("n", 1, True), ("2<=n", 2, False)):
        gm = fxopt.capture(model, (x,), dynamic_shapes=({0: "batch", 1: dimension},))
        assert any("cond" in str(node.target) for node in gm.graph.nodes) is branches
        for n in range(least, 11):
            torch.testing.assert_close(gm(x[:, :n]), model(x[:, :n]))
