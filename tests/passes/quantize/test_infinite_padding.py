"""A max-pool behind a padding with minus infinity, as "same" padding is written, is right in integers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import passes
from fxopt.errors import CalibrationError
from fxopt.export import coverage, to_onnx
from fxopt.numerics import measure
from tests.models.randomized import randomized

IMAGES = torch.randn(4, 3, 11, 11, generator=torch.Generator().manual_seed(0))


class SamePool(nn.Module):
    """Convolutions with a max-pool between them whose padding differs from side to side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3)

    def forward(self, x):
        x = self.first(x) - 2.0  # so that a padding with 0 would win
        return self.second(F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-float("inf")), 3, 2))


@pytest.mark.ort
def test_the_pool_does_not_see_the_padding():
    gm = fxopt.optimize(randomized(SamePool()).eval(), passes.DEFAULT, example_inputs=(IMAGES,))
    small = fxopt.optimize(gm, [passes.Quantize(recipe="fast")], strict=True)
    assert measure(gm(IMAGES), small(IMAGES)).sqnr_db > 25
    file = to_onnx(small)  # ORT agrees, optimizer off and on
    (got,) = file.session().run([IMAGES])
    assert measure(gm(IMAGES), got).sqnr_db > 25
    assert coverage(file).integer_share == 1.0


def test_training_with_quantizers_goes_through_it():
    gm = fxopt.optimize(randomized(SamePool()).eval(), passes.DEFAULT, example_inputs=(IMAGES,))
    ready = fxopt.optimize(gm, [passes.PrepareQat()], strict=True).train()
    ready(IMAGES).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in ready.parameters())
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in ready.parameters())


def test_an_infinity_that_the_data_bring_is_still_refused():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(F.pad(x.relu().log(), (1, 1), value=0.0))

    gm = fxopt.capture(Log().eval(), (IMAGES.abs() + 1,))
    gm.calibration = [IMAGES]
    with pytest.raises(CalibrationError, match="infinite"):
        fxopt.optimize(gm, [passes.Quantize(recipe="fast", min_sqnr_db=-60)], strict=True)
