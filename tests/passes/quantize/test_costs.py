"""The knapsack behind the accuracy budget: nothing is cheaper at its noise; what a layer costs unmeasured."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.quantize.costs import WidthTable
from fxopt.passes.quantize.target import GENERIC, ORT_CPU


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 3), st.integers(0, 10**6))
def test_no_choice_is_better_than_the_frontier(layers, widths, seed):
    random = np.random.default_rng(seed)
    cost = random.uniform(0.1, 1, (layers, widths))
    table = WidthTable(
        tuple(map(str, range(layers))), (4, 8, 16)[:widths], cost, 10 ** random.uniform(-6, 0, (layers, widths))
    )
    frontier = [table.total(choice) for choice in table.frontier()]
    everything = [table.total(choice) for choice in itertools.product(range(widths), repeat=layers)]
    slack = layers * cost.max(1).sum() / 10_000
    for found_cost, found_noise in frontier:
        assert not any(c < found_cost - slack and n <= found_noise for c, n in everything)
    assert frontier[0][0] <= min(everything)[0] + slack
    assert frontier[-1][1] == min(noise for _, noise in everything)


def test_the_frontier_trades_cost_for_noise():
    random = np.random.default_rng(0)
    noise = np.stack([10 ** random.uniform(-4, 0, 200), np.zeros(200)], 1)
    cost = np.stack([np.full(200, 0.5), np.ones(200)], 1) * random.uniform(1, 9, (200, 1))
    table = WidthTable(tuple(map(str, range(200))), (8, "float"), cost, noise)
    totals = [table.total(choice) for choice in table.frontier()]
    assert 32 < len(totals) <= 64
    assert totals[0][0] == pytest.approx(float(cost[:, 0].sum()), rel=1e-9)
    assert totals[-1][1] == 0
    for earlier, later in itertools.pairwise(totals):
        assert earlier[0] < later[0]
        assert earlier[1] > later[1]
    by_gain = np.argsort((cost[:, 1] - cost[:, 0]) / noise[:, 0])  # the greedy order, which is a bound for each prefix
    for made_float in range(0, 201, 10):
        kept = by_gain[made_float:]
        spent = cost[kept, 0].sum() + cost[by_gain[:made_float], 1].sum()
        best = min((n for c, n in totals if c <= spent * 1.02 + 1e-9), default=0.0)
        assert best <= noise[kept, 0].sum() * 1.001 + 1e-12


def test_the_quietest_width_is_the_cheapest_of_the_least_noise():
    cost, noise = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]), np.array([[0.1, 0.0, 0.0], [0.0, 0.0, 0.5]])
    table = WidthTable(("a", "b"), (4, 8, "float"), cost, noise)
    assert table.quietest() == (1, 1)
    assert table.cheapest() == (0, 2)


@pytest.mark.parametrize(("target", "want"), [(ORT_CPU, [0.5, 0.5, 1.0, 1.0]), (GENERIC, [0.25, 0.25, 0.5, 1.0])])
def test_without_times_a_layer_costs_what_its_kernel_does(target, want):
    table = WidthTable.of(
        ["a"], (4, 8, 16, "float"), macs={"a": 100.0}, elements={"a": 0.0}, target=target, costs=None,
        noise={"a": {4: 1e-2, 8: 1e-4, 16: float("nan")}},
    )  # fmt: skip
    assert table.cost[0].tolist() == want
    assert table.noise[0].tolist() == [1e-2, 1e-4, 1e6, 0.0]


def test_layers_without_times_count_at_the_mean_time_of_a_multiply_accumulate():
    table = WidthTable.of(
        ["a", "b"], (8, "float"), macs={"a": 100.0, "b": 300.0}, elements={"a": 0.0, "b": 0.0}, target=ORT_CPU,
        costs={"a": {8: 4.0, "float": 10.0}}, noise={"a": {8: 0.0}, "b": {8: 0.0}},
    )  # fmt: skip
    assert (table.cost * 40).tolist() == [[4.0, 10.0], [15.0, 30.0]]


@pytest.mark.parametrize("costs", [None, {"a": {8: 10.0, "float": 40.0}, "b": {8: 4.0, "float": 10.0}}])
def test_floats_among_integers_pay_for_conversions(costs):
    given = {"macs": {"a": 400.0, "b": 100.0}, "elements": {"a": 0.0, "b": 0.0}, "target": ORT_CPU, "costs": costs}
    given["noise"] = {"a": {8: 0.0}, "b": {8: 0.0}}
    kernels = WidthTable.of(["a", "b"], (8, "float"), **given).cost
    table = WidthTable.of(["a", "b"], (8, "float"), **given, converted={"a": 5.0, "b": 20.0})
    # 20 multiply-accumulates for each number, of the 500 that all layers in float are
    torch.testing.assert_close(torch.tensor(table.cost - kernels), torch.tensor([[0, 0.2], [0, 0.8]]).double())
    assert table.named(table.cheapest()) == {"a": 8, "b": 8}
