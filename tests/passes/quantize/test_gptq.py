"""GPTQ: the paper's formula in float64, what it never does worse than, layers as matrices, and the pass."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt import PassError, Rewriter
from fxopt.numerics import measure
from fxopt.pair_sums import can_overflow
from fxopt.passes.quantize.gptq import Gptq, gptq_integers, layer_hessian
from fxopt.passes.quantize.graph_walk import Walk, items_within
from fxopt.passes.quantize.insert_qdq import InsertQdq
from fxopt.passes.quantize.layer_inputs import planned_layers
from fxopt.passes.quantize.quantize import PREPARATION, Quantize
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.weights import weight_integers
from fxopt.testing import check_pass
from tests.passes.quantize.nets import Gate


def prepared(model, *inputs, **options):
    return fxopt.optimize(model.eval(), PREPARATION, inputs, strict=True, **options)


def plan_of(gm, weight_bits=4):
    return Quantize(weight_bits=weight_bits, recipe="fast").make_plan(gm)


def correlated(rows, size):
    """Inputs of which each holds much of the others, so that an error in one weight can be made up for by others."""
    return torch.randn(rows, max(2, size // 4)) @ torch.randn(max(2, size // 4), size) + 0.1 * torch.randn(rows, size)


def losses(integers, weight, scale, hessian):
    error = integers.double().numpy() * scale.double().numpy()[..., None] - weight.double().numpy()
    return np.einsum("...oi,...ij,...oj->...o", error, hessian.numpy(), error)


def nearest(weight, scale, qmin, qmax):
    return torch.round(weight / scale[..., None]).clamp(qmin, qmax)


def brain_surgeon(weight, hessian, scale, qmin, qmax, damping, order):
    """Section 3 of the paper without its steps for speed: the inverse Hessian of what is left, updated each time."""
    h = hessian.numpy()[np.ix_(order, order)]
    inverse = np.linalg.inv(h + np.eye(len(h)) * damping * np.diag(h).mean())
    left, chosen = weight.double().numpy()[:, order].copy(), np.zeros(weight.shape)
    for i in range(len(h)):
        chosen[:, order[i]] = np.clip(np.round(left[:, i] / scale.double().numpy()), qmin, qmax)
        error = (left[:, i] - chosen[:, order[i]] * scale.double().numpy()) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return torch.from_numpy(chosen)


@pytest.mark.parametrize("by_activation", [False, True])
def test_the_formula_of_the_paper(by_activation):
    x, weight = correlated(600, 150).double(), torch.randn(5, 150)  # more columns than are brought up to date at once
    scale, hessian = weight.abs().amax(1) / 7, 2 * x.T @ x
    order = np.argsort(-np.diag(hessian.numpy()), kind="stable") if by_activation else np.arange(150)
    want = brain_surgeon(weight, hessian, scale, -7, 7, 0.01, order)
    got = gptq_integers(weight, hessian, scale, -7, 7, by_activation=by_activation)
    assert (losses(want, weight, scale, hessian) < losses(nearest(weight, scale, -7, 7), weight, scale, hessian)).all()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(2, 8), st.integers(0, 2**31))
def test_no_channel_is_worse_than_nearest_and_no_integer_outside(rows, size, bits, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, size).double(), torch.randn(3, size)
    scale, hessian, end = weight.abs().amax(1) / 2**bits, 2 * x.T @ x, 2 ** (bits - 1) - 1
    got = gptq_integers(weight, hessian, scale, -end, end)
    assert got.abs().max() <= end
    torch.testing.assert_close(got, got.round(), rtol=0, atol=0)
    before = losses(nearest(weight, scale, -end, end), weight, scale, hessian)
    assert (losses(got, weight, scale, hessian) <= before * (1 + 1e-9)).all()


def test_a_column_that_only_zeros_reach_is_rounded_to_nearest():
    x, weight = correlated(50, 8).double(), torch.randn(4, 8)
    x[:, 3] = 0
    scale = weight.abs().amax(1) / 7
    got = gptq_integers(weight, 2 * x.T @ x, scale, -7, 7)
    torch.testing.assert_close(got[:, 3], nearest(weight, scale, -7, 7)[:, 3], rtol=0, atol=0)
    assert not torch.equal(got, nearest(weight, scale, -7, 7))


def test_blocks_with_scales_and_zero_points_of_their_own():
    x, weight = correlated(80, 12).double(), torch.rand(4, 12) + torch.arange(12) // 4
    hessian = 2 * x.T @ x
    blocks = weight.reshape(4, 3, 4)
    scale = (blocks.amax(2) - blocks.amin(2)) / 15
    zero = torch.round(-blocks.amin(2) / scale)
    got = gptq_integers(weight, hessian, scale, -200, 200, zero_point=zero)
    step, offset = scale.repeat_interleave(4, 1), zero.repeat_interleave(4, 1)
    plain = torch.round(weight / step) + offset

    def loss(integers):
        error = ((integers - offset) * step - weight).double()
        return ((error @ hessian) * error).sum(1)

    assert (loss(got) < loss(plain)).all()
    assert (loss(got) < 0.8 * loss(plain)).any()


def test_groups_are_problems_of_their_own():
    x, weight = torch.stack([correlated(40, 6), correlated(40, 6)]).double(), torch.randn(2, 3, 6)
    hessian, scale = 2 * x.transpose(1, 2) @ x, weight.abs().amax(2) / 3
    both = gptq_integers(weight, hessian, scale, -3, 3)
    for group in range(2):
        alone = gptq_integers(weight[group], hessian[group], scale[group], -3, 3)
        torch.testing.assert_close(both[group], alone, rtol=0, atol=0)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"a Hessian \(3, 3\) does not fit a weight \(2, 4\)"):
        gptq_integers(torch.ones(2, 4), torch.eye(3).double(), torch.ones(2), -7, 7)
    with pytest.raises(ValueError, match=r"scales \(2, 3\) do not fit a weight \(2, 4\)"):
        gptq_integers(torch.ones(2, 4), torch.eye(4).double(), torch.ones(2, 3), -7, 7)


LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "conv1d": (nn.Conv1d(3, 4, 5, stride=2, padding=3), (2, 3, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2), (2, 4, 7, 8)),
    "same": (nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(1, 2)), (2, 3, 6, 7)),
    "valid": (nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 4, 3)),
    "unbatched": (nn.Conv2d(3, 4, 3), (3, 5, 5)),
}


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", [*LAYERS, "matmul"])
def test_a_layer_is_a_product_of_matrices(name):
    model, shape = LAYERS[name] if name in LAYERS else (Product(), (3, 5, 6))
    gm = prepared(nn.Sequential(model), torch.randn(shape))
    found = planned_layers(
        Rewriter(gm.clone(), "t"), plan_of(gm, 8), "ort-cpu", gm.samples, megabytes=1, with_targets=True
    )
    layer, _ = next(found)
    (x,), (y,) = layer.inputs, layer.targets
    layout, everything = layer.layout, torch.arange(layer.layout.count(x))
    rows = layout.rows(x)
    product = torch.bmm(rows.double(), layer.weight.double().transpose(1, 2))
    product += 0 if layer.bias is None else layer.bias.double()[:, None]
    close = {"rtol": 0, "atol": 0.1 * float(y.abs().max())}  # x is quantized and y is not
    torch.testing.assert_close(product, layout.results(y, everything).double(), **close)
    exact = next(p for p in model.parameters() if p.ndim > 1)
    torch.testing.assert_close(layout.weight(layer.weight), exact.detach(), rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(list(layout.row_chunks(x)), 1), rows, rtol=0, atol=0)
    torch.testing.assert_close(layout.rows(x, everything.flip(0)), rows.flip(1), rtol=0, atol=0)
    want = 2 * rows.double().transpose(1, 2) @ rows.double()
    torch.testing.assert_close(layer_hessian(layer), want, rtol=1e-5, atol=1e-5)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 8)

    def forward(self, image):
        x = F.relu(self.deep(F.relu(self.conv(image))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def images(count):
    small = torch.randn(count, 3, 2, 2)
    return F.interpolate(small, size=(8, 8), mode="bilinear") + 0.05 * torch.randn(count, 3, 8, 8)


def chain():
    torch.manual_seed(3)
    gm = prepared(Chain(), images(8), dynamic_shapes=({0: "batch"},))
    gm.calibration = [images(8) for _ in range(8)]
    return gm


def signal(gm, quantized, x):
    with torch.no_grad():
        return measure(gm(x), quantized(x)).sqnr_db


def test_the_pass_owes_what_every_pass_owes():
    gm = chain()
    result = check_pass(Gptq(plan=plan_of(gm), min_sqnr_db=3.0), gm, changes=3, skips=[])
    assert {change.kind for change in result.changes} == {"tensor"}


def test_insert_qdq_finds_the_very_integers_and_the_outputs_are_better():
    gm = chain()
    plan = plan_of(gm)
    rounded = Gptq(plan=plan)(gm).gm
    for name, spec in plan.items():
        if spec.role == "weight":
            weight = next(n for n in rounded.graph.nodes if n.name == name)
            held = rounded.get_parameter(str(weight.target)).detach()
            scale = torch.tensor(spec.scale).reshape(-1, *[1] * (held.ndim - 1))
            torch.testing.assert_close(weight_integers(held, spec).float() * scale, held, rtol=0, atol=0)
    x = images(32)
    assert signal(gm, InsertQdq(plan)(rounded).gm, x) > signal(gm, InsertQdq(plan)(gm).gm, x) + 3


def test_sums_that_could_not_overflow_still_cannot():
    torch.manual_seed(1)
    linear = nn.Linear(64, 32)
    gm = prepared(linear, correlated(64, 64))
    gm.calibration = [correlated(64, 64) for _ in range(4)]
    plan = plan_of(gm, 8)
    rounded = Gptq(plan=plan)(gm)
    (name,) = (name for name, spec in plan.items() if spec.role == "weight")
    assert rounded.modified
    assert not can_overflow(weight_integers(rounded.gm.weight.detach(), plan[name])).any()
    assert "could overflow" in rounded.changes[0].why


def test_a_layer_reads_what_the_settled_layers_before_it_yield():
    gm = chain()
    plan = plan_of(gm)
    rw = Rewriter(gm.clone(), "t")
    seen = []
    for layer, settle in planned_layers(rw, plan, "ort-cpu", gm.calibration, megabytes=64, with_targets=False):
        seen.append(layer.inputs[0])
        settle(layer.nearest() * 0 + 1, by="ones")
    rw.finish()
    quantized = InsertQdq(plan)(rw.gm).gm
    head = next(n for n in quantized.graph.nodes if n.target is torch.ops.aten.linear.default)
    walk = Walk(quantized, [[gm.calibration[0]]], [])
    walk.advance(head, past=False)
    torch.testing.assert_close(seen[2], walk.values(head.args[0])[0], rtol=0, atol=0)


def test_as_many_inputs_as_fit_and_one_at_least():
    gm = chain()
    assert len(items_within(gm, gm.calibration, 2048)) == 8
    assert len(items_within(gm, gm.calibration, 0)) == 1
    assert 1 < len(items_within(gm, [images(8)] * 64, 1)) < 64


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(F.relu(self.linear(x)))


def test_leaves_a_weight_that_two_layers_read():
    gm = prepared(Shared(), torch.randn(4, 6))
    why = "its weight has 2 readers; it is rounded to nearest"
    assert not check_pass(Gptq(plan=plan_of(gm, 8)), gm, skips=[why, why]).modified


def test_leaves_the_layers_of_a_branch():
    gm = prepared(Gate(), torch.randn(2, 3, 8, 8))
    why = "it runs inside a branch or loop; its weights are rounded to nearest"
    result = Gptq(plan=plan_of(gm, 8))(gm)
    assert [skip.why for skip in result.skips if "branch" in skip.why] == [why]
    assert {change.node for change in result.changes} == {"stem_weight"}


def test_refuses_what_it_cannot_work_on():
    gm = chain()
    plan = plan_of(gm)
    with pytest.raises(PassError, match="the graph is quantized already, and gptq works on floats"):
        Gptq(plan=plan)(InsertQdq(plan)(gm).gm)
    with pytest.raises(PassError, match="the plan names 'nothing', which the graph does not have"):
        Gptq(plan=plan.with_specs({"nothing": next(iter(plan.values()))}))(gm)
    with pytest.raises(PassError, match="the graph is in train mode, and a plan is for evaluation"):
        Gptq(plan=QuantPlan({}))(fxopt.capture(nn.Linear(2, 2), torch.randn(1, 2)).train())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target": "tpu"}, ValueError, "target is 'tpu'; wanted one of ort-cpu"),
        ({"plan": {}}, TypeError, "plan is a dict; wanted a QuantPlan"),
        ({"damping": 0.0}, ValueError, "damping is 0.0; wanted above 0"),
    ],
)
def test_refuses_options_that_do_not_exist(options, error, text):
    with pytest.raises(error, match=text):
        Gptq(**options)


@pytest.mark.zoo
def test_real_digits_with_4_bit_weights():
    from tests.zoo import real

    digits = real.REAL["mnist_cnn"]
    (x,) = digits.inputs(96)
    gm = fxopt.optimize(digits.load(), PREPARATION, (x[:2],), dynamic_shapes=digits.dynamic_shapes)
    gm.calibration = list(x[:64].split(16))
    plan = plan_of(gm)
    before, after = InsertQdq(plan)(gm).gm, InsertQdq(plan)(Gptq(plan=plan)(gm).gm).gm
    assert signal(gm, after, x[64:]) > signal(gm, before, x[64:]) + 3
