"""Where functions cut their input off, and that an end which is computed when the graph runs is not taken for none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.limits import LIMITS, limits_of
from fxopt.numerics import measure
from fxopt.passes import Quantize

X = torch.randn(4, 5)


@pytest.mark.parametrize(("function", "wanted"), [
    (F.relu, (0.0, None)),
    (F.relu6, (0.0, 6.0)),
    (lambda x: F.hardtanh(x, -2, 3), (-2.0, 3.0)),
    (lambda x: x.clamp(-1, 1), (-1.0, 1.0)),
    (lambda x: x.clamp(max=2), (None, 2.0)),
    (lambda x: x.clip(0, 4), (0.0, 4.0)),
    (lambda x: torch.clamp_min(x, 0.5), (0.5, None)),
    (lambda x: torch.clamp_max(x, 0.5), (None, 0.5)),
])  # fmt: skip
def test_the_ends_are_where_the_results_end(function, wanted):
    (node,) = [node for node in fxopt.capture(function, (X,)).graph.nodes if node.target in LIMITS]
    assert limits_of(node) == wanted
    low, high = function(torch.tensor([-1e9, 1e9])).tolist()
    assert (low if low > -1e9 else None, high if high < 1e9 else None) == wanted


def test_other_calls_have_none():
    gm = fxopt.capture(lambda x: torch.sigmoid(x) + 1, (X,))
    assert all(limits_of(node) is None for node in gm.graph.nodes)


class CutAtSize(nn.Module):
    """Cuts off at a number that is not known before the graph runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.second(self.first(x).clamp(0, x.shape[0]))


def test_an_end_that_is_a_size_is_kept_by_quantization():
    torch.manual_seed(0)
    images = 20 * torch.randn(64, 3, 8, 8)
    gm = fxopt.capture(CutAtSize().eval(), (images[:2],), dynamic_shapes={"x": {0: "batch"}})
    assert not any(limits_of(node) for node in gm.graph.nodes)
    small = fxopt.optimize(gm, [Quantize()], calibration=[images[:2], images], strict=True)
    for count in (2, 64):
        assert measure(gm(images[:count]), small(images[:count])).sqnr_db > 20
