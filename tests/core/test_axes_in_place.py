"""Axes that are moved in place: the same bits and gradients as eager, for views and writes too; inputs are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.core.test_functionalize import assert_refused


def squeezed(x: Tensor) -> Tensor:
    return x.unsqueeze(1).mul(3).squeeze_(1).mean(1)


def squeezed_without_an_axis(x: Tensor) -> Tensor:
    return x.mul(3).unsqueeze(2).unsqueeze(0).squeeze_() * 2


def unsqueezed(x: Tensor) -> Tensor:
    y = x + 1
    y.unsqueeze_(0)
    return y.expand(3, -1, -1) * 2


def swapped(x: Tensor) -> tuple[Tensor, Tensor]:
    y, z = x + 1, x * 2
    y.transpose_(0, 1).mul_(2)
    z.swapaxes_(0, 1)
    z.swapdims_(0, 1)
    return y.t_() @ z.t(), y


def a_view_from_before_keeps_its_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    columns = y[:, 1:]
    y.t_()
    y[0] = 5.0
    return columns, y


def written_afterwards(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    whole = y.view(-1)
    y.unsqueeze_(1)
    y[:, 0, 2:].add_(3)
    return whole * 1, y.squeeze_(1)


FUNCTIONS = (
    squeezed, squeezed_without_an_axis, unsqueezed, swapped, a_view_from_before_keeps_its_axes, written_afterwards,
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_moved_axes_equal_eager_bit_for_bit(function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]) -> None:
    gm = fxopt.capture(function, (torch.randn(4, 6),), dynamic_shapes={"x": {0: "2<=n"}})
    for rows in (4, 2, 7):
        x = torch.randn(rows, 6)
        given, own = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, got = function(given), gm(own)
        want, got = ((found,) if isinstance(found, Tensor) else found for found in (want, got))
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)
            assert a.shape == b.shape
        sum(a.sin().sum() for a in want).backward()
        sum(b.sin().sum() for b in got).backward()
        assert torch.equal(given.grad, own.grad)


class MovesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.t_()
        return x + 1


class MovesInputThatIsDense(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous().t_() + 1


class MovesInputThatIsNotDropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training).t_() + 1


class MovesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.transpose_(0, 1)


@pytest.mark.parametrize(
    ("net", "op", "line", "holder"),
    [
        (MovesInput, "t_", "x.t_()", "x"),
        (MovesInputThatIsDense, "t_", "x.contiguous().t_()", "x"),
        (MovesInputThatIsNotDropped, "t_", ".t_()", "x"),
        (MovesBuffer, "transpose_", "self.table.transpose_(0, 1)", "table"),
    ],
)
def test_axes_of_what_others_hold_are_refused(net: type[nn.Module], op: str, line: str, holder: str) -> None:
    because = f"it gives '{holder}' other axes, which the next call or the caller would see"
    assert_refused(net().eval(), torch.randn(4, 4), op=op, at=("test_axes_in_place.py:", line), because=because)
