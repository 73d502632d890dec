"""The pass on whole nets: what becomes half, what the user can say about it, and what is refused."""

import functools
import re

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.errors import PassError
from fxopt.export import Session, to_onnx
from fxopt.grouped_ops import GROUPED_MM
from fxopt.manager import tensor_bytes
from fxopt.numerics import measure
from fxopt.passes.half import Emulated, PrecisionPlan
from tests.models.mixtures import SortedExperts
from tests.passes.half.nets import Branching, Looping, Tied, Vision, casts_of, transformer

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("float16", "bfloat16"))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
NETS = {"vision": (Vision, IMAGE), "transformer": (transformer, TOKENS), "branching": (Branching, TOKENS[:, 0].abs())}


@functools.cache
def captured(net, *inputs) -> fxopt.CapturedModule:
    torch.manual_seed(0)
    return fxopt.capture(net().eval(), inputs)


@functools.cache
def halved(name: str, dtype: torch.dtype) -> fxopt.CapturedModule:
    return fxopt.optimize(captured(*NETS[name]), [passes.CastHalf(dtype)], strict=True)


@HALVES
@pytest.mark.parametrize("name", NETS)
def test_all_of_a_well_behaved_net_is_half_with_a_cast_at_each_end(name, dtype):
    half = halved(name, dtype)
    assert len(casts_of(half)) == 2
    assert {node.meta["val"].dtype for node in half.graph.nodes if node.name == "linear"} <= {dtype}


@pytest.mark.parametrize("pass_", [passes.CastHalf("bfloat16", min_sqnr_db=15), passes.MixedPrecision("bfloat16")])
def test_experts_multiply_in_half_behind_counts_that_are_integers(pass_):
    torch.manual_seed(0)
    gm = fxopt.capture(SortedExperts().eval(), (torch.randn(6, 32),), dynamic_shapes=({0: "tokens"},))
    half = fxopt.optimize(gm, [pass_], strict=True)
    assert [n.meta["val"].dtype for n in half.graph.nodes if n.target is GROUPED_MM] == [torch.bfloat16] * 2


@HALVES
@pytest.mark.parametrize("name", NETS)
def test_half_kernels_of_torch_agree_with_the_emulation(name, dtype):
    half, x = halved(name, dtype), NETS[name][1]
    got, want = half(x).detach(), Emulated(half)(x)
    assert float((got - want).abs().max()) <= 4 * torch.finfo(dtype).eps * float(want.abs().max())


@HALVES
def test_the_file_holds_weights_of_half_the_size(dtype, tmp_path):
    half = halved("transformer", dtype)
    assert 2 * tensor_bytes(half) == tensor_bytes(captured(*NETS["transformer"]))
    file = to_onnx(half, tmp_path / "half.onnx", validate=False)
    weights = [value for value in file.model.graph.initializers.values() if value.const_value.size > 100]
    assert {value.const_value.nbytes / value.const_value.size for value in weights} == {2}


def test_a_half_graph_computes_in_onnx_runtime_what_it_computes_in_torch(tmp_path):
    half = halved("transformer", torch.float16)
    to_onnx(half, tmp_path / "half.onnx", validate=False)
    for optimization in ("none", "all"):
        (got,) = Session(tmp_path / "half.onnx", optimization=optimization).run([TOKENS])
        assert measure(half(TOKENS).detach(), torch.as_tensor(got)).sqnr_db > 50


class Overflows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        h = torch.relu(self.first(x))
        energy = (h * 1000.0).square().sum(-1, keepdim=True)
        return self.second(h / energy.sqrt())


def test_the_report_tells_nodes_casts_bytes_and_islands_with_their_lines():
    half = fxopt.optimize(captured(Overflows, TOKENS), [passes.CastHalf("float16")], strict=True)
    notes = half.report.steps[0].notes
    assert "nodes in half: predicted" in notes[0]
    assert "emulated" in notes[0]
    assert f"with {len(casts_of(half))} casts; parameters and buffers take 4256 bytes instead of 8512" in notes[1]
    assert any(n.startswith("float32: ") and "leaves the range of float16" in n and "h * 1000.0" in n for n in notes)


def test_the_plan_is_the_same_each_time():
    gm = captured(Overflows, TOKENS)
    plans = [passes.CastHalf().make_plan(gm) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].reasons == plans[1].reasons


def test_making_a_plan_leaves_the_graph_alone():
    gm = captured(Overflows, TOKENS)
    before = fxopt.graph_text(gm)
    passes.CastHalf().make_plan(gm)
    assert fxopt.graph_text(gm) == before


def test_a_plan_can_be_edited_and_passed_back():
    gm = captured(*NETS["vision"])
    plan = passes.CastHalf("bfloat16").make_plan(gm).changed("softmax", dtype="float32", reason="I want it")
    half = fxopt.optimize(gm, [passes.CastHalf(plan=plan)], strict=True)
    (softmax,) = [node for node in half.graph.nodes if node.name == "softmax"]
    assert softmax.meta["val"].dtype is torch.float32
    assert any("softmax: I want it" in note for note in half.report.steps[0].notes)


