"""AdaRound: its two terms and their gradient, what it never does worse than, and the pass."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt import Rewriter
from fxopt.passes.quantize.adaround import (
    AdaRound,
    LayerRows,
    adaptive_rounding,
    rectified_sigmoid,
    rounding_loss,
)
from fxopt.passes.quantize.insert_qdq import InsertQdq
from fxopt.passes.quantize.layer_inputs import planned_layers
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.weights import weight_integers
from fxopt.testing import check_pass
from tests.passes.quantize.test_gptq import chain, correlated, images, nearest, plan_of, prepared, signal


def rows_of(weight, x, bias=None, low=None, high=None):
    y = torch.bmm(x, weight.transpose(1, 2))
    y = y if bias is None else y + bias[:, None]
    y = y if low is None and high is None else y.clamp(low, high)
    return LayerRows(x, y, bias, low, high)


def test_the_two_terms_of_the_paper():
    v = torch.linspace(-6, 6, 41, dtype=torch.float64)
    h = np.clip(1.2 / (1 + np.exp(-v.numpy())) - 0.1, 0, 1)
    np.testing.assert_allclose(rectified_sigmoid(v).numpy(), h, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(float(rounding_loss(rectified_sigmoid(v), 7.0)), (1 - abs(2 * h - 1) ** 7).sum())
    assert float(rounding_loss(torch.tensor([0.0, 1.0]), 2.0)) == 0


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.0, None), (0.0, 1.0), (None, 0.5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gradient_is_that_of_the_error(low, high, with_bias):
    exact, x = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 7, 5, dtype=torch.float64)
    bias = torch.randn(2, 3, dtype=torch.float64) if with_bias else None
    rows = rows_of(exact, x, bias, low, high)
    weight = (exact + 0.3 * torch.randn(2, 3, 5, dtype=torch.float64)).requires_grad_()
    y = torch.einsum("gri,goi->gro", x, weight) + (0 if bias is None else bias[:, None])
    y = y if low is None and high is None else y.clamp(low, high)
    want = ((y - rows.targets) ** 2).mean(1)
    want.sum().backward()
    torch.testing.assert_close(rows.errors(weight.detach()), want.detach())
    torch.testing.assert_close(rows.gradient(weight.detach(), torch.arange(7)), weight.grad)


def test_comes_near_the_best_of_all_ways_to_round():
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        weight, x = torch.randn(1, 1, 8), correlated(64, 8)[None]
        scale = weight.abs().amax(2) / 3
        rows = rows_of(weight, x)
        floor = torch.floor(weight / scale[..., None])
        ways = [floor + torch.tensor(way, dtype=torch.float32) for way in itertools.product((0, 1), repeat=8)]
        best = min(float(rows.errors(way.clamp(-3, 3) * scale[..., None])) for way in ways)
        got = float(rows.errors(adaptive_rounding(weight, scale, rows, -3, 3) * scale[..., None]))
        plain = float(rows.errors(nearest(weight, scale, -3, 3) * scale[..., None]))
        assert best * 0.999 <= got <= plain
        ratios.append((got - best) / (plain - best) if plain > best else 0.0)
    assert np.mean(ratios) < 0.25  # of the way from the best to nearest


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 8), st.integers(0, 2**31))
def test_no_channel_is_worse_than_nearest_and_each_integer_is_beside_its_weight(groups, size, bits, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(groups, 3, size), torch.randn(groups, 20, size)
    scale, end = weight.abs().amax(2) / 2**bits, 2 ** (bits - 1) - 1
    rows = rows_of(weight, x, low=0.0)
    got = adaptive_rounding(weight, scale, rows, -end, end, iterations=20, seed=seed)
    steps = weight / scale[..., None]
    assert (got.abs() <= end).all()
    assert (((got - steps).abs() < 1) | (got == steps.sign() * end)).all()
    before = rows.errors(nearest(weight, scale, -end, end) * scale[..., None])
    assert (rows.errors(got * scale[..., None]) <= before).all()


def test_the_same_seed_gives_the_same_integers():
    weight, x = torch.randn(1, 8, 32), correlated(400, 32)[None]
    rows, scale = rows_of(weight, x), weight.abs().amax(2) / 7
    first, again = (adaptive_rounding(weight, scale, rows, -7, 7, iterations=50, seed=4) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, adaptive_rounding(weight, scale, rows, -7, 7, iterations=50, seed=5))


def test_rows_are_drawn_from_all_inputs_and_belong_together():
    gm = chain()
    layers = planned_layers(
        Rewriter(gm.clone(), "t"), plan_of(gm, 8), "ort-cpu", gm.calibration, megabytes=64, with_targets=True
    )
    layer, _ = next(layers)
    assert layer.limits == (0.0, None)
    rows = LayerRows.of(layer, 0)
    assert rows.inputs.shape == (1, 512, 27)  # of 8 x 8 x 64
    assert float(rows.errors(layer.weight).sum()) < 1e-3 * float(rows.targets.square().mean(1).sum())
    own = LayerRows.of(layer, 0, asymmetric=False)
    torch.testing.assert_close(own.errors(layer.weight), torch.zeros(1, 16), rtol=0, atol=1e-10)
    far = dataclasses.replace(layer, inputs=[x + 1000 * i for i, x in enumerate(layer.inputs)])
    assert {int(v) for v in (LayerRows.of(far, 0).inputs[0, :, 13] / 1000).round()} >= set(range(1, 8))


def test_the_pass_owes_what_every_pass_owes():
    gm = chain()
    result = check_pass(AdaRound(plan=plan_of(gm), iterations=60, min_sqnr_db=3.0), gm, changes=3)
    assert all(change.kind == "tensor" and "channels by AdaRound" in change.why for change in result.changes)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_insert_qdq_finds_the_very_integers_and_the_outputs_are_better(asymmetric):
    gm = chain()
    plan = plan_of(gm)
    rounded = AdaRound(plan=plan, asymmetric=asymmetric)(gm).gm
    for name, spec in plan.items():
        if spec.role == "weight":
            weight = next(n for n in rounded.graph.nodes if n.name == name)
            held = rounded.get_parameter(str(weight.target)).detach()
            scale = torch.tensor(spec.scale).reshape(-1, *[1] * (held.ndim - 1))
            torch.testing.assert_close(weight_integers(held, spec).float() * scale, held, rtol=0, atol=0)
    x = images(32)
    assert signal(gm, InsertQdq(plan)(rounded).gm, x) > signal(gm, InsertQdq(plan)(gm).gm, x) + 3


def test_says_so_where_nearest_is_as_good():
    linear = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3) + 1e-5 * torch.randn(3, 4))
    gm = prepared(linear, torch.eye(4) + 0.1)
    why = "rounding to nearest is as good in all channels"
    result = AdaRound(plan=plan_of(gm, 8), iterations=5, asymmetric=False)(gm)
    assert [skip.why for skip in result.skips] == [why]


def test_nothing_to_do_on_the_grid():
    gm = chain()
    plan = plan_of(gm)
    rounded = AdaRound(plan=plan, iterations=20)(gm).gm
    assert not AdaRound(plan=plan, iterations=20)(rounded).modified


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x):
        first, second = self.a(x), self.b(x)
        return F.relu(first) + second  # the relu of the first layer stands behind the second layer


def test_the_target_of_a_layer_may_stand_behind_the_next_layer():
    gm = prepared(Two(), torch.randn(16, 6))
    assert len(AdaRound(plan=plan_of(gm), iterations=20, min_sqnr_db=3.0)(gm).changes) == 2


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target": "tpu"}, ValueError, "target is 'tpu'; wanted one of ort-cpu"),
        ({"plan": {}}, TypeError, "plan is a dict; wanted a QuantPlan"),
        ({"iterations": 0}, ValueError, "iterations is 0; wanted at least 1"),
        ({"strength": -1.0}, ValueError, "strength is -1.0; wanted at least 0"),
    ],
)
def test_refuses_options_that_do_not_exist(options, error, text):
    with pytest.raises(error, match=text):
        AdaRound(**options)


@pytest.mark.zoo
@pytest.mark.slow
def test_real_digits_with_4_bit_weights():
    from tests.zoo import real

    digits = real.REAL["mnist_cnn"]
    (x,) = digits.inputs(96)
    gm = fxopt.optimize(digits.load(), PREPARATION, (x[:2],), dynamic_shapes=digits.dynamic_shapes)
    gm.calibration = list(x[:64].split(16))
    plan = plan_of(gm)
    before, after = InsertQdq(plan)(gm).gm, InsertQdq(plan)(AdaRound(plan=plan)(gm).gm).gm
    assert signal(gm, after, x[64:]) > signal(gm, before, x[64:]) + 3


@pytest.mark.zoo
@pytest.mark.slow
def test_real_photos_with_4_bit_weights_where_nearest_leaves_noise():
    from tests.zoo import real

    photos = real.REAL["mobilenetv2"]
    (x,) = photos.inputs(32)
    gm = fxopt.optimize(photos.load(), PREPARATION, (x[:2],), dynamic_shapes=photos.dynamic_shapes)
    gm.calibration = list(x[:24].split(4))
    plan = plan_of(gm)
    before, after = InsertQdq(plan)(gm).gm, InsertQdq(plan)(AdaRound(plan=plan, iterations=60)(gm).gm).gm
    assert signal(gm, before, x[24:]) < 3
    assert signal(gm, after, x[24:]) > 6
