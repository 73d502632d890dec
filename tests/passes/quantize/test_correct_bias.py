"""Bias correction: of means behind rectifiers, and of what is more than chance."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.passes import CorrectBias, InsertQdq, Quantize
from fxopt.passes.quantize.correct_bias import ChannelMeans, _beyond_chance, _lacking, rectifiers_behind
from fxopt.passes.quantize.placement import integer_sites
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.target import ORT_CPU

torch.manual_seed(0)
IMAGES = torch.randn(16, 3, 12, 12)


def prepared(net):
    return fxopt.optimize(net.eval(), PREPARATION, (IMAGES,), strict=True)


def corrected(gm, plan):
    found = CorrectBias(plan)(gm).gm
    found.recompile()
    return found


def integers(gm, plan):
    found = InsertQdq(plan)(gm).gm
    found.recompile()
    return found


def off(gm, other):
    """Return by how much the mean of each channel of the output differs."""
    return (other(IMAGES) - gm(IMAGES)).detach().mean((0, 2, 3)).abs()


def test_the_means_of_channels_are_restored():
    torch.manual_seed(3)
    gm = prepared(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)))
    plan = Quantize(bits=8, weight_bits=3).make_plan(gm)
    left = off(gm, integers(corrected(gm, plan), plan)).max()
    assert float(left) < 0.1 * float(off(gm, integers(gm, plan)).max())


RECTIFIERS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "clamped": nn.Hardtanh(-0.25, 2.0),
    "leaky relu": nn.LeakyReLU(0.05),
    "prelu": nn.PReLU(8, 0.1),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}


@pytest.mark.parametrize("name", RECTIFIERS)
def test_behind_a_rectifier_the_mean_of_what_it_yields_is_restored(name):
    """All numbers a tenth too large: in the mean too low by a tenth of what lies below 0, and too high behind f."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), RECTIFIERS[name])
    gm = prepared(net)
    (site,) = [site for site in integer_sites(gm.graph, ORT_CPU, {}) if site.is_layer]
    y = torch.randn(16, 8, 12, 12) - torch.linspace(0.5, 1.5, 8)[:, None, None]
    f, means = net[1], ChannelMeans(gm, ORT_CPU)
    means.add(site.node, y)
    means.add(rectifiers_behind(site)[-1], f(y))
    shift = _lacking(site, list((1.1 * y).split(4)), means.found()).float()
    before, after = (
        (f(value) - f(y)).detach().mean((0, 2, 3)).abs() for value in (1.1 * y, 1.1 * y + shift[:, None, None])
    )
    assert (after <= before).all()
    assert float(after.sum()) < 0.4 * float(before.sum())


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        return torch.relu(y), y + 1


class GateOfAnother(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(x))


class SlopesOfTheInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.prelu(self.conv(x), x[0, 0, 0, :4])


@pytest.mark.parametrize(
    ("net", "want"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), ["relu"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(), nn.ReLU6()), ["leaky_relu", "hardtanh"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()), []),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.ReLU()), ["sigmoid", "mul", "relu"]),
        (nn.Conv2d(3, 4, 1), []),
        (GateOfAnother(), []),
        (TwoReaders(), []),
        (SlopesOfTheInput(), []),
    ],
    ids=["one", "two", "no rectifier", "a gate", "nothing", "a gate of another", "two readers", "slopes of the input"],
)
def test_rectifiers_that_alone_read_a_layer(net, want):
    gm = prepared(net)
    site = next(site for site in integer_sites(gm.graph, ORT_CPU, {}) if site.is_layer)
    assert [str(node.target).split(".")[1] for node in rectifiers_behind(site)] == want


def test_a_channel_that_the_rectifier_cuts_off_is_left_alone():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with torch.no_grad():
        net[0].bias[1] = -100.0
    gm = prepared(net)
    other = corrected(gm, Quantize(bits=8, weight_bits=3).make_plan(gm))
    moved = other.get_parameter("0.bias") - gm.get_parameter("0.bias")
    assert moved[1] == 0
    assert (moved[[0, 2, 3]] != 0).all()


@given(st.integers(0, 2**31), st.integers(2, 40), st.floats(0.0, 3.0))
def test_what_chance_explains_of_an_error_is_not_corrected(seed, rows, mean):
    errors = np.random.default_rng(seed).normal(mean, 1.0, (rows, 5))
    found = _beyond_chance(torch.tensor(errors)).numpy()
    for channel in range(5):
        average = errors[:, channel].mean()
        variance = errors[:, channel].var(ddof=1) / rows
        want = average * max(0.0, 1 - variance / average**2)
        np.testing.assert_allclose(found[channel], want, rtol=1e-9, atol=1e-12)


def test_errors_that_are_alike_in_all_rows_are_corrected_whole():
    errors = torch.tensor([[0.5, 0.0, -0.125]], dtype=torch.float64)
    assert torch.equal(_beyond_chance(errors.expand(4, 3)), errors[0])
    assert torch.equal(_beyond_chance(errors), errors[0])  # of one row nobody knows better


def test_a_mean_over_rows_that_differ_by_chance_is_worth_less_than_none():
    """Eight rows of heavy tails: what they tell of a mean makes other rows worse unless chance is taken out."""
    generator = np.random.default_rng(0)
    whole, shrunk = [], []
    for _ in range(400):
        errors = torch.tensor(generator.standard_t(3, (8, 16)))
        whole.append(float(errors.mean(0).square().sum()))
        shrunk.append(float(_beyond_chance(errors).square().sum()))
    assert np.mean(shrunk) < 0.6 * np.mean(whole)
