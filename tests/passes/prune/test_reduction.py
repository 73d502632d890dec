"""Reductions and pooling: sums lose zeros, means keep their divisor, and constants come out as they are computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.prune.nets import captured, net, shrink, shrunk

N = ({0: "batch"},)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda y: y.mean(1), lambda y: y.sum(1, keepdim=True), lambda y: y.mean((1, 2, 3)), lambda y: y.norm(dim=1),
        lambda y: torch.linalg.vector_norm(y, 3.0, dim=(1, 2)), lambda y: F.normalize(y, dim=1).sum(1),
    ],
    ids=["mean", "sum", "mean of all", "norm", "norm of order 3", "normalized"],
)  # fmt: skip
def test_zeros_go_from_sums_and_means(reduce):
    found = shrunk(net(lambda self, x: reduce(self.first(x)), first=nn.Conv2d(3, 8, 3)), images(), dynamic=N)
    assert found.shape("first.weight") == (4, 3, 3, 3)


@pytest.mark.parametrize("reduce", [lambda y: y.amax(1), lambda y: y.var(1), lambda y: y.softmax(1).sum(1)])
def test_zeros_stay_where_they_count(reduce):
    gm = captured(
        net(lambda self, x: reduce(self.first(x)) * x[:, 0, 0, 0, None, None], first=nn.Conv2d(3, 8, 3)), images()
    )
    with torch.no_grad():
        gm.get_parameter("first.weight")[2] = 0
        gm.get_parameter("first.bias")[2] = 0
    assert shrink(gm, images()).shape("first.weight") == (8, 3, 3, 3)


def constant_channel(middle, inputs=4):
    """A channel that is its bias throughout, in front of something, and a layer that reads the result."""

    def forward(self, x):
        return self.last(middle(self.first(x)))

    gm = captured(net(forward, first=nn.Conv2d(3, inputs, 1), last=nn.Conv2d(inputs, 2, 1)), images(), dynamic=N)
    with torch.no_grad():
        gm.get_parameter("first.weight")[1] = 0
    return gm


@pytest.mark.parametrize(
    "pool",
    [
        lambda y: F.avg_pool2d(y, 2), lambda y: F.avg_pool2d(y, 2, divisor_override=3), lambda y: F.max_pool2d(y, 2),
        lambda y: F.max_pool2d(y, 3, padding=1), lambda y: F.avg_pool2d(y, 3, padding=1),
        lambda y: F.avg_pool2d(y, 3, padding=1, count_include_pad=False), lambda y: F.adaptive_avg_pool2d(y, 2),
        lambda y: F.interpolate(y, scale_factor=2.0, mode="bilinear"),
    ],
)  # fmt: skip
def test_constant_channel_is_pooled_to_what_pooling_makes_of_it(pool):
    shrink(constant_channel(pool), images())


def test_constant_channel_behind_pooling_goes_into_the_next_bias():
    found = shrink(constant_channel(lambda y: F.max_pool2d(y, 2)), images())
    assert found.shape("first.weight") == (3, 3, 1, 1)


def test_places_of_the_largest_values_are_no_constants():
    gm = constant_channel(lambda y: F.max_pool2d(y, 2, return_indices=True)[1].float())
    with torch.no_grad():
        gm.get_parameter("first.bias")[1] = 0
    found = shrink(gm, images())
    assert found.shape("first.weight") == (4, 3, 1, 1)
