"""Products of groups of rows: against the formula in float64, against each group by itself, and their gradients."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.grouped_ops import GROUPED_MM, JOIN_GROUPS, SPLIT_GROUPS, as_grouped_mm


def by_formula(x: np.ndarray, weight: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return f64[rows, n]: each row times the first matrix whose group ends behind it, 0 if none does."""
    groups = np.searchsorted(offsets, np.arange(len(x)), side="right")
    padded = np.concatenate([weight, np.zeros_like(weight[:1])]).astype(np.float64)
    return np.einsum("rk,rkn->rn", x.astype(np.float64), padded[groups])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 3), st.sampled_from(["int32", "int64"]))
def test_rows_are_multiplied_by_the_matrix_of_their_group(sizes: list[int], left: int, dtype: str) -> None:
    rows, groups = sum(sizes) + left, len(sizes)
    x, weight = torch.randn(rows, 7), torch.randn(groups, 7, 3)
    offsets = torch.tensor(sizes).cumsum(0).to(getattr(torch, dtype))
    found = GROUPED_MM(x, weight, offsets)
    np.testing.assert_allclose(found, by_formula(x.numpy(), weight.numpy(), offsets.numpy()), rtol=1e-5, atol=1e-5)
    if left:
        assert not found[-left:].any()


def test_gradients_are_those_of_each_product() -> None:
    operands = torch.randn(8, 5, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    x, weight = (operand.requires_grad_() for operand in operands)
    assert torch.autograd.gradcheck(lambda a, b: GROUPED_MM(a, b, torch.tensor([2, 2, 7])), (x, weight))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 3))
def test_groups_that_are_split_and_joined_are_the_rows_that_they_were(sizes: list[int], left: int) -> None:
    x, offsets = torch.randn(sum(sizes) + left, 3), torch.tensor(sizes).cumsum(0)
    parts = SPLIT_GROUPS(x, offsets)
    assert [len(part) for part in parts] == sizes
    joined = JOIN_GROUPS(parts, len(x))
    assert torch.equal(joined[: sum(sizes)], x[: sum(sizes)])
    assert not joined[sum(sizes) :].any()


def test_gradients_go_through_splitting_and_joining() -> None:
    x, offsets = torch.randn(8, 3, dtype=torch.float64, requires_grad=True), torch.tensor([2, 2, 7])

    def function(x: Tensor) -> Tensor:
        first, second, third = SPLIT_GROUPS(x, offsets)
        joined: Tensor = JOIN_GROUPS([first * 2, second, third.sin()], 8)
        return joined

    assert torch.autograd.gradcheck(function, (x,))


@pytest.mark.parametrize(
    "shapes",
    [((4, 5), (3, 6, 2), (3,)), ((4, 5), (3, 5, 2), (2,)), ((4, 5, 1), (3, 5, 2), (3,))],
    ids=["other width", "other number of groups", "three axes"],
)
def test_operands_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, weight, ends = shapes
    with pytest.raises(RuntimeError):
        GROUPED_MM(
            torch.ones(x, device="meta"),
            torch.ones(weight, device="meta"),
            torch.ones(ends, device="meta", dtype=torch.int32),
        )


class Foreign(nn.Module):
    """A layer that calls an operator of a library that computes the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight.transpose(-2, -1), offsets)


@pytest.mark.zoo
def test_an_operator_of_another_library_becomes_the_same_of_fxopt() -> None:
    import transformers.integrations.moe

    assert transformers.integrations.moe.__name__ in sys.modules
    foreign = torch.ops.transformers.grouped_mm_fallback.default
    assert as_grouped_mm(foreign) is GROUPED_MM
    model, x, offsets = Foreign(), torch.randn(6, 5), torch.tensor([2, 2, 6], dtype=torch.int32)
    gm = fxopt.capture(model, (x, offsets), dynamic_shapes=({0: "rows"}, None))
    assert [node.target for node in gm.graph.nodes if "grouped" in str(node.target)] == [GROUPED_MM]
    assert torch.equal(gm(x, offsets), model(x, offsets))
    wanted = torch.autograd.grad(model(x, offsets).square().sum(), model.weight)
    torch.testing.assert_close(torch.autograd.grad(gm(x, offsets).square().sum(), gm.weight), wanted)
