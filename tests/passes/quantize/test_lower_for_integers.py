"""Operators that become such as have integer kernels, and those that stay."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes import LowerForIntegers
from fxopt.testing import check_pass

X = torch.randn(2, 3, 5, 7)
aten = torch.ops.aten


@pytest.mark.parametrize(("fn", "targets"), [
    (F.silu, [aten.sigmoid.default, aten.mul.Tensor]),
    (F.hardswish, [aten.hardsigmoid.default, aten.mul.Tensor]),
    (lambda x: x.chunk(3, 1), [aten.slice.Tensor] * 3),
    (lambda x: x.split(3, -1), [aten.slice.Tensor] * 3),
    (lambda x: x.permute(0, 1, 3, 2).split([4, 3], 2), [aten.permute.default] + [aten.slice.Tensor] * 2),
    (lambda x: x.mean((2, 3)), [aten.adaptive_avg_pool2d.default, aten.flatten.using_ints]),
    (lambda x: x.mean((-1, -2), keepdim=True), [aten.adaptive_avg_pool2d.default]),
    (lambda x: x.mean(3).mean(2), [aten.adaptive_avg_pool2d.default, aten.flatten.using_ints]),
    (lambda x: x.mean(2).mean(2), [aten.adaptive_avg_pool2d.default, aten.flatten.using_ints]),
], ids=[
    "silu", "hardswish", "chunk", "split", "split with sizes", "mean", "mean with axes kept", "mean of mean",
    "mean of mean, the other way",
])  # fmt: skip
def test_operators_with_integer_kernels_take_over(fn, targets):
    gm = check_pass(LowerForIntegers(), fn, X).gm
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == targets


@pytest.mark.parametrize("fn", [
    lambda x: x.mean(1), lambda x: x.mean((1, 2)), lambda x: x.mean((2, 3), dtype=torch.float64), lambda x: x.mean(),
    lambda x: x.mean(3, keepdim=True).mean(2), lambda x: x.mean(1).mean(1), lambda x: (y := x.mean(3), y.mean(2)),
], ids=["channels", "not both", "other type", "all", "kept between", "not the image", "read twice"])  # fmt: skip
def test_other_means_stay(fn):
    assert not check_pass(LowerForIntegers(), fn, X).modified


def test_other_types_stay():
    why = "torch.float64 is not float32"
    assert not check_pass(LowerForIntegers(), F.silu, X.double(), skips=[why]).modified


def test_parts_of_the_result_of_a_linear_layer_stay():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(7, 6)

        def forward(self, x):
            return self.linear(x).reshape(2, 15, 6).chunk(3, -1)

    assert not check_pass(LowerForIntegers(), Net(), X).modified
