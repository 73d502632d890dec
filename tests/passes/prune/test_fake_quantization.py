"""Nets with masks and quantizers of training are shrunk, quantizers and all."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from tests.models.randomized import randomized
from tests.passes.prune.nets import Residual


@pytest.mark.parametrize("learned", [True, False])
def test_quantizers_of_training_shrink_with_the_channels(learned):
    images = torch.randn(8, 3, 8, 8)
    masked = fxopt.optimize(
        randomized(Residual(16, 5)).eval(),
        passes=[passes.Prune(0.5), passes.PrepareQat(learn_scales=learned)],
        example_inputs=(images[:4],),
        dynamic_shapes={"image": {0: "batch"}},
        calibration=[(images,)],
        strict=True,
    )
    small = fxopt.optimize(masked, passes=["shrink-masked"], strict=True)
    assert small.get_parameter("body.weight").shape == (8, 8, 3, 3)
    sizes = {tuple(b.shape) for name, b in small.named_buffers() if name.endswith("_scale")}
    assert sizes <= {(), (1,), (8,), (5,)}
    for mode in (False, True):
        masked.train(mode)
        small.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(small(images), masked(images), rtol=1e-4, atol=1e-5)


class AlongAnAxis(nn.Module):
    """Quantizes eight features, each with its own scale and zero point; those at ``dead`` are 0."""

    def __init__(self, dead: list[int]):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)
        self.first.weight.data[dead] = 0
        self.register_buffer("scale", torch.linspace(0.01, 0.08, 8))
        self.register_buffer("zero_point", torch.arange(8))

    def forward(self, x):
        y = torch.ops.fxopt.fake_quantize(self.first(x), self.scale, self.zero_point, 1, -128, 127)
        return self.last(y)


def test_quantizer_along_an_axis_keeps_what_each_channel_has():
    net, x = AlongAnAxis([0, 3, 6]), torch.randn(5, 4)
    small = fxopt.optimize(net, passes=["shrink-masked"], example_inputs=(x,), strict=True)
    kept = [1, 2, 4, 5, 7]
    assert torch.equal(small.get_buffer("scale"), net.scale[kept])
    assert torch.equal(small.get_buffer("zero_point"), net.zero_point[kept])
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)
