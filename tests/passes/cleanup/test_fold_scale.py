"""Constants behind layers that become a part of their weights, and those that cannot."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.passes import FoldScale, Quantize
from fxopt.testing import check_pass

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


class Behind(nn.Module):
    """A layer, and a function of its result and of a tensor for each channel."""

    def __init__(self, layer, function, *shape):
        super().__init__()
        self.layer, self.function = layer, function
        self.gamma = nn.Parameter(torch.rand(shape or (6, 1, 1)) + 0.5)

    def forward(self, x):
        return self.function(self.layer(x), self.gamma)


def calls(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("function", [
    lambda y, g: y * g,
    lambda y, g: g * y,
    lambda y, g: y / g,
    lambda y, g: y + g,
    lambda y, g: g + y,
    lambda y, g: y - g,
    lambda y, g: g - y,
    lambda y, g: torch.add(y, g, alpha=3),
    lambda y, g: torch.sub(g, y, alpha=3),
    lambda y, g: y * 0.17,
    lambda y, g: 1 - y,
    lambda y, g: torch.rsub(y, 2.5, alpha=3),
    lambda y, g: (y * 0.2 + 0.5) / 3,
    lambda y, g: (1 - y * g) - g,
], ids=range(14))  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_constants_become_a_part_of_the_weights(function, bias):
    found = check_pass(FoldScale(), Behind(nn.Conv2d(4, 6, 3, bias=bias), function), IMAGES, skips=[])
    assert calls(found.gm) == [aten.conv2d.default]


@pytest.mark.parametrize(("layer", "x", "shape"), [
    (nn.Conv1d(6, 6, 2), IMAGES[0], (6, 1)),
    (nn.Conv2d(4, 6, 2), IMAGES[0], (6, 1, 1)),
    (nn.Conv2d(4, 6, 2, groups=2), IMAGES, (1, 6, 1, 1)),
    (nn.ConvTranspose2d(4, 6, 2, groups=2), IMAGES, (6, 1, 1)),
    (nn.Linear(4, 6), ROWS, (6,)),
    (nn.Linear(4, 6), ROWS[0], (1, 6)),
    (nn.Linear(4, 6), ROWS, (1,)),
], ids=["1d", "no batch", "groups", "transposed", "linear", "matrix", "one element"])  # fmt: skip
def test_layers_of_every_kind(layer, x, shape):
    found = check_pass(FoldScale(), Behind(layer, lambda y, g: y * g + 1, *shape), x, skips=[])
    assert len(calls(found.gm)) == 1


@pytest.mark.parametrize(("move", "shape"), [
    (lambda y: y.permute(0, 2, 3, 1), (6,)),
    (lambda y: y.permute(1, 0, 2, 3), (6, 1, 1, 1)),
    (lambda y: y.transpose(-1, 1), (6,)),
    (lambda y: y.permute(0, 3, 1, 2).transpose(2, 3), (4, 1, 1)),
    (lambda y: y.permute(2, 3, 0, 1).transpose(0, 3), (6, 1, 1, 1)),
], ids=range(5))  # fmt: skip
def test_axes_may_be_moved_between(move, shape):
    model = Behind(nn.Conv2d(4, 6, 3), lambda y, g: move(y) * g, *shape)
    constant_of_width = shape == (4, 1, 1)
    why = ["its constant differs along other axes than that of the channels"] if constant_of_width else []
    found = check_pass(FoldScale(), model, IMAGES, skips=why)
    assert found.modified is not constant_of_width
    assert (aten.mul.Tensor in calls(found.gm)) is constant_of_width


def test_a_layer_without_bias_gets_none_for_a_factor():
    gm = check_pass(FoldScale(), Behind(nn.Conv2d(4, 6, 3, bias=False), lambda y, g: y * g), IMAGES).gm
    (layer,) = gm.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert fxopt.args.arg(layer, "bias") is None


@pytest.mark.parametrize(("function", "shape", "why"), [
    (lambda y, g: y * g, (4,), "its constant differs along other axes than that of the channels"),
    (lambda y, g: y * g, (6, 4, 4), "its constant differs along other axes than that of the channels"),
    (lambda y, g: y * g, (1, 2, 6, 1, 1), "its result has another type or shape than conv2d"),
    (lambda y, g: y.relu() + y * g, (6, 1, 1), "conv2d has 2 users"),
    (lambda y, g: y * g.double(), (6, 1, 1), None),
    (lambda y, g: g / y, (6, 1, 1), None),
    (lambda y, g: y * y, (6, 1, 1), None),
    (lambda y, g: y.relu() * g, (6, 1, 1), None),
    (lambda y, g: y / 0, (6, 1, 1), "the folded weights of conv2d are not finite in torch.float32"),
], ids=[
    "width", "every place", "more axes", "read twice", "other type", "divisor", "square", "behind", "by zero",
])  # fmt: skip
def test_what_is_no_constant_of_the_channels_stays(function, shape, why):
    model = Behind(nn.Conv2d(4, 6, 3), function, *shape)
    assert not check_pass(FoldScale(), model, IMAGES, skips=[] if why is None else [why]).modified


def test_gradients_reach_the_weights():
    gm = FoldScale()(fxopt.capture(Behind(nn.Linear(4, 6), lambda y, g: y * g, 6), (ROWS,))).gm
    gm.recompile()
    gm(ROWS).square().sum().backward()
    held = dict(gm.named_parameters())
    assert held["layer.weight"].grad is not None
    assert held["layer.weight"].grad.abs().sum() > 0


@settings(max_examples=20, deadline=None)
@given(st.floats(-4, 4), st.floats(-4, 4), st.integers(0, 2**31))
def test_weights_are_those_of_float64_rounded_once(scale, shift, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(4, 6)
    gm = FoldScale()(fxopt.capture(nn.Sequential(layer, Affine(scale, shift)).eval(), (ROWS,), modes="current")).gm
    held = dict(gm.named_parameters())
    assert torch.equal(held["0.weight"], (layer.weight.double() * scale).float())
    once = (layer.bias.double() * scale).float()
    torch.testing.assert_close(held["0.bias"], (once.double() + shift).float(), rtol=0, atol=0)


class Affine(nn.Module):
    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x):
        return x * self.scale + self.shift


def test_a_scaled_residual_branch_is_added_in_integers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.third(F.relu(x + 0.17 * self.second(x)))

    gm = fxopt.optimize(Block().eval(), [Quantize(recipe="fast")], (IMAGES,), strict=True)
    kinds = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert kinds.count(aten.mul.Tensor) == 0
    assert kinds.count(aten.add.Tensor) == 1


def test_layer_that_is_called_twice_keeps_one_weight():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 0.5)

        def forward(self, x):
            return self.gamma * self.layer(x).transpose(0, 1) + self.gamma * self.layer(x.flip(0)).transpose(0, 1)

    found = check_pass(FoldScale(), Twice(), ROWS)
    assert [name for name, _ in found.gm.named_parameters()] == ["layer.weight", "layer.bias"]
    assert calls(found.gm).count(aten.linear.default) == 2
    assert aten.mul.Tensor not in calls(found.gm)
