"""remove-identities: what goes, what only looks as if it could, and why it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nan, nn

import fxopt
from fxopt.passes import RemoveIdentities
from fxopt.passes.cleanup.remove_identities import compose_permutations
from fxopt.testing import check_pass

X = torch.tensor([[-9.0, -1.5, 0.25], [2.5, 9.0, nan]])
Function = Callable[[torch.Tensor], Any]


def calls(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone().relu(),
        lambda x: x.to(torch.float32) + 1,
        lambda x: x.to("cpu") + 1,
        lambda x: x.type_as(x) + 1,
        lambda x: x.view(2, 3) + 1,
        lambda x: x.reshape(-1, 3) + 1,
        lambda x: x.view(6).view(2, 3) + 1,
        lambda x: x.unsqueeze(1).squeeze(1) + 1,
        lambda x: x.flatten().unflatten(0, (2, 3)) + 1,
        lambda x: x.permute(0, 1) + 1,
        lambda x: x.permute(1, 0).permute(1, 0) + 1,
        lambda x: x.t().transpose(0, 1) + 1,
        lambda x: x.swapaxes(0, 1).swapdims(0, 1) + 1,
        lambda x: x[:, :] + 1,
        lambda x: x[0:2] + 1,
        lambda x: x.narrow(1, 0, 3) + 1,
        lambda x: x.contiguous() + 1,
        lambda x: x.expand(2, 3) + 1,
        lambda x: x.expand(-1, -1) + 1,
        lambda x: x.repeat(1, 1) + 1,
        lambda x: torch.cat([x]) + 1,
        lambda x: F.pad(x, (0, 0)) + 1,
        lambda x: F.dropout(x, 0.5, training=False) + 1,
        lambda x: F.dropout(x, 0.0, training=True) + 1,
        lambda x: (x > 0).detach().logical_not(),
    ],
)
def test_identity_is_removed(function: Function) -> None:
    result = check_pass(RemoveIdentities(), function, X, skips=[])
    assert calls(result.gm)[-1] in ("aten.add.Tensor", "aten.relu.default", "aten.logical_not.default")
    assert len(calls(result.gm)) == (2 if "logical_not" in calls(result.gm)[-1] else 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.detach() + x,
        lambda x: x.to(torch.float64),
        lambda x: x.permute(1, 0) + 1,
        lambda x: x[:, 1:] + 1,
        lambda x: x[:, ::2] + 1,
        lambda x: x.t().contiguous().view(-1),
        lambda x: x.t().clone(memory_format=torch.contiguous_format).view(-1),
        lambda x: torch.cat([x, x]),
        lambda x: torch.stack([x]),
        lambda x: x.expand(4, 2, 3) + 1,
        lambda x: F.dropout(x, 0.5, training=True) * 1.5,
    ],
)
def test_what_only_looks_like_an_identity_stays(function: Function) -> None:
    assert not check_pass(RemoveIdentities(), function, X).modified


def test_dynamic_sizes_are_compared_as_expressions() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], 3)[:].reshape(-1, 3).relu()

    check_pass(
        RemoveIdentities(),
        function,
        X,
        dynamic_shapes=({0: "batch"},),
        text="""
        %x : f32[batch, 3]
        %0 : f32[batch, 3] = aten.relu(%x)
        return %0
        """,
    )


def test_dropout_stays_where_training_may_come() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval()
    skips = ["dropout is active while training"]
    assert not check_pass(RemoveIdentities(), model, torch.ones(2, 3), skips=skips).modified


def test_dropout_goes_once_the_mode_is_fixed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval()
    small = fxopt.optimize(model, "freeze-mode,remove-identities", torch.ones(2, 3))
    assert calls(small) == ["aten.linear.default"]


def test_dropout_of_nothing_goes_in_both_modes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0))
    assert calls(check_pass(RemoveIdentities(), model, torch.ones(2, 3)).gm) == ["aten.linear.default"]


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


def test_views_are_joined_where_the_elements_stay_in_place() -> None:
    check_pass(
        RemoveIdentities(),
        lambda x: x.view(6).view(3, 2).relu(),
        X,
        text="""
        %x : f32[2, 3]
        %0 : f32[3, 2] = aten.reshape(%x, [3, 2])
        %1 : f32[3, 2] = aten.relu(%0)
        return %1
        """,
    )
    # The copy that the first reshape makes fixes the order in which a reduction adds up.
    check_pass(
        RemoveIdentities(),
        lambda x: x.t().reshape(6).reshape(3, 2).sum(1),
        X,
        skips=["reshape copies into another order"],
    )


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_joined_permutation_equals_two(first: list[int], second: list[int]) -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(x.permute(compose_permutations(first, second)), x.permute(first).permute(second))


def test_a_copy_of_an_input_that_is_returned_stays() -> None:
    why = "it is returned, and must not share the memory of x, which is not the caller's to write"
    result = check_pass(RemoveIdentities(), lambda x: x.clone(), X, skips=[why])
    x = X.clone()
    result.gm(x).zero_()
    assert torch.equal(x.nan_to_num(), X.nan_to_num())


def test_a_copy_seen_through_a_view_stays_too() -> None:
    result = check_pass(RemoveIdentities(), lambda x: x.clone().t(), X)
    assert calls(result.gm) == ["aten.clone.default", "aten.t.default"]


def test_two_returned_copies_stay_two() -> None:
    result = check_pass(RemoveIdentities(), lambda x: ((y := x.relu()).clone(), y), X)
    assert [skip.why for skip in result.skips] == ["it is returned beside relu, in memory of its own"]
    assert not result.modified


class Counter(nn.Module):
    """Returns what the buffer was before it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.count.clone()
        self.count.add_(1)
        return x + self.count, before


