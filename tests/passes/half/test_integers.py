"""Which floats are whole numbers, and how large they can get."""

import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes.half.integers import exact_limit, whole_numbers
from tests.passes.half.nets import graph_of

X = torch.randn(6, 4)


def bound_of(function, *inputs, dynamic=None) -> float | None:
    """Return the bound of what a function returns, or None if it may not be whole."""
    gm = fxopt.capture(function, inputs or (X,), dynamic_shapes=dynamic)
    known = whole_numbers(gm).get(gm.graph.output_node().args[0][0])
    return None if known is None else known.bound


def test_the_limits_are_those_of_the_significands():
    assert (exact_limit(torch.float16), exact_limit(torch.bfloat16)) == (2048, 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_holds_every_whole_number_up_to_the_limit_and_skips_the_next(dtype):
    numbers = torch.arange(exact_limit(dtype) + 1, dtype=torch.float32)
    assert torch.equal(numbers.to(dtype).float(), numbers)
    assert float(torch.tensor(exact_limit(dtype) + 1.0).to(dtype)) != exact_limit(dtype) + 1


@pytest.mark.parametrize(
    ("function", "bound"),
    [
        (lambda x: (x > 0).float(), 1),
        (lambda x: (x > 0).float().sum(), 24),
        (lambda x: (x > 0).float().sum(0), 6),
        (lambda x: (x > 0).float().cumsum(1), 4),
        (lambda x: 1.0 - (x > 0).float(), 2),
        (lambda x: (x > 0).float() * 100, 100),
        (lambda x: torch.arange(5000, dtype=torch.float32) + 0 * x.sum().floor(), 5000),
        (lambda x: torch.arange(5000, dtype=torch.float32).reshape(50, 100)[0], 5000),
        (lambda x: torch.ones_like(x).cumsum(0).cumsum(0), 36),
        (lambda x: torch.floor(x), math.inf),
        (lambda x: (x > 0).float() ** 3, 1),
        (lambda x: torch.where(x > 0, 3.0, 2.0), 3),
        (lambda x: x + 1, None),
        (lambda x: (x > 0).float() / 3, None),
        (lambda x: (x > 0).float() + 0.5, None),
    ],
)
def test_bounds_follow_from_the_operators(function, bound):
    found = bound_of(function)
    assert found == bound


def test_a_length_is_as_large_as_its_dimension():
    def length(x):
        return torch.full((1,), 1.0) * x.shape[0]

    assert bound_of(length, X, dynamic={"x": {0: "n<=900"}}) == 900
    assert bound_of(length, X, dynamic={"x": {0: "n"}}) == math.inf


def test_inputs_of_integers_may_be_any_size():
    assert bound_of(lambda x: x.float(), torch.tensor([1, 2])) == math.inf


def test_inputs_of_bytes_are_bounded():
    assert bound_of(lambda x: x.float(), torch.tensor([1, 2], dtype=torch.uint8)) == 255


def test_a_mask_stays_one_inside_a_branch():
    class Masked(nn.Module):
        def forward(self, x):
            mask = (x > 0).float()
            if x.sum() > 0:
                y = mask * 2
            else:
                y = mask * 3
            return y

    gm = graph_of(Masked(), X)
    found = {node.name: known.bound for node, known in whole_numbers(gm).items() if node.graph is not gm.graph}
    assert {2.0, 3.0} <= set(found.values())
