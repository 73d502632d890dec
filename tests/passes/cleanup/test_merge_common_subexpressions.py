"""merge-common-subexpressions: what counts as equal, what only looks equal, and gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import inf, nan, nn

import fxopt
from fxopt.passes import MergeCommonSubexpressions
from fxopt.testing import check_pass

X = torch.tensor([[-9.0, -1.5, 0.25], [2.5, 9.0, nan]])


def count(gm: torch.fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in gm.graph.nodes)


def test_golden() -> None:
    check_pass(
        MergeCommonSubexpressions(),
        lambda x: x.relu() + x.relu(),
        X,
        text="""
        %x : f32[2, 3]
        %0 : f32[2, 3] = aten.relu(%x)
        %1 : f32[2, 3] = aten.add(%0, %0)
        return %1
        """,
    )


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: (x * 2).exp() - (x * 2).exp(), 3),
        (lambda x: x.sum(0, False) - x.sum(0), 2),
        (lambda x: ((x + x.sin()) * (x.sin() + x)).exp(), 4),
        (lambda x: x.max(0)[0] - x.max(0)[0], 2),
        (lambda x: torch.arange(3) * x - torch.arange(3) * x, 3),
    ],
)
def test_equal_values_are_computed_once(function: Callable[[torch.Tensor], Any], left: int) -> None:
    result = check_pass(MergeCommonSubexpressions(), function, X)
    called = [node for node in result.gm.graph.nodes if node.op == "call_function"]
    assert len([node for node in called if node.target is not operator.getitem]) == left


def test_arguments_of_other_types_are_other_arguments() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.div(0.0), x.div(-0.0), x + 1, x + 1.0, x + True, x.sum(0), x.sum(0, True)

    assert not check_pass(MergeCommonSubexpressions(), function, torch.tensor([1, 2, 3])).modified


def test_random_calls_stay_and_so_does_what_reads_them() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(x).sin() - torch.rand_like(x).sin()

    skips = ["it draws other random numbers than rand_like"]
    assert not check_pass(MergeCommonSubexpressions(), function, X, skips=skips).modified


class Equal(nn.Module):
    """Two buffers of the same bits, two of other bits or strides, and two equal parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor([[0.0, inf], [1.0, 2.0]]))
        self.register_buffer("b", self.a.clone())
        self.register_buffer("minus", torch.tensor([[-0.0, inf], [1.0, 2.0]]))
        self.register_buffer("turned", self.a.t().contiguous().t())
        self.p, self.q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a + x * self.b - x * self.minus + x * self.turned + self.p * self.q


def test_constants_of_equal_bits_are_one() -> None:
    result = check_pass(MergeCommonSubexpressions(), Equal().eval(), torch.randn(2, 2))
    assert sorted(result.gm.state_dict()) == ["a", "minus", "p", "q", "turned"]
    assert count(result.gm, "mul") == 4


class Statistics(nn.Module):
    """The same arithmetic on the running mean before and after the batch norm updates it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = self.norm.running_mean * 2
        y = self.norm(x)
        return y, before + 1, self.norm.running_mean * 2 + 1


def test_reads_of_a_written_buffer_stay_apart() -> None:
    skips = ["the graph writes what it and mul read"]
    result = check_pass(MergeCommonSubexpressions(), Statistics(), torch.randn(4, 3) + 5, skips=skips)
    _, before, after = result.gm(torch.randn(4, 3) + 5)
    assert not torch.equal(before, after)


def test_two_returned_values_stay_two() -> None:
    skips = ["it is returned beside add, in memory of its own"]
    result = check_pass(MergeCommonSubexpressions(), lambda x: (x + 1, x + 1), torch.ones(3), skips=skips)
    first, second = result.gm(torch.ones(3))
    first.zero_()
    assert torch.equal(second, torch.full((3,), 2.0))


def test_two_returned_casts_stay_two() -> None:
    result = check_pass(MergeCommonSubexpressions(), lambda x: (x.double(), x.double()), torch.ones(3))
    first, second = result.gm(torch.ones(3))
    first.zero_()
    assert second.sum() == 3


class Twice(nn.Module):
    """The same function of a parameter computed twice, and the same mask computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (self.weight * x).sin(), (self.weight * x).sin()
        return ((a * x).exp() * (x > 0) + b * 0.37 * (x > 0)).sum()


def test_gradients_are_summed_as_before_while_training() -> None:
    model, x = Twice().train(), torch.randn(50)
    result = check_pass(MergeCommonSubexpressions(), model, x, changes=1)
    assert count(result.gm, "gt") == 1
    assert {skip.why for skip in result.skips} == {
        "the gradients of it and mul would be summed in another order",
        "the gradients of it and sin would be summed in another order",
    }
    gradients = []
    for module in (model, result.gm):
        module.zero_grad()
        module(x).backward()
        gradients.append(model.weight.grad.clone())
    assert torch.equal(*gradients)


def test_everything_is_merged_for_evaluation() -> None:
    result = check_pass(MergeCommonSubexpressions(), Twice().eval(), torch.randn(50), skips=[])
    assert count(result.gm, "sin") == 1


def test_both_modes_count() -> None:
    class TwoDropouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.relu()
            return self.drop(y.exp()) + self.drop(y.exp())

    result = check_pass(MergeCommonSubexpressions(), TwoDropouts().eval(), X, changes=1)
    assert [skip.why for skip in result.skips] == ["it draws other random numbers than dropout"]
    assert count(result.gm, "dropout") == 2


def test_each_branch_is_its_own_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.exp() - x.exp() * 2, lambda x: x.exp(), (x,))

    result = check_pass(MergeCommonSubexpressions(), function, torch.ones(3), changes=1)
    assert "true_graph_0" in fxopt.graph_text(result.gm)
    assert {change.site for change in result.changes} == {"true_graph_0/exp_1"}


def test_one_site_alone_can_be_left_out() -> None:
    gm = fxopt.capture(lambda x: x.exp() - x.exp() + x.sin() - x.sin(), (X,))
    sites = {change.site for change in MergeCommonSubexpressions()(gm).changes}
    assert sites == {"exp_1", "sin_1"}
    only = MergeCommonSubexpressions()(gm, only=["sin_1"])
    assert (count(only.gm, "exp"), count(only.gm, "sin")) == (2, 1)


def test_a_scaled_sum_is_not_the_same_the_other_way_round() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.add(x, y, alpha=2).sin(), torch.add(y, x, alpha=2).cos(), torch.add(x, y, alpha=2).tan()

    result = check_pass(MergeCommonSubexpressions(), function, torch.randn(3), torch.randn(3), changes=1)
    assert sum("add" in str(node.target) for node in result.gm.graph.nodes) == 2