def test_a_copy_of_a_written_buffer_stays() -> None:
    result = check_pass(RemoveIdentities(), Counter(), torch.ones(3), skips=["the graph writes the memory of count"])
    assert not result.modified


class Statistics(nn.Module):
    """Keeps the running mean from before the batch norm updates it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.norm.running_mean.clone()
        return self.norm(x), before + 1


def test_a_copy_of_running_statistics_stays() -> None:
    skips = ["the graph writes the memory of norm_running_mean"]
    result = check_pass(RemoveIdentities(), Statistics(), torch.randn(4, 3) + 5, skips=skips)
    assert torch.equal(result.gm(torch.randn(4, 3) + 5)[1], torch.ones(3))


def test_a_view_of_a_removed_copy_works_on_inputs_with_other_strides() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format).view(-1) + 1

    result = check_pass(RemoveIdentities(), function, torch.randn(2, 3))
    x = torch.randn(3, 2).t()
    assert torch.equal(result.gm(x), function(x))


class ThreeReaders(nn.Module):
    """A weight that is read directly and, by two more, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        late = self.weight[:]
        early = self.weight * x
        return (late * x.sin() + early * 0.37 + late.exp()).sum()


@pytest.mark.parametrize("training", [True, False])
def test_the_order_of_gradient_sums_is_kept_while_training(training: bool) -> None:
    x = torch.randn(50)
    model = ThreeReaders().train(training)
    result = check_pass(RemoveIdentities(), model, x)
    why = ["the gradient of weight would be summed in another order"]
    assert [skip.why for skip in result.skips] == (why if training else [])
    assert result.modified is not training
    if training:
        model(x).backward()
        want, model.weight.grad = model.weight.grad, None
        result.gm(x).backward()
        assert torch.equal(model.weight.grad, want)


@given(st.lists(st.sampled_from(["view", "t", "clone", "to", "slice", "cat", "pad", "expand"]), max_size=6))
def test_any_chain_gives_the_same_bits_and_strides(names: list[str]) -> None:
    steps: dict[str, Function] = {
        "view": lambda x: x.reshape(x.shape[1], x.shape[0]), "t": torch.t, "clone": torch.clone,
        "to": lambda x: x.to(torch.float32), "slice": lambda x: x[:, :], "cat": lambda x: torch.cat([x]),
        "pad": lambda x: F.pad(x, (0, 0)), "expand": lambda x: x.expand(*x.shape),
    }  # fmt: skip

    def function(x: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = steps[name](x)
        return x.exp()

    gm = RemoveIdentities()(fxopt.capture(function, (X,))).gm
    want, got = function(X), gm(X)
    assert torch.equal(want.nan_to_num(7), got.nan_to_num(7))
    assert want.stride() == got.stride()
