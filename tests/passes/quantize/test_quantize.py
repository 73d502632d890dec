"""The pass as users call it: calibration, recipes, plans, refusals, and both sides of a branch."""

import copy

import pytest
import torch
from torch import nn

import fxopt
from fxopt import CalibrationError, PassError
from fxopt.export import coverage, to_onnx, validate
from fxopt.numerics import measure
from fxopt.passes import EqualizeChannels, InsertQdq, Quantize, QuantPlan
from fxopt.passes.quantize import recipe as recipe_module
from fxopt.passes.quantize.merged_rows import MergedRows, first_rows, merged_rows, regrouped_rows
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.simulate import Simulation, run_by_node, signal_to_noise
from fxopt.passes.quantize.target import ORT_CPU
from tests.passes.quantize.nets import Encoder, Gate, Residual, awake

IMAGES = torch.randn(8, 3, 8, 8)
LOADER = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(4)]


def residual():
    return fxopt.capture(awake(Residual()), (IMAGES[:2],), dynamic_shapes={"image": {0: "batch"}})


def test_a_loader_of_labelled_batches_calibrates():
    gm = residual()
    small = fxopt.optimize(gm, ["quantize"], calibration=LOADER, strict=True)
    found = measure(gm(IMAGES), small(IMAGES))
    assert found.sqnr_db > 25
    assert gm.calibration is None
    file = to_onnx(small)
    report = coverage(file)
    assert report.kernels["conv"] == (3, 3)
    assert report.kernels["linear"] == (1, 1)
    assert report.kernels["add"] == (1, 1)
    assert report.integer_share == 1.0


def test_without_a_loader_the_examples_calibrate():
    gm = residual()
    small = fxopt.optimize(gm, ["quantize"], strict=True)
    want = fxopt.optimize(gm, ["quantize"], calibration=[(IMAGES[:2],)], strict=True)
    assert torch.equal(small(IMAGES), want(IMAGES))


def test_options_come_from_text():
    small = fxopt.optimize(
        residual(), "quantize{bits=8,weight_bits=4,recipe=fast,method=percentile:99.9,min_sqnr_db=5}", strict=True
    )
    assert small.report.steps[0].name.startswith("quantize{weight_bits=4,")
    weights = [t for name, t in small.named_buffers() if name.endswith("weight_integers")]
    assert max(int(w.abs().max()) for w in weights) <= 7


@pytest.mark.parametrize(("options", "why"), [
    ({"bits": 9}, "bits is 9; wanted one of 2, 3"), ({"weight_bits": 1}, "weight_bits is 1"),
    ({"method": "median"}, "there is no range method 'median'"),
    ({"recipe": "best"}, "recipe is 'best'; wanted one of fast, auto, accurate"),
    ({"target": "npu"}, "target is 'npu'; wanted one of ort-cpu, onnx"),
])  # fmt: skip
def test_an_option_that_does_not_exist_is_refused_at_once(options, why):
    with pytest.raises(ValueError, match=why):
        Quantize(**options)


@pytest.mark.parametrize(("data", "why"), [
    ([], "no items|empty"), ([(IMAGES, IMAGES, IMAGES)], "item 0"), ([(IMAGES * float("nan"),)], "NaN"),
    ([(torch.randn(2, 4, 8, 8),)], "item 0"),
], ids=["empty", "wrong arity", "NaN", "wrong shape"])  # fmt: skip
def test_calibration_data_that_do_not_fit_are_refused(data, why):
    with pytest.raises(CalibrationError, match=why):
        fxopt.optimize(residual(), ["quantize"], calibration=data, strict=True)


def test_a_failing_quantization_leaves_the_last_good_graph():
    gm = residual()
    small = fxopt.optimize(gm, ["fold-batch-norm", "quantize"], calibration=[])
    assert [step.status for step in small.report.steps] == ["changed", "failed"]
    torch.testing.assert_close(small(IMAGES), gm(IMAGES))


