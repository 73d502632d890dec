"""Layers that integers make no faster: which they are, and that a recipe leaves them float only for accuracy."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.export import coverage, to_onnx
from fxopt.passes import Quantize
from fxopt.passes.quantize.no_gain import layers_without_gain
from fxopt.passes.quantize.placement import place
from fxopt.passes.quantize.target import GENERIC, ORT_CPU
from tests.models.randomized import randomized

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class FirstLayer(nn.Module):
    """A convolution of the image, what follows it, then layers that are worth their integers."""

    def __init__(self, *behind, channels=3, kernel=3):
        super().__init__()
        self.first = nn.Conv2d(channels, 8, kernel, padding=1)
        self.behind = nn.Sequential(*behind)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 64, 3, padding=1)

    def forward(self, image):
        return self.third(self.second(self.behind(self.first(image))).relu())


class Heads(nn.Module):
    """A detector: one large layer, and outputs of a few numbers each behind a function without an integer kernel."""

    def __init__(self, width=512):
        super().__init__()
        self.body = nn.Conv2d(3, width, 5, 2)
        self.norm = nn.LayerNorm(width)
        self.score, self.box = nn.Linear(width, 2), nn.Linear(width, 4)

    def forward(self, image):
        y = self.norm(self.body(image).relu().mean((2, 3)))
        return self.score(y), self.box(y)


def found_in(net, images=IMAGES, target=ORT_CPU):
    gm = fxopt.optimize(randomized(net).eval(), passes.DEFAULT, example_inputs=(images,))
    gm.calibration = [(images,)]
    return layers_without_gain(gm, Quantize(recipe="fast", target=target.name).make_plan(gm), target)


@pytest.mark.parametrize("behind", [nn.Hardswish(), nn.GELU(), nn.PReLU(8)])
def test_a_first_convolution_of_few_products_in_front_of_floats_is_one(behind):
    assert found_in(FirstLayer(behind)) == {"conv2d": "27 products for each number that is converted"}


def test_more_products_are_worth_their_integers():
    assert found_in(FirstLayer(nn.Hardswish(), kernel=5)) == {}
    assert found_in(FirstLayer(nn.Hardswish(), channels=8), torch.randn(2, 8, 16, 16)) == {}


@pytest.mark.parametrize(
    "behind", [nn.ReLU(), nn.Sigmoid(), nn.MaxPool2d(2), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))]
)
def test_a_first_convolution_that_integers_follow_is_none(behind):
    assert found_in(FirstLayer(behind)) == {}


def test_a_depthwise_convolution_between_floats_behind_integers_is_none():
    middle = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    behind = nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Hardswish(), middle, nn.Hardswish()
    assert found_in(FirstLayer(*behind)) == {}


def test_last_layers_of_few_outputs_are_ones_as_long_as_they_are_one_percent_together():
    assert set(found_in(Heads(), IMAGES[:2])) == {"linear", "linear_1"}
    assert found_in(Heads(), torch.randn(2, 3, 5, 5)) == {}  # the body works less, the heads are a larger share
    assert found_in(Heads(), IMAGES[:2], GENERIC) == {}  # of which nothing is known


class Uneven(FirstLayer):
    """Channels behind the first layer differ in size by a factor, and count the same to the second."""

    def __init__(self):
        super().__init__(nn.PReLU(8))

    def even(self, factor):
        sizes = torch.logspace(0, 1, 8) ** torch.log10(torch.tensor(factor))
        with torch.no_grad():
            self.first.weight *= sizes[:, None, None, None]
            self.first.bias *= sizes
            self.second.weight /= sizes[None, :, None, None]
        return self


@pytest.mark.parametrize(("factor", "is_float"), [(1.0, True), (200.0, False)])
def test_a_recipe_leaves_them_float_only_where_that_is_more_exact(factor, is_float):
    # With a large factor the one scale in front of the second layer is what limits.
    net = randomized(Uneven()).eval().even(factor)
    gm = fxopt.optimize(
        net, [Quantize(min_sqnr_db=-100.0)], example_inputs=(IMAGES,), calibration=[(IMAGES,)], strict=True
    )
    (step,) = gm.report.steps
    notes = [note for note in step.notes if "floats for conv2d" in note]
    assert len(notes) == 1
    assert notes[0].endswith(", kept") is is_float
    reasons = {skip.node: skip.why for skip in step.skips}
    assert reasons == ({"conv2d": REASON} if is_float else {})
    assert coverage(to_onnx(gm)).kernels["conv"] == (2 if is_float else 3, 3)


REASON = "integers would make it no faster: 27 products for each number that is converted"


@pytest.mark.parametrize(("behind", "in_front"), [(nn.Hardswish(), False), (nn.ReLU(), True)])
def test_floats_are_quantized_behind_their_pool_and_integers_in_front_of_it(behind, in_front):
    net = FirstLayer(behind, nn.MaxPool2d(2))
    gm = fxopt.optimize(randomized(net).eval(), passes.DEFAULT, example_inputs=(IMAGES,))
    plan = place(gm, ORT_CPU)
    (pool,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.max_pool2d.default)
    assert pool.name in plan
    assert (pool.args[0].name in plan) is in_front
