"""prepare-qat: quantizers where quantize has them, with its scales; what is refused and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import PrepareQat, Quantize, RemoveDeadCode
from fxopt.passes.quantize.fake_quantizers import first_scales
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.quantized_ops import FAKE_QUANTIZE
from tests.models import NETS
from tests.models.base import settle

aten = torch.ops.aten


def graph_of(net: nn.Module, x: Any, *, training: bool = True) -> fxopt.CapturedModule:
    settle(net)
    return fxopt.capture(net.train(training), x)


def prepared(gm: fxopt.CapturedModule, **options: Any) -> fxopt.CapturedModule:
    return fxopt.optimize(gm, [PrepareQat(**options)], strict=True)


def fake_quantizers(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target is FAKE_QUANTIZE]


class NetWithBranches(nn.Module):
    """Dropout whose result two layers read, one of them behind a float operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.first(x)))
        return self.second(x) + self.third(torch.exp(x))


# ---- where


def test_the_graph_of_a_small_net() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    gm = prepared(graph_of(net, torch.randn(3, 1, 4, 4)), weight_bits=4)
    text = fxopt.graph_text(gm)
    calls = [line.split(" = ", 1)[1] for line in text.splitlines() if "fxopt." in line or "aten." in line]
    assert calls == [
        "fxopt.fake_quantize(%input, %input_1_scale, %input_1_zero_point, 0, 0, 255)",
        "fxopt.fake_quantize(%0.weight, %0.weight_scale, %0.weight_zero_point, 0, -7, 7)",
        "aten.conv2d(%0, %1)",
        "aten.add(%1.num_batches_tracked, 1)",
        "fxopt.norm_bias(None, %1.weight, %1.bias, %1.running_mean, %1.running_var, 1e-05, %input_1_scale, "
        "%0.weight_scale)",
        "aten.batch_norm(%2, %1.weight, %4, %1.running_mean, %1.running_var, True, 0.1, 1e-05, False)",
        "aten.relu(%5)",
        "fxopt.fake_quantize(%6, %relu_scale, %relu_zero_point, 0, 0, 255)",
        "aten.flatten(%7, 1)",
        "fxopt.fake_quantize(%4.weight, %4.weight_scale, %4.weight_zero_point, 0, -7, 7)",
        "fxopt.fake_quantize_bias(%4.bias, %relu_scale, %4.weight_scale)",
        "aten.linear(%8, %9, %10)",
        "fxopt.update_buffer(%1.num_batches_tracked, %3, True)",
    ]


@pytest.mark.parametrize("name", ["ConvBnRelu", "SqueezeExcite", "UNet", "MiniViT"])
def test_train_and_eval_capture_give_the_scales_that_quantize_gives(name: str) -> None:
    net = NETS[name]()
    example = net.example(4)
    scales = []
    for training in (True, False):
        gm = fxopt.capture(net.train(training), fxopt.Sample(example.args, example.kwargs))
        graph = prepared(gm, method="minmax")
        assert graph.training is training
        found = [node for node in fake_quantizers(graph) if graph_scale(graph, node).ndim == 0]
        scales.append({graph_scale(graph, node).item() for node in found})
    quantized = fxopt.optimize(
        fxopt.capture(net.eval(), fxopt.Sample(example.args, example.kwargs)),
        [Quantize(recipe="fast", method="minmax", min_sqnr_db=-99)],
    )
    wanted = {graph_scale(quantized, n).item() for n in quantized.graph.nodes if "quantize.default" in str(n.target)
              and "dequantize" not in str(n.target)}  # fmt: skip
    assert scales[0] == scales[1] == wanted


def graph_scale(gm: fxopt.CapturedModule, node: torch.fx.Node) -> Tensor:
    return gm.get_buffer(str(fxopt.tensor_arg(node, "scale").target))


def test_dropout_stays_behind_the_quantizer() -> None:
    gm = prepared(graph_of(NetWithBranches(), torch.randn(5, 6)))
    dropout = next(node for node in gm.graph.nodes if node.target is aten.dropout.default)
    # One reader of it is a float operator, the other an integer kernel: only that one reads integers.
    assert fxopt.tensor_arg(dropout, "input").target is aten.tanh.default
    assert sorted(str(user.target) for user in dropout.users) == ["aten.exp.default", "fxopt.fake_quantize.default"]
    assert fxopt.arg(dropout, "p") == 0.3


def test_weights_that_are_only_equal_stay_two_and_shared_ones_one() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = copy.deepcopy(self.a)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.a(x)))))

    gm = prepared(fxopt.capture(Twins().train(), torch.randn(3, 4)))
    read = [fxopt.tensor_arg(fxopt.tensor_arg(node, "weight"), "x").target
            for node in gm.graph.nodes if node.target is aten.linear.default]  # fmt: skip
    assert read == ["a.weight", "a.weight", "b.weight"]
    assert sum(str(fxopt.tensor_arg(n, "x").target).endswith("weight") for n in fake_quantizers(gm)) == 2


