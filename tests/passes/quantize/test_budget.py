"""The accuracy budget: which layers stay float, what the ledger tells, what is refused, and the knapsack behind it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt import PassError
from fxopt.export import coverage, to_onnx
from fxopt.numerics import measure
from fxopt.passes import Quantize
from fxopt.passes.quantize.budget import Budget, WidthSearch
from fxopt.passes.quantize.costs import WidthTable
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.target import GENERIC, ORT_CPU
from fxopt.passes.quantize.trials import Candidate
from tests.passes.quantize.nets import Gate

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Fragile(nn.Module):
    """Three convolutions, the second with weights of one input channel a thousand times as large as the rest.

    That channel is always zero, so that all that matters lies within one step of the second one's 8-bit weights.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.first.bias[0] = -100
            self.second.weight[:, 0] *= 1000

    def forward(self, image):
        return self.third(torch.relu(self.second(torch.relu(self.first(image)))))


class WideRange(Fragile):
    """Besides, the first convolution computes large numbers that nobody reads, and its 8 bits hold nothing else."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.first.bias[0] = 1000
            self.second.weight[:, 0] = 0


def fragile(net=Fragile):
    return fxopt.capture(net().eval(), (IMAGES,))


class Counting:
    """Signal to noise beside the float net, at most 60 dB, as a metric that counts its calls."""

    def __init__(self, gm):
        self.want, self.values = gm(IMAGES), []

    def __call__(self, model):
        self.values.append(min(measure(self.want, model(IMAGES)).sqnr_db, 60.0))
        return self.values[-1]


def quantized(gm, **options):
    options = {"recipe": "fast", "min_sqnr_db": 0} | options
    return fxopt.optimize(gm, [Quantize(**options)], strict=True)


def kinds(gm):
    return [
        node.args[1].op == "call_function" for node in gm.graph.nodes if node.target is torch.ops.aten.conv2d.default
    ]


def notes(gm):
    return gm.report.steps[0].notes


def test_the_layer_that_costs_the_accuracy_is_the_one_that_stays_float():
    gm = fragile()
    metric = Counting(gm)
    small = quantized(gm, metric=metric, max_drop=35)
    assert kinds(small) == [True, False, True]
    assert metric(small) >= 25
    assert len(metric.values) <= 9
    assert coverage(to_onnx(small)).kernels["conv"] == (2, 3)


def test_a_budget_that_is_no_limit_takes_one_try_and_eight_bits_everywhere():
    gm = fragile()
    metric = Counting(gm)
    small = quantized(gm, metric=metric, max_drop=1000)
    assert kinds(small) == [True] * 3
    assert len(metric.values) == 2  # the float graph, and the one try
    plain = quantized(gm)
    assert torch.equal(small(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("recipe", ["fast", "auto", "accurate"])
def test_the_graph_that_the_metric_saw_last_within_the_budget_is_the_one_returned(recipe):
    gm = fragile()
    metric = Counting(gm)
    small = quantized(gm, metric=metric, max_drop=35, recipe=recipe)
    tried = list(metric.values)
    assert metric(small) in tried
    assert metric(small) >= tried[0] - 35


def test_the_ledger_tells_every_try():
    gm = fragile()
    metric = Counting(gm)
    told = notes(quantized(gm, metric=metric, max_drop=35))
    assert told[0] == "float: metric 60; the budget allows 25"
    assert told[1].startswith("noise of a layer alone: conv2d_1 ")
    tries = [note for note in told if note.startswith("try ")]
    assert len(tries) == len(metric.values) - 1
    assert tries[0].startswith("try 1: 3 layers 8 bits; noise ")
    assert tries[0].endswith(f"metric {metric.values[1]:.6g}, below the budget")
    assert any("1 layers float, float are conv2d_1; noise" in note and "within the budget" in note for note in tries)


def test_a_budget_that_cannot_be_met_names_the_best_and_what_to_try():
    gm = fragile()
    with pytest.raises(PassError, match=r"(?s)no choice of widths.*metric .* at best, in \d+ tries of widths 8, float"
                       r".*at least 60, which is 0 below 60.*a larger max_drop"):  # fmt: skip
        quantized(gm, metric=Counting(gm), max_drop=0)
    with pytest.raises(PassError, match="or 'float' among the widths"):
        quantized(gm, metric=Counting(gm), max_drop=35, widths=(4, 8))


def test_sixteen_bits_rescue_what_eight_cannot():
    gm = fragile(WideRange)
    metric = Counting(gm)
    small = quantized(gm, metric=metric, max_drop=30, widths=(8, 16), target="onnx")
    assert kinds(small) == [True] * 3
    assert metric(small) >= 30
    assert any("layers 16 bits" in note for note in notes(small))
    wide = [node for node in small.graph.nodes if node.target is torch.ops.fxopt.quantize.default]
    assert {int(node.args[5]) for node in wide} == {127, 32767}


def test_weights_of_four_bits_are_taken_where_they_do_no_harm():
    gm = fragile()
    small = quantized(gm, metric=lambda model: 1.0, max_drop=0, widths=(4, 8, "float"))
    held = [t for name, t in small.named_buffers() if name.endswith("weight_integers")]
    assert [int(weight.abs().max()) for weight in held] == [7, 7, 7]


def test_measured_costs_decide():
    """Two layers of which either one may stay float: it is the one whose integers gain less time."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.left = nn.Conv2d(3, 4, 3)
            self.right = nn.Conv2d(3, 4, 3)

        def forward(self, image):
            return torch.softmax(self.left(image) * 2, 1) + torch.softmax(self.right(image) * 2, 1)

    gm = fxopt.capture(Twins().eval(), (IMAGES,))
    for dear, want in (("conv2d", [True, False]), ("conv2d_1", [False, True])):
        costs = {name: {8: 1.0, "float": 9.0 if name == dear else 1.5} for name in ("conv2d", "conv2d_1")}
        small = quantized(
            gm, metric=lambda model: float(sum(kinds(model)) < 2 if isinstance(model, nn.Module) else 0),
            max_drop=0.5, costs=costs,
        )  # fmt: skip
        assert kinds(small) == want


