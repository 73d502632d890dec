"""Models of which torch would fix a size that they do not: traced for sizes of any value, and tried for several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxopt
from fxopt.any_sizes import any_sizes
from fxopt.errors import CaptureError


def squeezed_and_excited() -> nn.Module:
    """Return convolutions of stride 2 with gates of channels between them, of f32[batch, 3, height, width]."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * F.hardsigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))

    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), Gate(), nn.Conv2d(4, 4, 3, 2, 1), Gate()]
    return nn.Sequential(
        *layers, nn.Conv2d(4, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def test_height_and_width_of_a_convolutional_net_are_free_down_to_one() -> None:
    torch.manual_seed(0)
    model = squeezed_and_excited()
    gm = fxopt.capture(model, (torch.randn(2, 3, 24, 40),), dynamic_shapes=({0: "batch", 2: "height", 3: "width"},))
    for size in [(1, 1), (1, 9), (8, 8), (17, 3), (64, 33)]:
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :2] * 3,
        lambda x: x[:, -3:].sum(1),
        lambda x: F.avg_pool1d(F.pad(x, (0, x.shape[1] % 2)), 2, 2),
        lambda x: x.transpose(0, 1).contiguous().view(-1) + 1,
    ],
    ids=["first", "last", "pooled", "in order"],
)
def test_sizes_from_one_on(function: Callable[[Tensor], Tensor]) -> None:
    gm = fxopt.capture(function, (torch.randn(3, 6),), dynamic_shapes=({0: "batch", 1: "n"},))
    for rows, n in [(1, 1), (2, 1), (1, 2), (4, 3), (2, 11)]:
        x = torch.randn(rows, n)
        assert torch.equal(gm(x), function(x))


def test_sizes_that_an_operator_needs_stay_needed() -> None:
    halved = nn.Sequential(nn.Conv1d(3, 3, 2, 2), nn.Conv1d(3, 3, 2, 2), nn.Conv1d(3, 3, 2))
    with pytest.raises(CaptureError, match="'8<=n' in place of 'n'"):
        fxopt.capture(halved, (torch.randn(2, 3, 20),), dynamic_shapes=({2: "n"},))


def test_torch_is_as_it_was_behind_an_error() -> None:
    evaluate = ShapeEnv.evaluate_expr

    def in_the_block() -> None:
        with any_sizes():
            assert ShapeEnv.evaluate_expr is not evaluate
            raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        in_the_block()
    assert ShapeEnv.evaluate_expr is evaluate
    assert not _config.backed_size_oblivious