@pytest.mark.parametrize("pattern", ["aten.softmax", "softmax", "soft*"])
def test_what_is_denied_stays_float32(pattern):
    plan = passes.CastHalf(deny=(pattern,)).make_plan(captured(*NETS["vision"]))
    assert plan["softmax"] is torch.float32
    assert plan.reasons["softmax"].startswith("it is denied (nets.py:")


def test_a_module_is_denied_with_all_that_is_inside():
    plan = passes.CastHalf(deny=("layers.0.self_attn",)).make_plan(captured(*NETS["transformer"]))
    denied = [name for name, reason in plan.reasons.items() if reason.startswith("it is denied")]
    assert "scaled_dot_product_attention" in denied
    assert plan["layer_norm"] is torch.float16


class Shifted(Vision):
    def forward(self, x):
        return super().forward(x + 1e-9)


def test_what_is_allowed_may_be_half_against_a_rule():
    gm = captured(Shifted, IMAGE)
    assert "1e-09 is 0 in float16" in passes.CastHalf().make_plan(gm).reasons["add"]
    assert passes.CastHalf(allow=("aten.add",)).make_plan(gm)["add"] is torch.float16


def test_a_pattern_that_fits_nothing():
    with pytest.raises(PassError, match=r"no node, operator or module fits 'aten.conv9d'"):
        passes.CastHalf(deny=("aten.conv9d",)).make_plan(captured(*NETS["vision"]))


def test_a_plan_reaches_more_than_is_asked_for_as_kernels_add_up_in_other_orders():
    gm = captured(*NETS["transformer"])

    def trials(min_sqnr_db):
        notes = passes.CastHalf("bfloat16", min_sqnr_db=min_sqnr_db)(gm).notes
        return [float(found) for note in notes for found in re.findall(r"emulated ([\d.]+) dB", note)]

    (whole,) = trials(10.0)
    for below, count in ((3.0, 1), (0.5, 2)):
        assert len(trials(whole - below)) >= count
        assert trials(whole - below)[-1] >= whole - below + 1.0


def test_more_signal_is_asked_for_with_less_in_half():
    gm = captured(Overflows, TOKENS)
    few, many = (len(passes.CastHalf("bfloat16", min_sqnr_db=db).make_plan(gm).half) for db in (60.0, 20.0))
    assert few < many


def test_a_signal_that_half_cannot_keep_leaves_all_in_float32():
    result = passes.CastHalf("bfloat16", min_sqnr_db=200.0)(captured(*NETS["transformer"]))
    assert [skip.why for skip in result.skips] == ["nothing of the graph may compute in half"]
    assert casts_of(result.gm) == []


def test_a_metric_decides_and_is_asked_five_times_at_most():
    gm = captured(*NETS["vision"])
    asked = []

    def precision(model) -> float:
        asked.append(model)
        return -float((model(IMAGE) - gm(IMAGE)).detach().abs().max())

    plan = passes.CastHalf("bfloat16", metric=precision, max_drop=1e-4).make_plan(gm)
    assert 0 < len(asked) <= 5
    half = fxopt.optimize(gm, [passes.CastHalf(plan=plan)], strict=True)
    assert precision(Emulated(half)) >= -1e-4


def test_calibration_inputs_decide_what_overflows():
    gm = captured(Squares, TOKENS)
    assert passes.CastHalf().make_plan(gm)["square"] is torch.float16
    assert passes.CastHalf().make_plan(gm, [TOKENS, TOKENS * 300])["square"] is torch.float32


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(torch.tanh(x.square()))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        share = torch.arange(x.shape[0], dtype=torch.float32) / x.shape[0]
        return self.last(torch.tanh(self.first(x)) + share[:, None])


def test_positions_of_unknown_size_stay_float32_with_what_reads_them():
    gm = fxopt.capture(Positions().eval(), (torch.randn(40, 16),), dynamic_shapes={"x": {0: "n"}})
    plan = passes.CastHalf().make_plan(gm)
    assert plan.reasons["arange"].startswith(
        "it counts up to a size that is not known, and float16 holds each of them to 2048 only (test_cast_half.py:"
    )
    assert plan["arange"] is plan["div"] is torch.float32
    assert plan["linear"] is torch.float16


def test_positions_that_a_bound_proves_small_are_like_any_value():
    gm = fxopt.capture(Positions().eval(), (torch.randn(40, 16),), dynamic_shapes={"x": {0: "n<=900"}})
    assert not any("counts" in reason for reason in passes.CastHalf().make_plan(gm).reasons.values())


def test_asking_for_a_form_in_half_leaves_sizes_dynamic():
    gm = fxopt.capture(Positions().eval(), (torch.randn(40, 16),), dynamic_shapes={"x": {0: "n"}})
    half = fxopt.optimize(gm, [passes.CastHalf()], strict=True)
    assert "%x : f32[n, 16]" in fxopt.graph_text(half)
    assert half(torch.randn(7, 16)).shape == (7, 16)