class Counting(nn.Module):
    """Writes buffers in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, image):
        y = self.conv(image).relu()
        self.calls += 1
        self.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return y + self.mean[:, None, None]


@pytest.mark.parametrize("recipe", ["fast", "auto", "accurate"])
def test_buffers_that_a_model_writes_are_as_they_were(recipe):
    model = awake(Counting())
    small = fxopt.optimize(model, [Quantize(recipe=recipe)], (IMAGES,), calibration=[IMAGES], strict=True)
    assert small.calls == 0
    assert not small.mean.any()
    want = copy.deepcopy(model)(IMAGES)  # the graph has the model's buffers
    assert measure(want, small(IMAGES)).sqnr_db > 25
    assert small.calls == 1


def test_learned_rounding_never_sees_the_inputs_that_it_is_measured_on(monkeypatch):
    seen = []

    class Spy(fxopt.Pass):
        name = "spy"

        def __init__(self, **options):
            pass

        def run(self, rw):
            seen.append([int(sample.args[0][row, 0, 0, 0]) for sample in rw.gm.calibration for row in range(16)])

    for name in ("Gptq", "AdaRound"):
        monkeypatch.setattr(recipe_module, name, Spy)
    numbered = torch.randn(80, 3, 8, 8)
    numbered[:, 0, 0, 0] = torch.arange(80.0)
    loader = [(rows,) for rows in numbered.split(4)]
    fxopt.optimize(residual(), [Quantize(recipe="accurate")], calibration=loader, strict=True)
    assert seen == [[*range(32), *range(64, 80)]] * 3  # the recipe measures on rows 32 to 63


def test_a_graph_in_train_mode_is_refused():
    gm = residual()
    gm.train()
    with pytest.raises(PassError, match="the graph is in train mode, and integers are for evaluation"):
        Quantize()(gm)


def test_noise_above_the_floor_undoes_the_whole_pass():
    small = fxopt.optimize(residual(), [Quantize(bits=2, weight_bits=2, recipe="fast", min_sqnr_db=30)])
    (step,) = small.report.steps
    assert step.status == "rolled back"
    assert step.rolled_back[0].sites == ()
    assert "sqnr_db is" in step.rolled_back[0].why


def test_too_much_noise_says_what_to_try():
    with pytest.raises(fxopt.ContractError, match=r"(?s)sqnr_db is .*try +metric=..., max_drop=... leaves float what"):
        fxopt.optimize(residual(), [Quantize(bits=2, weight_bits=2, recipe="fast", min_sqnr_db=30)], strict=True)


def test_a_constant_activation_is_safe():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x * 0 + 0.5), self.conv(x * 0)

    gm = fxopt.capture(Shifted().eval(), (IMAGES,))
    small = fxopt.optimize(gm, [Quantize(recipe="fast")], strict=True)
    for want, have in zip(gm(IMAGES), small(IMAGES), strict=True):
        torch.testing.assert_close(have, want, rtol=0.02, atol=0.02)


def test_a_plan_can_be_made_edited_and_passed_back(tmp_path):
    gm = residual()
    plan = Quantize().make_plan(gm, LOADER)
    assert all(spec.resolved for spec in plan.values())
    edited = plan.changed("conv1_weight", bits=4).without("head_weight")
    edited.save(tmp_path / "plan.json")
    small = fxopt.optimize(gm, [Quantize(plan=QuantPlan.load(tmp_path / "plan.json"))], strict=True)
    held = dict(small.named_buffers())
    assert int(held["conv1.weight_integers"].abs().max()) == 7
    assert "head.weight_integers" not in held
    linear = next(node for node in small.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert linear.args[1].op == "get_attr"


@pytest.mark.parametrize("pattern", ["conv1.weight", "conv1", "conv1*", "conv2d_1"])
def test_skipped_layers_stay_floats(pattern):
    small = fxopt.optimize(residual(), [Quantize(skip=(pattern,), recipe="fast")], strict=True)
    convs = [node for node in small.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert [node.args[1].op for node in convs] == ["call_function", "get_attr", "call_function"]
    kinds = coverage(to_onnx(small)).kernels
    assert kinds["conv"] == (2, 3)  # ORT would quantize a float weight between integers by itself
    assert kinds["linear"] == (1, 1)


def test_a_pattern_that_fits_no_layer_is_named():
    with pytest.raises(PassError, match="nothing that has an integer kernel, and no embedding, fits 'conv9'"):
        Quantize(skip=("conv9",))(residual())


def test_the_recipe_writes_down_what_it_tried():
    small = fxopt.optimize(residual(), [Quantize(recipe="auto")], calibration=LOADER, strict=True)
    notes = small.report.steps[0].notes
    assert any(note.startswith("mse: ") and "with correct-bias" in note for note in notes)
    assert any(note.startswith("minmax: ") for note in notes)
    assert notes[0] in str(small.report)


def test_both_sides_of_a_branch_are_quantized():
    samples = [(IMAGES[:2].abs(),), (-IMAGES[:2].abs(),)]
    gm = fxopt.capture(Gate().eval(), samples[0])
    small = fxopt.optimize(gm, [Quantize(recipe="fast")], calibration=samples, strict=True)
    for sample in samples:
        assert measure(gm(*sample), small(*sample)).sqnr_db > 25
    file = to_onnx(small)
    validate(file, small, inputs=samples)
    for sample in samples:
        assert coverage(file, sample).kernels["conv"] == (3, 3)


def test_a_side_that_calibration_never_takes_stays_float_and_says_so():
    gm = fxopt.capture(Gate().eval(), (IMAGES[:2].abs(),))
    result = Quantize(recipe="fast")(gm)
    assert "no calibration input reaches it" in {skip.why for skip in result.skips}


def test_a_simulation_is_the_integer_graph():
    gm = fxopt.optimize(residual(), PREPARATION, strict=True)
    plan = Quantize().make_plan(gm, LOADER)
    quantized = InsertQdq(plan)(gm).gm
    quantized.recompile()
    sample = fxopt.Sample((IMAGES,))
    ((have,),) = Simulation(gm, plan, ORT_CPU).run([sample])
    torch.testing.assert_close(have, quantized(IMAGES), rtol=0, atol=1e-3)
    assert signal_to_noise(run_by_node(gm, [sample]), [[have]]) > 20


def test_equalize_channels_is_exact_and_evens_out():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
    )
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-3, 3, 8, base=2)[:, None, None, None])
    gm = fxopt.capture(net.eval(), (IMAGES,))
    even = fxopt.optimize(gm, ["equalize-channels"], strict=True)
    assert torch.equal(even(IMAGES), gm(IMAGES))

    def spread(graph):
        weight = graph.get_parameter("0.weight").detach().abs().amax((1, 2, 3))
        return float(weight.max() / weight.min())

    assert spread(even) < spread(gm) / 4
    small, before = (fxopt.optimize(g, [Quantize(recipe="fast")], strict=True) for g in (even, gm))
    assert measure(gm(IMAGES), small(IMAGES)).sqnr_db > measure(gm(IMAGES), before(IMAGES)).sqnr_db + 1


@pytest.mark.parametrize("limit", [nn.ReLU6(), nn.Sigmoid()])
def test_equalize_channels_leaves_what_lets_no_factor_through(limit):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), limit, nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-3, 3, 8, base=2)[:, None, None, None])
    assert not EqualizeChannels()(fxopt.capture(net.eval(), (IMAGES,))).modified


def test_a_transformer_layer_keeps_norms_and_residuals_in_floats():
    x = torch.randn(4, 6, 16)
    gm = fxopt.capture(Encoder().eval(), (x,), dynamic_shapes={"x": {0: "batch", 1: "length"}})
    small = fxopt.optimize(gm, ["quantize"], calibration=[(torch.randn(2, 5, 16),) for _ in range(8)], strict=True)
    report = coverage(to_onnx(small))
    assert report.kernels["linear"] == (6, 6)
    assert measure(gm(x), small(x)).sqnr_db > 25


@pytest.mark.parametrize(
    ("net", "size"),
    [(nn.Linear(6, 4), (6,)), (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 8, 8))],
)
def test_a_row_or_an_image_without_a_batch_is_quantized(net, size):
    x, loader = torch.randn(size), [(torch.randn(size),) for _ in range(40)]
    gm = fxopt.capture(net.eval(), (x,))
    small = fxopt.optimize(gm, ["quantize"], calibration=loader, strict=True)
    assert measure(gm(x), small(x)).sqnr_db > 25
    assert coverage(to_onnx(small)).integer_share == 1.0


def test_a_model_without_layers_is_left_alone():
    gm = fxopt.capture(nn.Softmax(1).eval(), (torch.randn(2, 3),))
    small = fxopt.optimize(gm, ["quantize"], strict=True)
    assert small.report.steps[0].status == "unchanged"


def test_a_quantized_graph_is_saved_and_loaded(tmp_path):
    small = fxopt.optimize(residual(), ["quantize"], calibration=LOADER, strict=True)
    fxopt.save(small, tmp_path / "small.fxopt")
    loaded = fxopt.load(tmp_path / "small.fxopt")
    assert torch.equal(loaded(IMAGES), small(IMAGES))
    assert (tmp_path / "small.fxopt").stat().st_size < 200_000


def test_single_rows_are_tried_together_where_the_graph_allows_it():
    gm = residual()
    rows = [fxopt.Sample((image[None],)) for image in IMAGES]
    (merged,) = merged_rows(gm, rows)
    assert torch.equal(merged.args[0], IMAGES)
    fixed = fxopt.capture(awake(Residual()), (IMAGES[:1],))
    assert merged_rows(fixed, rows) is rows
    others = [fxopt.Sample((IMAGES[:1],)), fxopt.Sample((IMAGES[:1, :, :4],))]
    free = fxopt.capture(awake(Residual()), (IMAGES,), dynamic_shapes={"image": {0: "batch", 2: "height"}})
    assert merged_rows(free, others) is others


@pytest.mark.parametrize(("given", "most", "sizes"), [((1, 2, 4), 3, [3, 3, 1]), ((8,), 4, [4, 4]), ((2, 3), 9, [5])])
def test_rows_are_regrouped_where_the_graph_allows_it(given, most, sizes):
    samples = [fxopt.Sample((images,)) for images in IMAGES[: sum(given)].split(given)]
    found = regrouped_rows(residual(), samples, most)
    assert [len(sample.args[0]) for sample in found] == sizes
    assert torch.equal(torch.cat([sample.args[0] for sample in found]), IMAGES[: sum(given)])
    fixed = fxopt.capture(awake(Residual()), (IMAGES[:8],))
    assert regrouped_rows(fixed, samples, most) == samples


def test_the_last_of_the_first_rows_may_be_more():
    samples = [fxopt.Sample((torch.zeros(3, 5),)) for _ in range(6)]
    assert len(list(first_rows(iter(samples), 7))) == 3


def test_inputs_of_few_rows_are_merged_up_to_a_limit():
    gm = residual()
    data = [IMAGES[:1], IMAGES[1:3], IMAGES[3:4], IMAGES[4:8], IMAGES[:5]]
    together = MergedRows(gm, data, 4)
    for _ in range(2):
        found = [sample.args[0] for sample in together]
        assert [len(images) for images in found] == [4, 4, 5]
        assert torch.equal(torch.cat(found), torch.cat(data))


class Reciprocal(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(1 / x)


def test_the_error_names_the_item_of_the_user_though_items_are_merged():
    data = [torch.ones(1, 4)] * 5 + [torch.zeros(1, 4)] + [torch.ones(1, 4)] * 5
    with pytest.raises(CalibrationError, match="item 5 of the calibration data"):
        fxopt.optimize(
            Reciprocal().eval(),
            ["quantize"],
            (torch.ones(2, 4),),
            dynamic_shapes={"x": {0: "batch"}},
            calibration=data,
            strict=True,
        )
