"""Times of layers: each layer is named, whatever ORT fuses it with, and the search for widths takes them."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt import ExportError
from fxopt.export import to_onnx
from fxopt.export.layer_costs import layer_costs
from fxopt.passes import Quantize
from fxopt.passes.quantize.quantize import PREPARATION
from tests.passes.quantize.nets import Encoder, Residual, awake

IMAGES = torch.randn(2, 3, 8, 8)


def files(model, *inputs):
    gm = fxopt.capture(model, inputs)
    integers = fxopt.optimize(gm, [Quantize(recipe="fast")], strict=True)
    return gm, {"float": to_onnx(fxopt.optimize(gm, PREPARATION, strict=True)), 8: to_onnx(integers)}


@pytest.mark.parametrize(("model", "inputs", "layers"), [
    (awake(Residual()), (IMAGES,), {"conv2d", "conv2d_1", "conv2d_2", "linear"}),
    (Encoder().eval(), (torch.randn(2, 5, 16),), {"linear", *(f"linear_{n}" for n in range(1, 6))}),
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), (IMAGES,), {"conv2d"}),
], ids=["residual", "encoder", "an output that ORT names a layer after"])  # fmt: skip
def test_every_layer_has_a_time_at_each_width(model, inputs, layers):
    _, held = files(model, *inputs)
    costs = layer_costs(held, inputs, runs=2)
    assert layers <= set(costs)
    assert all(set(costs[name]) == {"float", 8} for name in layers)
    assert all(time > 0 for row in costs.values() for time in row.values())


def test_a_layer_with_more_to_do_takes_longer():
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 2, 1)).eval()
    _, held = files(net, torch.randn(1, 3, 32, 32))
    costs = layer_costs(held, runs=5)
    for width in ("float", 8):
        assert costs["conv2d_1"][width] > costs["conv2d_2"][width]


def test_the_search_for_widths_takes_them():
    gm, held = files(awake(Residual()), IMAGES)
    costs = layer_costs(held, runs=2)
    small = fxopt.optimize(gm, [Quantize(metric=lambda model: 1.0, costs=costs, recipe="fast")], strict=True)
    assert "cost " in small.report.steps[0].notes[-1]


def test_what_gives_no_times_is_refused():
    with pytest.raises(ExportError, match="ORT ran no kernel of the model at width 'float' that is a layer"):
        layer_costs({"float": to_onnx(fxopt.capture(nn.Softmax(1).eval(), (torch.randn(2, 3),)))})
    with pytest.raises(ValueError, match="runs is 0; wanted 1 or more"):
        layer_costs({}, runs=0)
