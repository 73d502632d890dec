"""Resampling, by size and by factor, up and down, all modes."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from fxopt.export import optimized_model
from tests.export.proof import prove, prove_each

pytestmark = pytest.mark.ort

SHAPES = {1: (3, 2, 7), 2: (3, 2, 5, 7), 3: (3, 2, 4, 5, 3)}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_interpolate(rank):
    linear, x = LINEAR[rank], torch.randn(SHAPES[rank])
    kinds = {
        "nearest": {"mode": "nearest"},
        "nearest-exact": {"mode": "nearest-exact"},
        "linear": {"mode": linear, "align_corners": False},
        "aligned": {"mode": linear, "align_corners": True},
    }
    sizes = ({"scale_factor": 2}, {"size": 9}, {"size": 3})
    every = itertools.product(kinds.items(), sizes)
    prove_each(
        {f"{name} {size}": (functools.partial(F.interpolate, **size, **kind), x) for (name, kind), size in every}
    )


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [{"scale_factor": 2}, {"size": (9, 4)}])
def test_bicubic(size, align_corners):
    prove(lambda x: F.interpolate(x, **size, mode="bicubic", align_corners=align_corners), torch.randn(SHAPES[2]))


@pytest.mark.parametrize("recompute", [True, False])
def test_a_fractional_factor(recompute):
    prove(
        lambda x: F.interpolate(
            x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=recompute, align_corners=False
        ),
        torch.randn(SHAPES[2]),
    )


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_to_a_size_between_transpositions_that_ort_moves_past_it(mode):
    def run(x):
        return F.interpolate(x.permute(0, 3, 1, 2).abs(), size=(9, 4), mode=mode).permute(0, 2, 3, 1)

    file = prove(run, torch.randn(3, 5, 7, 4))
    kept = [node.op_type for node in optimized_model(file.to_bytes()).graph].count("Transpose")
    assert kept == (2 if mode == "bicubic" else 0)  # a cubic kernel with channels last only enlarges


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(3, 4), (9, 9)])
def test_antialiased(mode, size):
    prove(lambda x: F.interpolate(x, size, mode=mode, antialias=True), torch.randn(SHAPES[2]))


@pytest.mark.parametrize(
    ("mode", "padding", "align_corners"),
    list(itertools.product(("bilinear", "nearest"), ("zeros", "border", "reflection"), (False, True))),
)
def test_grid_sample(mode, padding, align_corners):
    grid = torch.rand(3, 4, 6, 2) * 2.4 - 1.2
    prove(lambda x, g: F.grid_sample(x, g, mode, padding, align_corners), torch.randn(SHAPES[2]), grid)


def test_grid_sample_before_opset_20():
    prove(
        lambda x, g: F.grid_sample(x, g, align_corners=False), torch.randn(SHAPES[2]), torch.rand(3, 4, 6, 2), opset=18
    )


def test_affine_grid():
    prove(lambda t: F.affine_grid(t, (t.shape[0], 2, 4, 5), align_corners=False), torch.randn(3, 2, 3))