def test_costs_of_other_layers_are_refused():
    gm = fragile()
    with pytest.raises(PassError, match=r"(?s)costs names no layer.*conv9.*conv2d, conv2d_1"):
        quantized(gm, metric=Counting(gm), max_drop=35, costs={"conv9": {"float": 1.0}})
    with pytest.raises(PassError, match="the cost of conv2d at 8 is nan"):
        quantized(gm, metric=Counting(gm), max_drop=35, costs={"conv2d": {8: float("nan"), "float": 1.0}})


def test_layers_in_branches_are_chosen_too():
    samples = [(IMAGES[:2].abs(),), (-IMAGES[:2].abs(),)]
    gm = fxopt.capture(Gate().eval(), samples[0])

    def metric(model):
        held = [name for name, _ in model.named_buffers() if name.endswith("weight_integers")]
        return float(not any("dark" in name for name in held))

    small = fxopt.optimize(
        gm, [Quantize(metric=metric, max_drop=0.5, recipe="fast", min_sqnr_db=0)], calibration=samples, strict=True
    )
    held = [name for name, _ in small.named_buffers() if name.endswith("weight_integers")]
    assert not any("dark" in name for name in held)
    assert any("dark" in note for note in notes(small) if "within" in note) or len(held) < 3


def test_a_call_and_a_module_of_one_name_are_told_apart():
    class Namesakes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.stem, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)  # the calls are linear and linear_1

        def forward(self, x):
            return self.linear(torch.tanh(self.stem(x)))

    gm = fxopt.optimize(fxopt.capture(Namesakes().eval(), (torch.randn(5, 4),)), PREPARATION, strict=True)
    start = Candidate(gm, Quantize().make_plan(gm), {})
    search = WidthSearch(start, ORT_CPU, Budget(len, 0.0))
    plan = search.plan_for({"linear": "float", "linear_1": 8})
    assert "stem_weight" not in plan
    assert plan["linear_weight"] == start.plan["linear_weight"]


def test_make_plan_keeps_to_the_budget():
    gm = fragile()
    plan = Quantize(metric=Counting(gm), max_drop=35).make_plan(gm)
    assert "second_weight" not in plan
    assert "first_weight" in plan


def test_a_model_without_layers_needs_no_metric():
    gm = fxopt.capture(nn.Softmax(1).eval(), (torch.randn(2, 3),))
    small = fxopt.optimize(gm, [Quantize(metric=lambda model: float("nan"))], strict=True)
    assert "no layer has an integer kernel" in notes(small)[-1]


# -- the metric ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("result", "error", "why"), [
    (float("nan"), ValueError, "the metric returned NaN for the float graph"),
    (float("inf"), ValueError, "the metric returned inf for the float graph; wanted a finite number"),
    (None, TypeError, "the metric returned a NoneType for the float graph; wanted a number"),
    (torch.zeros(2), TypeError, "the metric returned a Tensor"),
    (True, TypeError, "the metric returned a bool"),
])  # fmt: skip
def test_what_is_no_number_is_refused(result, error, why):
    with pytest.raises(error, match=why):
        Quantize(metric=lambda model: result, recipe="fast")(fragile())


def test_a_metric_may_return_a_tensor_or_a_numpy_number():
    for number in (torch.tensor(1.0), np.float32(1.0), 1):
        assert Quantize(metric=lambda model, number=number: number, recipe="fast")(fragile()).modified


def test_a_metric_that_raises_says_at_which_try():
    calls = []

    def metric(model):
        calls.append(model)
        if len(calls) == 2:
            raise KeyError("labels")
        return 1.0

    with pytest.raises(KeyError) as caught:
        Quantize(metric=metric, recipe="fast")(fragile())
    assert caught.value.__notes__[0] == "in the metric of quantize, called on try 1"


@pytest.mark.parametrize(("options", "error", "why"), [
    ({"max_drop": 0.1}, ValueError, "max_drop, widths and costs are for a metric"),
    ({"metric": len, "max_drop": -0.1}, ValueError, "max_drop is -0.1"),
    ({"metric": len, "max_drop": float("nan")}, ValueError, "max_drop is nan"),
    ({"metric": 0.9}, TypeError, "metric is a float; wanted a function of a model"),
    ({"metric": len, "widths": (9, "float")}, ValueError, "a width is 9; wanted one of 2, 3"),
    ({"metric": len, "widths": (8, 8)}, ValueError, "a width is named twice: 8, 8"),
    ({"metric": len, "widths": ("float",)}, ValueError, "widths names no integers"),
    ({"metric": len, "bits": 16}, ValueError, "a metric chooses the widths"),
])  # fmt: skip
def test_options_that_contradict_are_refused_at_once(options, error, why):
    with pytest.raises(error, match=why):
        Quantize(**options)


# -- the knapsack ----------------------------------------------------------------------------------------------------


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


def test_preparation_is_what_names_the_layers_of_costs():
    prepared = fxopt.optimize(fragile(), PREPARATION, strict=True)
    assert [n.name for n in prepared.graph.nodes if n.target is torch.ops.aten.conv2d.default] == [
        "conv2d", "conv2d_1", "conv2d_2",
    ]  # fmt: skip
