"""Two layers with nothing between them as one: the same numbers, what is left alone, and what it brings in 8 bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.export import coverage, to_onnx
from fxopt.numerics import measure
from fxopt.passes import ComposeLayers, Quantize
from fxopt.testing import check_pass

aten = torch.ops.aten
IMAGES, SIGNALS, ROWS = torch.randn(2, 6, 9, 7), torch.randn(2, 6, 20), torch.randn(2, 5, 6)


def composed(net, x, **options):
    gm = fxopt.optimize(net.eval(), None, (x,), modes="current")
    return gm, ComposeLayers(**options)(gm)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7)), ROWS),
        (nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 7, bias=False)), ROWS),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7, bias=False), nn.Linear(7, 5)), ROWS),
        (nn.Sequential(nn.Conv1d(6, 8, 1, stride=2), nn.Conv1d(8, 7, 1)), SIGNALS),
        (nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 7, 1)), IMAGES),
        (nn.Sequential(nn.Conv2d(6, 8, 1, stride=(1, 2)), nn.Conv2d(8, 7, 1, stride=2, bias=False)), IMAGES),
    ],
)
def test_composed_layers_compute_the_same(net, x):
    gm, result = composed(net, x)
    assert result.modified
    result.gm.recompile()
    kinds = {aten.linear.default, aten.conv1d.default, aten.conv2d.default}
    assert sum(node.target in kinds for node in result.gm.graph.nodes) == 1
    exact = net.double()(x.double())
    net.float()
    ours, theirs = (float((found(x).double() - exact).detach().abs().max()) for found in (result.gm, gm))
    assert ours < 4 * theirs + 1e-6
    check_pass(ComposeLayers(), gm)


class Shared(nn.Module):
    """The result of the first layer is read twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = self.first(x)
        return y + self.second(y)


class Computed(nn.Module):
    """The second weight comes from the input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.first(x), x[0, :, :6])


@pytest.mark.parametrize(
    ("net", "x", "reason"),
    [
        (Shared(), IMAGES, "has 2 users"),
        (Computed(), ROWS, "is computed by the graph"),
        (nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 6)), ROWS, "it would multiply 3 times as much"),
        (nn.Sequential(nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1, stride=2)), IMAGES, None),
        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7)), ROWS, ""),
        (nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 7, 1)), IMAGES, ""),
        (nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 7, 3)), IMAGES, ""),
        (nn.Sequential(nn.Conv2d(6, 8, 1, padding=1), nn.Conv2d(8, 7, 1)), IMAGES, ""),
        (nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 7, 1)), IMAGES, ""),
    ],
)
def test_others_are_left_alone(net, x, reason):
    """Reason "" for what is no such pair, None for one that is composed: a stride makes the first layer cheaper."""
    _, result = composed(net, x)
    assert result.modified == (reason is None)
    found = [skip.why for skip in result.skips]
    assert reason in found[0] if reason else not found


def test_refuses_a_limit_that_nothing_meets():
    with pytest.raises(ValueError, match="most is 0; wanted above 0"):
        ComposeLayers(most=0)


def bottleneck(largest):
    """Return a net whose bottleneck has one channel that is so much larger than the others, and counts as little."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.Conv2d(16, 32, 1), nn.ReLU6())
    with torch.no_grad():
        net[2].weight[3] *= largest
        net[3].weight[:, 3] /= largest
    return net.eval()


def quantized(net):
    images = torch.randn(32, 3, 12, 12)
    gm = fxopt.optimize(net, None, (images[:2],), dynamic_shapes={"input": {0: "batch"}}, modes="current")
    small = fxopt.optimize(gm, [Quantize()], calibration=[(image[None],) for image in images], strict=True)
    return gm, small, torch.randn(8, 3, 12, 12)


def test_the_recipe_composes_what_eight_bits_cannot_hold():
    gm, small, x = quantized(bottleneck(64.0))
    assert any(note.startswith("compose-layers") and note.endswith(", kept") for note in small.report.steps[-1].notes)
    assert coverage(to_onnx(small)).kernels["conv"] == (2, 2)
    assert measure(gm(x), small(x)).sqnr_db > 35
    plain = fxopt.optimize(gm, [Quantize(recipe="fast")], calibration=gm.samples, strict=True)
    assert measure(gm(x), plain(x)).sqnr_db < 25


def test_the_recipe_does_not_multiply_more_for_nothing():
    _, small, _ = quantized(bottleneck(1.0))
    (note,) = [note for note in small.report.steps[-1].notes if note.startswith("compose-layers: ")]
    assert note.endswith("dB are enough")
    assert coverage(to_onnx(small)).kernels["conv"] == (3, 3)
