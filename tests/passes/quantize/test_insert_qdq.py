"""Quantizers in the graph: where they stand, what they compute, and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import PassError, PassOrderError, graph_text
from fxopt.export import Session, to_onnx
from fxopt.passes import InsertQdq, Quantize, QuantPlan, QuantSpec
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.weights import bias_integers, channel_scales, scales_for_bias
from fxopt.quantized_ops import DEQUANTIZE, QUANTIZE
from tests.passes.quantize.nets import Encoder, Residual, awake

IMAGES = torch.randn(4, 3, 8, 8)


def prepared(model, *inputs, **shapes):
    return fxopt.optimize(model.eval(), PREPARATION, inputs, strict=True, **shapes)


def integers(x, spec):
    """The formula of ONNX in float64."""
    low, high = spec.limits
    scale, zero = np.float64(spec.scale[0]), spec.zero_point[0]
    return (np.clip(np.round(np.float64(x) / scale) + zero, low, high) - zero) * scale


def test_a_layer_in_text():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return F.relu(self.linear(x))

    gm = prepared(Net(), torch.randn(4, 3))
    text = graph_text(InsertQdq(Quantize(recipe="fast").make_plan(gm))(gm).gm)
    calls = [line.split("=", 1)[1].split("(")[0].strip() for line in text.splitlines() if "(" in line and "=" in line]
    assert calls == [
        "fxopt.quantize", "fxopt.dequantize", "fxopt.dequantize", "fxopt.dequantize", "aten.linear", "aten.relu",
    ]  # fmt: skip


def test_the_graph_computes_the_formula_of_onnx():
    linear = nn.Linear(5, 4)
    x = torch.randn(16, 5)
    gm = prepared(linear, x)
    plan = Quantize(recipe="fast").make_plan(gm)
    quantized = InsertQdq(plan)(gm).gm
    quantized.recompile()
    weight = plan["weight"]
    scale = np.array(weight.scale)[:, None]
    steps = linear.weight.detach().numpy() / scale.astype(np.float32)  # as stored: a tie is one of float32
    w = np.clip(np.round(steps), -127, 127) * scale
    step = plan["input_1" if "input_1" in plan else "input"].scale[0] * np.array(weight.scale)
    b = np.round(linear.bias.detach().double().numpy() / step) * step
    activation = next(spec for spec in plan.values() if spec.role == "activation")
    want = integers(x.numpy(), activation) @ w.T + b
    np.testing.assert_allclose(quantized(x).detach().numpy(), want, rtol=0, atol=1e-5)


def test_weights_and_biases_are_stored_as_integers():
    gm = prepared(awake(Residual()), IMAGES)
    small = fxopt.optimize(gm, [Quantize(recipe="fast")], strict=True)
    held = dict(small.named_buffers())
    weights = [t for name, t in held.items() if name.endswith("weight_integers")]
    assert {t.dtype for t in weights} == {torch.int8}
    assert {t.dtype for name, t in held.items() if "bias" in name and "integers" in name} == {torch.int32}
    assert not list(small.parameters())


def test_float_readers_of_float_results_read_floats():
    gm = prepared(Encoder(), torch.randn(2, 6, 16))
    small = fxopt.optimize(gm, [Quantize(recipe="fast")], strict=True)
    adds = [node for node in small.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert adds
    assert not any(source.target is DEQUANTIZE for add in adds for source in add.all_input_nodes)


def test_every_reader_of_an_integer_result_reads_integers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y, y.exp()

    gm = prepared(Twice(), IMAGES)
    small = fxopt.optimize(gm, [Quantize(recipe="fast")], strict=True)
    conv = next(node for node in small.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    assert [user.target for user in conv.users] == [QUANTIZE]


def test_values_of_one_group_read_one_scale():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(F.max_pool2d(self.a(x), 2))

    small = fxopt.optimize(prepared(Pooled(), IMAGES), [Quantize(recipe="fast")], strict=True)
    pool = next(node for node in small.graph.nodes if node.target is torch.ops.aten.max_pool2d.default)
    before = pool.args[0].args[1]
    (behind,) = pool.users
    assert behind.target is QUANTIZE
    assert behind.args[1] is before


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 16])
def test_ort_computes_the_same_at_every_width(bits):
    gm = prepared(awake(Residual()), IMAGES, dynamic_shapes={"image": {0: "batch"}})
    small = fxopt.optimize(gm, [Quantize(bits=bits, recipe="fast", min_sqnr_db=-50)], strict=True)
    file = to_onnx(small, opset=20, validate=False)
    have = Session(file.to_bytes(), optimization="none").run([IMAGES])[0]
    noise = float((have - small(IMAGES)).abs().max())
    assert noise <= 2e-3 * float(have.abs().max())


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
@pytest.mark.parametrize("bits", [8, 16])
def test_every_opset_has_quantizers(opset, bits):
    gm = prepared(nn.Conv2d(3, 4, 3), IMAGES)
    small = fxopt.optimize(gm, [Quantize(bits=bits, recipe="fast")], strict=True)
    assert to_onnx(small, opset=opset).validation is not None


def test_the_file_holds_integers():
    net = nn.Linear(64, 64)
    x = torch.randn(2, 3, 64)
    gm = fxopt.optimize(net.eval(), [Quantize(recipe="fast")], (x,), strict=True)
    assert len(to_onnx(gm).to_bytes()) < 64 * 64 * 2


def test_quantizing_twice_is_refused():
    small = fxopt.optimize(nn.Linear(3, 2).eval(), [Quantize(recipe="fast")], (torch.randn(4, 3),), strict=True)
    with pytest.raises(PassError, match="the graph is quantized already, and quantize works on floats"):
        Quantize()(small)
    with pytest.raises(PassOrderError, match=r"quantize .step 2. needs 'no-qdq', but quantize .step 1. ended it"):
        fxopt.PassManager([Quantize(), Quantize()])


def test_a_plan_of_another_graph_is_refused():
    gm = prepared(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(PassError, match="the plan names 'conv9', which the graph does not have"):
        InsertQdq(QuantPlan({"conv9": QuantSpec(scale=(1.0,), zero_point=(0,))}))(gm)


def test_a_plan_without_scales_is_refused():
    gm = prepared(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(PassError, match="the plan gives no scale for 'weight'"):
        InsertQdq(QuantPlan({"weight": QuantSpec("weight", signed=True, symmetric=True, axis=0)}))(gm)


def test_a_layer_whose_result_is_not_planned_stays_float_and_says_so():
    gm = prepared(nn.Conv2d(3, 3, 3, groups=3), IMAGES)
    plan = Quantize(recipe="fast").make_plan(gm)
    result = InsertQdq(plan.without("conv2d"))(gm)
    assert [skip.why for skip in result.skips] == ["its result is not in the plan, and the kernel needs it in integers"]


def test_a_bias_that_32_bits_do_not_hold_is_refused_and_a_larger_weight_scale_holds_it():
    weight, bias = torch.tensor([[1e-20], [1.0]]), torch.tensor([5.0, 5.0])
    spec = QuantSpec("weight", signed=True, symmetric=True, axis=0)
    scales = channel_scales(weight, spec)
    held = QuantSpec("weight", signed=True, symmetric=True, axis=0, scale=scales, zero_point=(0, 0))
    assert bias_integers(bias, 0.01, held) is None
    raised = scales_for_bias(scales, bias, 0.01)
    assert raised[1] == scales[1]
    found = bias_integers(
        bias, 0.01, QuantSpec("weight", signed=True, symmetric=True, axis=0, scale=raised, zero_point=(0, 0))
    )
    assert found is not None
    np.testing.assert_allclose(found[0].double() * found[1].double(), bias, rtol=1e-2)


def test_a_weight_of_zeros_gets_a_scale():
    spec = QuantSpec("weight", signed=True, symmetric=True, axis=0)
    assert channel_scales(torch.tensor([[0.0, 0.0], [127.0, -3.0]]), spec) == (2.0**-100, 1.0)
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.weight)
    small = fxopt.optimize(net.eval(), [Quantize(recipe="fast")], (torch.randn(4, 3),), strict=True)
    torch.testing.assert_close(small(torch.randn(4, 3)), net.bias.expand(4, 2), rtol=0, atol=1e-4)


def test_a_weight_with_nan_is_named():
    net = nn.Linear(3, 2)
    gm = fxopt.capture(net.eval(), (torch.randn(4, 3),))
    plan = Quantize(recipe="fast").make_plan(gm).changed("weight", axis=0)
    with torch.no_grad():
        net.weight[0, 0] = float("nan")
    with pytest.raises(PassError, match="weight: the weight holds NaN or infinity"):
        Quantize(plan=plan)(gm)
