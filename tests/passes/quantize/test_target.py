"""Each row of the table of ORT's integer kernels against the installed ORT, and against what fxopt makes of it."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.export import coverage, optimized_model, to_onnx
from fxopt.limits import LIMITS
from fxopt.passes import InsertQdq, Quantize
from fxopt.passes.quantize.target import GENERIC, ORT_CPU, TARGETS

pytestmark = pytest.mark.ort


class Around(nn.Module):
    """An operator between two convolutions, so that integers arrive at it and are wanted behind it."""

    def __init__(self, between, channels=4):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(channels, 4, 1)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


IMAGE = torch.randn(2, 3, 8, 8)


def quantized(model, *inputs, **options):
    options = {"recipe": "fast", "min_sqnr_db": 15.0} | options
    return fxopt.optimize(model.eval(), [Quantize(**options)], inputs, strict=True)


def kernels(gm):
    return Counter(node.op_type for node in optimized_model(to_onnx(gm).to_bytes()).graph)


def joining(op_type, between, channels=4):
    return pytest.param(op_type, between, channels, id=op_type)


@pytest.mark.parametrize(
    ("op_type", "between", "channels"),
    [
        joining("QLinearAdd", lambda x: x + x.roll(1, 1)),
        joining("QLinearAdd", lambda x: F.relu(x + F.max_pool2d(x, 3, 1, 1))),
        joining("QLinearMul", lambda x: x * F.adaptive_avg_pool2d(x, 1)),
        joining("QLinearSigmoid", torch.sigmoid),
        joining("QLinearLeakyRelu", lambda x: F.leaky_relu(x, 0.1)),
        joining("QLinearAveragePool", lambda x: F.avg_pool2d(x, 2)),
        joining("QLinearGlobalAveragePool", lambda x: F.adaptive_avg_pool2d(x, 1)),
        joining("QLinearGlobalAveragePool", lambda x: x.mean((2, 3), keepdim=True)),
        joining("QLinearConcat", lambda x: torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1), 8),
        joining("QLinearSigmoid", F.silu),
        joining("QLinearAdd", F.hardsigmoid),
        joining("QLinearMul", F.hardswish),
        joining("QLinearMul", lambda x: x * F.hardsigmoid(F.adaptive_avg_pool2d(x, 1))),
    ],
)
def test_ort_computes_what_joins_in_integers(op_type, between, channels):
    gm = quantized(Around(between, channels), IMAGE)
    found = kernels(gm)
    assert found["QLinearConv"] == 2, found
    assert found[op_type] == 1, found
    assert found["Conv"] == found["FusedConv"] == 0, found


@pytest.mark.parametrize("move", [
    lambda x: x.reshape(2, 4, 16, 4), lambda x: x.transpose(2, 3), lambda x: x.permute(0, 1, 3, 2),
    lambda x: F.max_pool2d(x, 2), lambda x: x[:, :, 1:5], lambda x: x.flatten(2).unsqueeze(-1),
    lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, (9, 5), mode="nearest-exact"),
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), lambda x: torch.cat(F.relu(x).split([1, 3], 1), 1),
], ids=[
    "reshape", "transpose", "permute", "max_pool", "slice", "flatten", "nearest", "nearest-exact", "chunk", "split",
])  # fmt: skip
def test_moves_are_made_by_integers_of_one_scale(move):
    gm = quantized(Around(move), IMAGE)
    found = kernels(gm)
    assert found["QLinearConv"] == 2
    assert found["QuantizeLinear"] + found["DequantizeLinear"] <= 2, found


@pytest.mark.parametrize("limit", [F.relu, F.relu6, lambda x: x.clamp(0, 1), lambda x: F.hardtanh(x, 0, 2)])
def test_saturation_stands_for_limits(limit):
    gm = quantized(Around(limit), IMAGE)
    assert not any(node.target in LIMITS for node in gm.graph.nodes)
    found = kernels(gm)
    assert found["QLinearConv"] == 2
    assert not found["Relu"] + found["Clip"], found


def test_a_limit_below_zero_stays():
    gm = quantized(Around(lambda x: x.clamp(-0.5, 0.5)), IMAGE)
    assert any(node.target is torch.ops.aten.clamp.default for node in gm.graph.nodes)


@pytest.mark.parametrize("rank", [2, 3])
def test_linear_layers_are_integer_with_and_without_a_quantizer_behind(rank):
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(*(5,) * (rank - 1), 16)
    report = coverage(to_onnx(quantized(net, x)))
    assert report.kernels["linear"] == (3, 3)
    assert report.integer_share == 1.0


@pytest.mark.parametrize(("module", "shape"), [
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 6, 6)),
    (nn.Conv2d(4, 4, 3, padding="same", bias=False), (2, 4, 6, 6)),
    (nn.Conv2d(4, 6, 3, stride=2, dilation=2), (2, 4, 9, 9)),
], ids=["1d", "3d", "depthwise multiplier", "same padding, no bias", "stride and dilation"])  # fmt: skip
def test_convolutions_of_every_kind_are_integer(module, shape):
    found = kernels(quantized(module, torch.randn(*shape)))
    assert found["QLinearConv"] == 1


def test_a_transposed_convolution_has_no_integer_kernel_and_stays_as_it_is():
    gm = fxopt.optimize(nn.ConvTranspose2d(3, 4, 2).eval(), [Quantize(recipe="fast")], (IMAGE,), strict=True)
    assert gm.report.steps[0].changes == ()


def test_products_of_two_activations_are_integer():
    class Scores(nn.Module):
        def forward(self, a, b):
            return (a @ b.transpose(1, 2)).softmax(-1) @ b

    a, b = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    report = coverage(to_onnx(quantized(Scores(), a, b)))
    assert report.kernels["matmul"] == (2, 2)


def test_the_generic_target_has_signed_activations():
    gm = quantized(Around(F.relu), IMAGE, target="onnx")
    plan = Quantize(target="onnx").make_plan(fxopt.capture(Around(F.relu).eval(), (IMAGE,)))
    assert {spec.signed for spec in plan.values()} == {True}
    assert to_onnx(gm).validation is not None


def test_targets_are_found_by_name():
    assert TARGETS == {"ort-cpu": ORT_CPU, "onnx": GENERIC}
    with pytest.raises(ValueError, match="target is 'tensorrt'; wanted one of ort-cpu, onnx"):
        InsertQdq(target="tensorrt")
