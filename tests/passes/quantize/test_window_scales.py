"""Steps of weights of few terms, chosen by what rounding leaves of the result."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.pair_sums import can_overflow
from fxopt.passes import Quantize
from fxopt.passes.quantize.placement import integer_sites
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.resolve import WeightScales
from fxopt.passes.quantize.simulate import run_by_node
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.target import ORT_CPU
from fxopt.passes.quantize.trials import Trials
from fxopt.passes.quantize.weights import constant_of, weight_integers
from fxopt.passes.quantize.window_scales import WindowMoments, searched_scales


class Product(nn.Module):
    def __init__(self, features, units):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, units))

    def forward(self, x):
        return x @ self.weight


class Products(Product):
    def __init__(self):
        super().__init__(12, 7)
        self.weight = nn.Parameter(torch.randn(2, 12, 7))


IMAGES = torch.randn(8, 6, 5, 5, generator=torch.Generator().manual_seed(0)) + 1.0
TEXTS = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(1))

LAYERS = {
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), IMAGES),
    "grouped": (nn.Conv2d(6, 4, (3, 2), stride=2, padding=1, dilation=2, groups=2), IMAGES),
    "pointwise": (nn.Conv2d(6, 8, 1), IMAGES),
    "along one axis": (nn.Conv1d(6, 8, 3, padding="same"), IMAGES.flatten(2)[..., :12]),
    "linear": (nn.Linear(12, 7), TEXTS),
    "transposed": (Product(12, 7), TEXTS),
}


def observed(net, x):
    """Return the one layer of a net, and the moments of what it reads."""
    torch.manual_seed(0)
    gm = fxopt.optimize(net.eval(), PREPARATION, (x,), modes="current", check="off")
    (site,) = [site for site in integer_sites(gm.graph, ORT_CPU, {}) if site.is_layer]
    found = WindowMoments(gm, ORT_CPU)
    for part in x.split(3):
        found.add(site.operands[0], part)
    return site, found.found()[site.node.name]


def spec_of(site, bits=8):
    return QuantSpec("weight", bits, signed=True, symmetric=True, axis=site.kernel.weight_axis)


def integers(weight, spec, scale):
    return weight_integers(weight, dataclasses.replace(spec, scale=scale, zero_point=(0,) * len(scale)))


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_what_the_weight_is_multiplied_by(name):
    net, x = LAYERS[name]
    _, moments = observed(net, x)
    rows = moments.layout.rows(x).double().numpy()
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(1), rtol=1e-6, atol=1e-6)
    for group, covariance in zip(rows, moments.covariance.numpy(), strict=True):
        np.testing.assert_allclose(
            covariance, np.cov(group.T, bias=True).reshape(covariance.shape), rtol=1e-5, atol=1e-5
        )


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.integers(0, 2**31), st.sampled_from([4, 8]))
def test_no_step_of_the_grid_leaves_less(name, seed, bits):
    net, x = LAYERS[name]
    site, moments = observed(net, x)
    weight = torch.randn(constant_of(site.weight).shape, generator=torch.Generator().manual_seed(seed))
    spec = spec_of(site, bits)
    base = WeightScales(no_saturation=False)._computed(weight, spec, site.groups)
    found = searched_scales(weight, spec, base, moments)
    matrix = moments.layout.matrix(weight).double().numpy()
    lowest, highest = spec.limits
    for number, (group, channel) in enumerate(itertools.product(*map(range, matrix.shape[:2]))):
        terms = matrix[group, channel]

        def loss(step, group=group, terms=terms):
            error = np.clip(np.round(terms / step), lowest, highest) * step - terms
            mean, covariance = moments.mean[group].numpy(), moments.covariance[group].numpy()
            return error @ covariance @ error + 0.1 * (error @ mean) ** 2

        losses = [loss(base[number] * factor) for factor in np.linspace(1.0, 1.3, 61)]
        assert found[number] >= base[number]
        assert loss(found[number]) <= min(losses) * (1 + 1e-3) + 1e-12


@functools.cache
def observed_groups():
    return observed(*LAYERS["grouped"])


@given(st.integers(0, 2**31))
def test_sums_that_could_not_saturate_still_cannot(seed):
    site, moments = observed_groups()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(constant_of(site.weight).shape, generator=generator)  # of one sign: pairs overflow
    spec = spec_of(site)
    safe = WeightScales(no_saturation=True)._computed(weight, spec, site.groups)
    risky = WeightScales(no_saturation=False)._computed(weight, spec, site.groups)
    assert bool(can_overflow(integers(weight, spec, risky), groups=2).any())
    found = searched_scales(weight, spec, safe, moments)
    assert not bool(can_overflow(integers(weight, spec, found), groups=2).any())


def test_where_neighbours_are_alike_a_fraction_is_left_of_a_depthwise_convolution():
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.randn(32, 8, 24, 24), 5, stride=1).mul(5)
    net = nn.Conv2d(8, 8, 3, groups=8)
    site, moments = observed(net, smooth)
    weight, spec = net.weight.detach(), spec_of(site)
    base = WeightScales(no_saturation=False).of(site, spec)

    def left(scale):
        rounded = integers(weight, spec, scale) * torch.tensor(scale).reshape(-1, 1, 1, 1)
        return nn.functional.conv2d(smooth, rounded - weight, groups=8).var((0, 2, 3))

    assert float(left(searched_scales(weight, spec, base, moments)).sum()) < 0.2 * float(left(base).sum())


def test_trials_try_the_steps_that_fit_what_they_have_seen():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 9, 1))
    free = {"input": {0: "batch"}}
    gm = fxopt.optimize(net.eval(), PREPARATION, (IMAGES,), dynamic_shapes=free, modes="current", check="off")
    trials = Trials(gm, [(row,) for row in IMAGES.split(1)], ORT_CPU, no_saturation=True)
    found = trials.tried(gm, Quantize(recipe="fast")._plan(gm), ("minmax",))
    moments = WindowMoments(gm, ORT_CPU)

    def watch(node, values):
        for value in values:
            moments.add(node, value)
        return values

    run_by_node(gm, trials.items[: len(trials.items) // 2], watch)
    seen, searched = moments.found(), 0
    for site in integer_sites(gm.graph, ORT_CPU, {}):
        if site.is_layer:
            spec = dataclasses.replace(found.plan[site.weight.name], scale=(), zero_point=())
            want = WeightScales(no_saturation=True).of(site, spec, seen.get(site.node.name))
            assert found.plan[site.weight.name].scale == pytest.approx(want, rel=1e-6)
            searched += want != WeightScales(no_saturation=True).of(site, spec)
    assert searched == len(seen) == 3


def test_layers_of_many_terms_or_of_no_matrix_keep_the_step_of_their_range():
    for net, x in ((nn.Linear(65, 4), torch.randn(3, 65)), (Products(), torch.randn(2, 5, 12))):
        gm = fxopt.optimize(net.eval(), PREPARATION, (x,), modes="current", check="off")
        moments = WindowMoments(gm, ORT_CPU)
        for node in gm.graph.nodes:
            moments.add(node, x)
        assert moments.found() == {}
