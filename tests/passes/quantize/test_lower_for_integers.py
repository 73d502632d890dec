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


class Pooled(torch.nn.Module):
    """A convolution, pools, and something behind them."""

    def __init__(self, behind, pool=lambda x: F.max_pool2d(x, 2), more=False):
        super().__init__()
        self.conv, self.behind, self.pool, self.more = torch.nn.Conv2d(3, 4, 1), behind, pool, more

    def forward(self, x):
        y = self.conv(x)
        found = self.behind(self.pool(y))
        return (found, y) if self.more else found


@pytest.mark.parametrize("behind", [
    F.relu, F.relu6, lambda x: x.clamp(-0.1, 0.2), lambda x: x.clamp_max(0.1),
], ids=["relu", "relu6", "clamp", "clamp_max"])  # fmt: skip
@pytest.mark.parametrize("pool", [
    lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(F.max_pool2d(x, 3, 1, 1), 2),
], ids=["pool", "pools"])  # fmt: skip
def test_limits_go_before_pools_of_a_convolution(behind, pool):
    found = check_pass(LowerForIntegers(), Pooled(behind, pool), X).gm
    nodes = [node for node in found.graph.nodes if node.op == "call_function"]
    assert nodes[0].target is aten.conv2d.default
    assert nodes[1].target is not aten.max_pool2d.default
    assert {node.target for node in nodes[2:]} == {aten.max_pool2d.default}
    with torch.no_grad():
        assert torch.equal(found.eval()(X), in_eager(found, behind, pool))


def in_eager(gm, behind, pool):
    return behind(pool(F.conv2d(X, gm.get_parameter("conv.weight"), gm.get_parameter("conv.bias"))))


@pytest.mark.parametrize("net", [
    Pooled(F.gelu), Pooled(F.relu, lambda x: F.avg_pool2d(x, 2)), Pooled(F.relu, more=True),
    Pooled(lambda x: (F.relu(x), x.neg())), Pooled(lambda x: x.clamp(max=x.mean())),
], ids=["gelu", "mean", "convolution read twice", "pool read twice", "computed limit"])  # fmt: skip
def test_others_stay_behind_pools(net):
    assert not check_pass(LowerForIntegers(), net, X).modified