def test_scales_of_a_plan_are_those_of_the_folded_weight() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    gm = graph_of(net, torch.randn(2, 2, 6, 6), training=False)
    plan = Quantize(weight_bits=5).make_plan(gm)
    weight = next(name for name, spec in plan.items() if spec.role == "weight")
    given = plan.changed(weight, scale=(0.25, 0.5, 0.125))
    graph = prepared(gm, plan=given)
    factor = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).abs()
    torch.testing.assert_close(graph.get_buffer("0.weight_scale"), torch.tensor((0.25, 0.5, 0.125)) / factor)
    assert graph.get_buffer("relu_scale").item() == plan["relu"].scale[0]


def test_first_scales_are_no_larger_than_either_rule() -> None:
    weight = torch.randn(4, 30)
    spec = QuantSpec("weight", 2, signed=True, symmetric=True, axis=0)
    largest, learned = weight.abs().amax(1), 2 * weight.abs().mean(1)
    assert torch.equal(first_scales(weight, spec), torch.minimum(largest, learned))
    many = first_scales(weight, QuantSpec("weight", 8, signed=True, symmetric=True, axis=0))
    torch.testing.assert_close(many, largest / 127, rtol=1e-6, atol=0)


def test_the_given_graph_is_left_alone() -> None:
    net = NETS["RunningMean"]().train()  # it counts its calls, in evaluation too
    gm = fxopt.capture(net, net.example(4).args)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    assert fxopt.optimize(gm, [PrepareQat()], strict=True).report.steps[0].status == "changed"
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())


# ---- refusals


def test_nothing_to_quantize_is_reported() -> None:
    gm = fxopt.optimize(lambda x: torch.tanh(x) * 2, [PrepareQat()], torch.randn(3), strict=True)
    assert [skip.why for skip in gm.report.steps[0].skips] == [
        "ort-cpu computes nothing of this graph in integers, so there is nothing to train for"
    ]
    assert not fake_quantizers(gm)


def test_a_quantized_graph_is_refused() -> None:
    gm = prepared(fxopt.capture(nn.Linear(3, 3), torch.randn(2, 3)))
    with pytest.raises(fxopt.PassError, match="quantized already, and prepare-qat works on floats"):
        PrepareQat()(gm)


def test_a_graph_of_one_mode_is_refused_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    gm = fxopt.capture(net, torch.randn(4, 3), modes="current")
    with pytest.raises(fxopt.PassError, match="eval mode only, and quantization-aware training needs both") as error:
        PrepareQat()(gm)
    assert "modes='current'" in str(error.value)
    assert "fxopt.capture(model, example_inputs), of the module itself" in str(error.value)


def test_a_cumulative_average_has_one_mode_and_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=None)).eval()
    with pytest.raises(fxopt.PassError, match="eval mode only") as error:
        PrepareQat()(fxopt.capture(net, torch.randn(2, 2, 5, 5)))
    assert "tracing it in train mode gave" in str(error.value)


def test_one_scale_for_all_channels_does_not_go_with_batch_norm() -> None:
    gm = graph_of(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), torch.randn(2, 2, 5, 5), training=False)
    plan = Quantize().make_plan(gm)
    weight = next(name for name, spec in plan.items() if spec.role == "weight")
    with pytest.raises(fxopt.PassError, match=r"one scale for all channels, and batch_norm behind it"):
        PrepareQat(plan=plan.changed(weight, axis=None))(gm)


def test_a_plan_of_another_graph_is_refused() -> None:
    gm = fxopt.capture(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(fxopt.PassError, match="the plan names 'conv2d', which the graph does not have"):
        PrepareQat(plan=QuantPlan({"conv2d": QuantSpec()}))(gm)


def test_a_norm_that_no_layer_takes_in_is_reported() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    gm = prepared(graph_of(net, torch.randn(2, 2, 5, 5)))
    assert [skip.why for skip in gm.report.steps[0].skips] == ["relu before it is not a convolution or linear layer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "9 bits"),
        ({"weight_bits": 1}, "1 bits"),
        ({"target": "abacus"}, "abacus"),
        ({"method": "guess"}, "guess"),
    ],
)
def test_wrong_options_fail_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareQat(**options)
    with pytest.raises(TypeError, match="wanted a QuantPlan"):
        PrepareQat(plan={"a": 1})  # type: ignore[arg-type]  # the error is the point


def test_passes_that_need_floats_stand_before_it() -> None:
    with pytest.raises(fxopt.PassOrderError, match="quantize"):
        fxopt.PassManager([PrepareQat(), Quantize()])
    fxopt.PassManager([RemoveDeadCode(), PrepareQat()])
