"""Products of activations that 8 bits leave little of: which they are, and what a recipe does about them."""

import numpy as np
import torch
from torch import nn

import fxopt
from fxopt.dimensions import Sample
from fxopt.export import Session, coverage, to_onnx
from fxopt.numerics import measure
from fxopt.passes import Quantize
from fxopt.passes.quantize.noisy_products import noisy_products
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.target import ORT_CPU

_RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randn(12, 400, 16, generator=_RANDOM) + 3 * torch.randn(12, 1, 16, generator=_RANDOM)


class Heads(nn.Module):
    """Attention of two heads: the first looks at one token, and the second, if it is ``wide``, at all alike."""

    def __init__(self, wide: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        with torch.no_grad():
            self.query.weight[:8] *= 20
            self.query.weight[8:] *= 0 if wide else 20

    def forward(self, x):
        q, k, v = (part(x).unflatten(2, (2, 8)).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(2, 3), 3)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def prepared(net):
    gm = fxopt.capture(net.eval(), (TOKENS[:2],), dynamic_shapes={"x": {0: "n"}}, modes="current")
    gm = fxopt.optimize(gm, PREPARATION, strict=True)
    gm.calibration = [(row,) for row in TOKENS[:8].split(1)]
    return gm


def planned(gm):
    return Quantize(recipe="fast", method="minmax").make_plan(gm)


def found_in(net):
    gm = prepared(net)
    return noisy_products(gm, planned(gm), ORT_CPU, [Sample((TOKENS[8:10],)), Sample((TOKENS[10:],))])


def test_the_product_of_spread_probabilities_is_one_and_no_other():
    (ratio,) = (found := found_in(Heads())).values()
    assert list(found) == ["matmul_1"]
    assert ratio < 10


def test_probabilities_of_like_size_are_not():
    assert found_in(Heads(wide=False)) == {}


def test_a_product_that_the_plan_leaves_float_is_not():
    gm = prepared(Heads())
    plan = Quantize(recipe="fast", skip=("matmul_1",)).make_plan(gm)
    assert noisy_products(gm, plan, ORT_CPU, [Sample((TOKENS[8:],))]) == {}


def test_the_ratio_is_that_of_rounded_operands_in_float64():
    gm = prepared(Heads())
    plan, net, x = planned(gm), Heads().eval().double(), TOKENS[8:].double()
    with torch.no_grad():
        q, k, v = (m(x).unflatten(2, (2, 8)).transpose(1, 2) for m in (net.query, net.key, net.value))
        weights = torch.softmax(q @ k.transpose(2, 3), 3).numpy()
    (product,) = (node for node in gm.graph.nodes if node.name == "matmul_1")
    rounded = []
    for node, value in zip(product.args, (weights, v.numpy()), strict=True):
        spec = plan[node.name]
        scale, zero_point = spec.scale[0], spec.zero_point[0]
        integers = np.clip(np.rint(value / scale) + zero_point, *spec.limits)
        rounded.append((integers - zero_point) * scale)
    want = weights @ v.numpy()
    ratio = 10 * np.log10((want**2).sum() / ((rounded[0] @ rounded[1] - want) ** 2).sum())
    found = noisy_products(gm, plan, ORT_CPU, [Sample((TOKENS[8:],))])
    assert abs(found["matmul_1"] - ratio) < 0.05


def test_a_recipe_that_tries_leaves_it_float_and_says_why():
    gm = prepared(Heads())
    held = TOKENS[8:]
    want = gm(held)
    ratios = {}
    for recipe in ("fast", "auto"):
        small = fxopt.optimize(gm, [Quantize(recipe=recipe, min_sqnr_db=-99)], calibration=gm.calibration, strict=True)
        file = to_onnx(small)
        (got,) = Session(file.to_bytes()).run([held])
        ratios[recipe] = measure(want, got).sqnr_db
    assert ratios["auto"] > ratios["fast"] + 10
    assert coverage(file).kernels["matmul"] == (1, 2)
    assert any(skip.why.startswith("8 bits leave ") for skip in small.report.steps[0].skips)
    assert any(note.startswith("floats for matmul_1: ") for note in small.report.steps[0].notes)
