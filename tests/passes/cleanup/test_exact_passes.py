"""The passes that may not change a bit: what they do, what they refuse and why, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nan, nn

import fxopt
from fxopt.passes import (
    FoldConstants,
    FreezeMode,
    MergeCommonSubexpressions,
    RemoveDeadCode,
    RemoveIdentities,
    SimplifyAlgebra,
)
from fxopt.passes.cleanup.remove_identities import compose_permutations
from fxopt.passes.cleanup.simplify_algebra import compose_bounds
from fxopt.testing import check_pass
from tests.models import NETS

X = torch.tensor([[-9.0, -1.5, 0.25], [2.5, 9.0, nan]])
Function = Callable[[torch.Tensor], Any]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone().relu(),
        lambda x: x.to(torch.float32) + 1,
        lambda x: x.view(2, 3) + 1,
        lambda x: x.permute(1, 0).permute(1, 0) + 1,
        lambda x: x.t().transpose(0, 1) + 1,
        lambda x: x[:, :] + 1,
        lambda x: x.contiguous() + 1,
        lambda x: x.expand(2, 3) + 1,
        lambda x: torch.nn.functional.pad(x, (0, 0)) + 1,
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False) + 1,
    ],
)
def test_identity_is_removed(function: Function) -> None:
    result = check_pass(RemoveIdentities(), function, X)
    assert sum(node.op == "call_function" for node in result.gm.graph.nodes) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.detach() + x,
        lambda x: x.to(torch.float64),
        lambda x: x.permute(1, 0) + 1,
        lambda x: x[:, 1:] + 1,
        lambda x: x.t().contiguous().view(-1),
        lambda x: torch.nn.functional.dropout(x, 0.5, training=True) * 1.5,
    ],
)
def test_what_only_looks_like_an_identity_stays(function: Function) -> None:
    assert not check_pass(RemoveIdentities(), function, X).modified


def test_dropout_stays_where_training_may_come() -> None:
    result = check_pass(
        RemoveIdentities(), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval(), torch.ones(2, 3),
        skips=["dropout is active while training"],
    )  # fmt: skip
    assert not result.modified


def test_permutations_are_joined() -> None:
    check_pass(
        RemoveIdentities(),
        lambda x: x.permute(1, 2, 0).permute(1, 2, 0),
        torch.randn(2, 3, 4),
        text="""
        %x : f32[2, 3, 4]
        %0 : f32[4, 2, 3] = aten.permute(%x, [2, 0, 1])
        return %0
        """,
    )


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_joined_permutation_equals_two(first: list[int], second: list[int]) -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(x.permute(compose_permutations(first, second)), x.permute(first).permute(second))


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x * 1, 0),
        (lambda x: x / 1.0, 0),
        (lambda x: x - 0, 0),
        (lambda x: x**1, 0),
        (lambda x: x.neg().neg(), 0),
        (lambda x: x.relu().relu(), 1),
        (lambda x: x.sigmoid().relu(), 1),
        (lambda x: x.abs().abs(), 1),
        (lambda x: x.clamp(0.0, 6.0).clamp(1.0, 9.0), 1),
        (lambda x: torch.where(x > 0, x, x), 0),
    ],
)
def test_arithmetic_without_consequence_is_removed(function: Function, left: int) -> None:
    result = check_pass(SimplifyAlgebra(), lambda x: function(x.neg()).sin(), X)
    check = RemoveDeadCode()(result.gm).gm
    assert sum(node.op == "call_function" for node in check.graph.nodes) == left + 2


@pytest.mark.parametrize(
    ("function", "x", "why"),
    [
        (lambda x: x + 0.0, X, "x + 0 turns -0.0 into 0.0"),
        (lambda x: x / 1, torch.arange(3), "the element type changes to torch.float32"),
        (lambda x: x.clamp(0.0, 1.0).clamp(2.0, 3.0), X, "the bounds cross"),
        (lambda x: x.clamp(nan, 1.0).clamp(0.0), X, "a bound is symbolic or NaN"),
        (lambda x: (y := x.clamp(0.0), y.clamp(max=1.0)), X, "clamp has 2 users"),
        (lambda x: torch.where(torch.ones(4, 1, 1) > 0, x, x), X, "the condition broadcasts the value"),
    ],
)
def test_algebra_leaves_alone_and_says_why(function: Function, x: torch.Tensor, why: str) -> None:
    assert not check_pass(SimplifyAlgebra(), function, x, skips=[why]).modified


BOUND = st.none() | st.sampled_from([-3.0, -1.0, 0.0, 1.0, 2.5, float("inf"), -float("inf")])


@given(
    st.tuples(BOUND, BOUND), st.tuples(BOUND, BOUND), st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
)
def test_one_clamp_equals_two(first: Any, second: Any, dtype: torch.dtype) -> None:
    def clamp(x: torch.Tensor, bounds: Any) -> torch.Tensor:
        return x if bounds == (None, None) else torch.clamp(x, *bounds)

    x = torch.tensor([-9.0, -1.5, -0.0, 0.25, 2.5, 9.0, nan, float("inf")]).to(dtype)
    joined = compose_bounds(first, second)
    own_order = all(a is None or b is None or a <= b for a, b in (first, second))
    if joined is not None and own_order:
        assert torch.equal(clamp(x, joined).nan_to_num(7), clamp(clamp(x, first), second).nan_to_num(7))


def test_constants_are_folded_and_parameters_are_not() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(3, 2))
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table.t().exp().t() + x @ self.weight.exp()

    result = check_pass(FoldConstants(), Table(), torch.randn(2, 3), changes=1)
    assert [name for name, _ in result.gm.named_parameters()] == ["weight"]
    assert sum("exp" in str(node.target) for node in result.gm.graph.nodes) == 1
    everything = check_pass(FoldConstants(parameters=True), Table(), torch.randn(2, 3), changes=2)
    assert not list(everything.gm.named_parameters())


def test_written_buffer_is_no_constant() -> None:
    net = NETS["RunningMean"]()
    example = net.example()
    gm = fxopt.capture(net, fxopt.Sample(example.args, example.kwargs))
    check_pass(FoldConstants(), gm)


def test_a_large_result_stays_and_says_why() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(1).expand(1000, 1000)

    result = check_pass(FoldConstants(max_growth_bytes=100), function, torch.ones(1000))
    assert result.skips
    assert all("would add" in skip.why for skip in result.skips)


def test_equal_values_are_computed_once_and_random_ones_are_not() -> None:
    result = check_pass(MergeCommonSubexpressions(), lambda x: x.relu() + x.relu(), X, changes=1)
    assert sum("relu" in str(node.target) for node in result.gm.graph.nodes) == 1
    assert not check_pass(MergeCommonSubexpressions(), lambda x: torch.rand_like(x) + torch.rand_like(x), X).modified


def test_one_and_true_and_minus_zero_are_different_arguments() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.div(0.0), x.div(-0.0), x + 1, x + 1.0, x + True

    x = torch.tensor([1, 2, 3])
    assert not check_pass(MergeCommonSubexpressions(), function, x).modified


def test_dead_code_goes_but_not_in_front_of_a_random_call() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x)
        x.sin()
        return torch.rand_like(x)

    result = check_pass(
        RemoveDeadCode(), function, X, skips=["a random call comes later, and would draw other numbers"], changes=1
    )
    assert sum("rand" in str(node.target) for node in result.gm.graph.nodes) == 2


def test_unread_parameters_go() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unread = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    result = check_pass(RemoveDeadCode(), Unread(), torch.ones(1, 3))
    assert list(result.gm.state_dict()) == ["used.weight", "used.bias"]


def test_frozen_graph_has_no_other_mode() -> None:
    net = NETS["StochasticDepth"]().eval()
    example = net.example()
    gm = fxopt.capture(net, fxopt.Sample(example.args, example.kwargs), dynamic_shapes=example.dynamic_shapes)
    result = FreezeMode()(gm)
    assert not any("modes" in node.meta for node in result.gm.graph.nodes)
    with pytest.raises(fxopt.ModeError, match="eval mode only"):
        result.gm.train()
    assert torch.equal(result.gm(*example.args), gm(*example.args))


# Noise draws in a way that no seed fixes; eager SliceWriter has no backward; Residual's momentum=None reads a counter
# as a Python number while training.
@pytest.mark.parametrize("name", sorted(set(NETS) - {"Noise", "Residual", "SliceWriter"}))
def test_training_after_the_default_passes_equals_eager(name: str) -> None:
    """In train mode the default list is exact: gradients, buffers and outputs agree bit for bit."""
    torch.manual_seed(1)
    net = NETS[name]().train()
    example = net.example()
    sample = fxopt.Sample(example.args, example.kwargs)
    gm = fxopt.optimize(net, None, sample, dynamic_shapes=example.dynamic_shapes, check="off")
    results = []
    for module in (gm, net):
        start = {key: item.clone() for key, item in net.state_dict().items()}
        torch.manual_seed(5)
        copy = sample.clone()
        leaves = torch.utils._pytree.tree_leaves(module(*copy.args, **copy.kwargs))
        loss = sum(leaf.double().square().sum() for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad)
        grads = {}
        if torch.is_tensor(loss):
            loss.backward()
            grads = {id(p): p.grad.clone() for p in module.parameters() if p.grad is not None}
        module.zero_grad()
        buffers = {key: item.clone() for key, item in net.named_buffers()}
        results.append((leaves, grads, buffers))
        with torch.no_grad():
            for key, item in net.state_dict().items():
                item.copy_(start[key])
    (a, grads_a, buffers_a), (b, grads_b, buffers_b) = results
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True) if torch.is_tensor(p))
    assert grads_a.keys() == grads_b.keys()
    assert all(torch.equal(grads_a[key], grads_b[key]) for key in grads_a)
    assert all(torch.equal(buffers_a[key], buffers_b[key]) for key in buffers_a)