def test_inputs_and_outputs_become_half_where_they_are_not_kept():
    gm = captured(*NETS["transformer"])
    half = fxopt.optimize(gm, [passes.CastHalf(keep_io=False)], strict=True)
    assert casts_of(half) == []
    assert half(TOKENS.half()).dtype is torch.float16
    assert half.samples[0].args[0].dtype is torch.float16
    assert half.report.steps[0].status == "changed"


def test_later_passes_run_on_a_graph_with_half_inputs():
    gm = captured(*NETS["transformer"])
    half = fxopt.optimize(gm, [passes.CastHalf(keep_io=False), "remove-dead-code"], strict=True)
    assert [step.status for step in half.report.steps] == ["changed", "unchanged"]


def test_a_second_run_changes_nothing():
    again = passes.CastHalf()(halved("vision", torch.float16))
    assert not again.modified
    assert [skip.why for skip in again.skips] == ["no operator is left that computes in float32"]


def test_a_saved_half_graph_comes_back():
    half, x = halved("branching", torch.float16), NETS["branching"][1]
    again = fxopt.serialize.from_bytes(fxopt.serialize.to_bytes(half))
    assert torch.equal(again(x), half(x))


def test_dynamic_sizes_stay_dynamic():
    gm = fxopt.capture(Vision().eval(), (IMAGE,), dynamic_shapes={"x": {0: "batch"}})
    half = fxopt.optimize(gm, ["cast-half{dtype=bfloat16}"], strict=True)
    assert half(torch.randn(7, 3, 8, 8)).shape == (7, 10)


def test_a_quantized_region_is_left_alone():
    gm = fxopt.optimize(captured(Quantizable, TOKENS), [passes.Quantize(recipe="fast", skip=("last",))], strict=True)
    half = fxopt.optimize(gm, [passes.CastHalf(min_sqnr_db=20.0)], strict=True)
    kinds = {str(node.target): node for node in half.graph.nodes if node.op == "call_function"}
    quantized = kinds["fxopt.quantize.default"]
    assert quantized.args[0].meta["val"].dtype is torch.float32


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.last(torch.sigmoid(self.first(x)))


def test_a_graph_of_integers():
    gm = fxopt.capture(lambda ids: ids * 2 + 1, (torch.tensor([1, 2]),)).eval()
    with pytest.raises(PassError, match=r"nothing of the graph computes on floats, so there is nothing to cast"):
        passes.CastHalf()(gm)


def test_a_graph_in_train_mode():
    gm = fxopt.capture(Vision().train(), (IMAGE,))
    with pytest.raises(PassError, match=r"the graph is in train mode, and cast-half is for evaluation"):
        passes.CastHalf()(gm.train())


def test_a_plan_of_another_graph():
    plan = PrecisionPlan({"conv3d": torch.float16})
    with pytest.raises(PassError, match=r"the plan names 'conv3d', which the graph does not have"):
        passes.CastHalf(plan=plan)(captured(*NETS["vision"]))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dtype": "float32"}, ValueError, "dtype is 'float32'; wanted float16 or bfloat16"),
        ({"plan": {"linear": torch.float16}}, TypeError, "plan is a dict; wanted a PrecisionPlan"),
        ({"metric": 0.5}, TypeError, "metric is a float; wanted what takes the model and returns a number"),
        ({"max_drop": 0.1}, ValueError, "max_drop is for a metric, and none is given"),
        ({"metric": len, "max_drop": -1.0}, ValueError, "max_drop is -1.0; wanted 0 or more"),
        ({"headroom": 0.5}, ValueError, "headroom is 0.5; wanted 1 or more"),
        ({"accumulate": "float64"}, ValueError, "accumulate is 'float64'; wanted one of float32, half"),
        ({"plan": PrecisionPlan({}), "deny": ("x",)}, ValueError, "a plan says what is half"),
    ],
)
def test_options_that_do_not_exist(options, error, text):
    with pytest.raises(error, match=text):
        passes.CastHalf(**options)


def test_a_metric_that_returns_no_number():
    pass_ = passes.CastHalf(metric=lambda model: "good")
    with pytest.raises(TypeError, match=r"the metric returned a str for the float32 graph"):
        pass_.make_plan(captured(*NETS["vision"]))


@pytest.mark.parametrize(("net", "inputs"), [(Looping, TOKENS[0, :, :8]), (Tied, torch.tensor([[1, 2, 3]]))])
def test_loops_and_tied_weights_keep_their_signal(net, inputs):
    gm = captured(net, inputs)
    half = fxopt.optimize(gm, [passes.CastHalf()], strict=True)
    assert half.report.steps[0].status == "changed"
    assert measure(gm(inputs).detach(), half(inputs).detach()).sqnr_db > 40
