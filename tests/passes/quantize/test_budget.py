"""The accuracy budget: which layers stay float, what the ledger tells, what is refused, and the knapsack behind it."""

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt import PassError
from fxopt.export import Session, coverage, to_onnx
from fxopt.numerics import measure
from fxopt.passes import Quantize
from fxopt.passes.quantize.budget import Budget, WidthSearch
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.target import ORT_CPU
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


class TwoHeads(nn.Module):
    """An output that 8 bits make noisy, and one that they hardly touch."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy, self.clean = Fragile(), nn.Conv2d(3, 4, 3)

    def forward(self, image):
        return self.noisy(image), self.clean(image)


def test_layers_that_make_noise_but_do_not_matter_to_the_metric_get_integers():
    gm = fragile(TwoHeads)
    want = gm(IMAGES)[1]

    def metric(model):
        return min(measure(want, model(IMAGES)[1]).sqnr_db, 60.0)

    small = quantized(gm, metric=metric, max_drop=5, min_sqnr_db=-100)
    assert kinds(small) == [True, True, True, False]
    told = notes(small)
    assert "noise does not tell what the metric keeps: it is asked about 4 parts alone" in told
    assert sum(note.startswith("try ") for note in told) <= 12


@pytest.mark.parametrize("harmful", [pytest.param({17}, marks=pytest.mark.slow), {3, 11}])
def test_of_many_layers_a_metric_of_no_relation_to_noise_keeps_few_in_float(harmful):
    torch.manual_seed(0)
    gm = fxopt.capture(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(24))).eval(), (IMAGES,))
    calls = []

    def metric(model):
        calls.append(model)
        return -float(sum(kinds(model)[layer] for layer in harmful)) if isinstance(model, nn.Module) else 0.0

    small = quantized(gm, metric=metric, max_drop=0, min_sqnr_db=-100)
    floats = {layer for layer, integer in enumerate(kinds(small)) if not integer}
    assert floats >= harmful
    assert len(floats) <= 2 * len(harmful)  # 24 layers are 16 parts of up to two
    assert len(calls) <= 30


def test_a_budget_without_a_choice_of_widths_is_one_try():
    gm = fragile()
    metric = Counting(gm)
    with pytest.raises(PassError, match=r"at best, in 1 tries of widths 8"):
        quantized(gm, metric=metric, max_drop=35, widths=(8,))
    assert len(metric.values) == 2


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


def test_preparation_is_what_names_the_layers_of_costs():
    prepared = fxopt.optimize(fragile(), PREPARATION, strict=True)
    assert [n.name for n in prepared.graph.nodes if n.target is torch.ops.aten.conv2d.default] == [
        "conv2d", "conv2d_1", "conv2d_2",
    ]  # fmt: skip


# -- a noise that is allowed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["auto", "accurate"])
def test_layers_stay_float_where_8_bits_everywhere_are_too_noisy(recipe):
    gm = fragile()
    decibels = Counting(gm)
    everywhere = decibels(quantized(gm, recipe=recipe))
    small = quantized(gm, recipe=recipe, min_sqnr_db=everywhere + 3)
    assert decibels(small) >= everywhere + 3
    assert 0 < sum(kinds(small)) < 3
    assert any(note.startswith("8 bits everywhere are not enough") for note in notes(small))
    exact = measure(small(IMAGES), Session(to_onnx(small).to_bytes()).run((IMAGES,))[0])
    assert exact.sqnr_db > everywhere + 10


def test_the_noise_that_is_allowed_counts_tables_of_embeddings():
    net = nn.Sequential(nn.Embedding(200, 32), nn.Linear(32, 200), nn.Linear(200, 32))
    gm = fxopt.capture(net.eval(), (torch.arange(8),), dynamic_shapes=({0: "words"},))
    data = [(torch.randint(0, 200, (8,)),) for _ in range(8)]
    everywhere = fxopt.optimize(gm, [Quantize()], calibration=data, strict=True)
    enough = measure(gm(*data[0]), everywhere(*data[0])).sqnr_db + 2
    small = fxopt.optimize(gm, [Quantize(min_sqnr_db=enough)], calibration=data, strict=True)
    floats = [node for node in small.graph.nodes if node.op == "get_attr" and node.target in ("1.weight", "2.weight")]
    assert len(floats) == 1
    for inputs in ((torch.arange(8),), *data):
        assert measure(gm(*inputs), small(*inputs)).sqnr_db >= enough - 1


def test_a_quiet_example_counts_beside_calibration_inputs_that_drown_it():
    net = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.GroupNorm(1, 16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    gm = fxopt.capture(net.eval(), (quiet := torch.randn(1, 16, 9, 9) / 100,))
    small = fxopt.optimize(gm, [Quantize()], calibration=[(torch.randn(1, 16, 9, 9),) for _ in range(8)], strict=True)
    assert measure(gm(quiet), small(quiet)).sqnr_db >= 10
    assert kinds(small) == [False, True]


def test_noise_is_measured_on_calibration_inputs_where_there_are_no_examples():
    gm = fragile()
    gm.calibration, gm.samples = [(IMAGES,)], ()
    found = Quantize(min_sqnr_db=50)(gm)
    assert 0 < sum(kinds(found.gm)) < 3


def test_a_noise_that_no_integers_keep_is_refused():
    with pytest.raises(PassError, match=r"(?s)wanted +at least 300 dB.*try +a smaller min_sqnr_db"):
        quantized(fragile(), recipe="auto", min_sqnr_db=300)


@pytest.mark.parametrize("options", [{"recipe": "fast"}, {"bits": 16, "recipe": "auto"}], ids=str)
def test_nothing_is_searched_where_nothing_was_tried_or_other_widths_are_asked_for(options):
    with pytest.raises(fxopt.ContractError):
        quantized(fragile(), min_sqnr_db=120, **options)
