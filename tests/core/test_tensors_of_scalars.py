"""Tensors made of lists that hold tensors and sizes, and indices: as in eager, and refused where eager refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import to_onnx

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # of eager, which reads it

MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "scalars": lambda x: torch.tensor([x.sum(), x.mean()]),
    "a tuple": lambda x: torch.tensor((x.sum(), x.mean())),
    "one element each": lambda x: torch.tensor([x[0, :1], x[1, 1:2]]),
    "numbers beside them": lambda x: torch.tensor([x.sum(), 1.5, 2, True]),
    "integers": lambda x: torch.tensor([(x > 0).sum(), 3]),
    "truths": lambda x: torch.tensor([(x > 0).all(), True]),
    "promoted": lambda x: torch.tensor([(x > 0).sum().int(), 1]),
    "half and a number": lambda x: torch.tensor([x.half().amax(), 0.5]),
    "another type": lambda x: torch.tensor([x.sum(), x.mean()], dtype=torch.float64),
    "half": lambda x: torch.as_tensor([x.sum(), 1], dtype=torch.float16),
    "lists of lists": lambda x: torch.tensor([[x.sum(), x.mean()], [x.amax(), 0.0]]),
    "sizes": lambda x: torch.tensor([x.shape[0], x.shape[1]]),
    "a size beside a tensor": lambda x: torch.tensor([x.shape[0], x.sum()]),
    "of the type of another": lambda x: x.half().new_tensor([x.sum(), x.shape[0]]),
    "of sizes alone": lambda x: x.new_tensor([x.shape[0], 2.0]),
    "of another type, asked": lambda x: x.new_tensor([x.shape[0], 2], dtype=torch.int64),
    "no type, asked": lambda x: x.new_tensor([x.shape[0], 2], dtype=None),
    "of many rows": lambda x: torch.stack([torch.tensor([column.sum(), column.amax()]) for column in x.unbind(1)]),
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.ort
@pytest.mark.parametrize("name", MADE)
def test_a_graph_makes_what_eager_makes(name: str) -> None:
    net = Net(MADE[name]).eval()
    gm = fxopt.capture(net, (torch.randn(4, 3),), dynamic_shapes=({0: "rows"},), modes="current")
    for rows in (2, 4, 7):
        wanted, got = net(x := torch.randn(rows, 3)), gm(x)
        assert got.dtype == wanted.dtype
        assert not got.requires_grad
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    to_onnx(gm)


def set_at(x: Tensor, index: object, value: object) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def ends_of_parts(x: Tensor) -> Tensor:
    lengths = [x.shape[0], x.shape[0]]
    last = [int(end) - 1 for end in torch.cumsum(torch.as_tensor(lengths), 0)]
    return torch.cat([x, -x])[last]


INDEXED: dict[str, Callable[[Tensor], Tensor]] = {
    "first and last": lambda x: x[[0, x.shape[0] - 1]],
    "one list of each axis": lambda x: x[[x.shape[0] - 1, 0], [1, 2]],
    "a tuple": lambda x: x.T[:, (0, x.shape[0] - 1)],
    "lists in a list": lambda x: x[[[0, x.shape[0] - 1], [x.shape[0] - 2, 0]],],
    "beside a slice": lambda x: x.T[1:, [x.shape[0] - 1, 0]],
    "negative": lambda x: x[[-x.shape[0], -1]],
    "written": lambda x: set_at(x, [0, x.shape[0] - 1], 0.0),
    "written from a tensor": lambda x: set_at(x, ([x.shape[0] - 1, 0], [0, 1]), x[0, :2]),
    "computed by torch": ends_of_parts,
    "where the largest stands": lambda x: x.T[:, [int(x[:, 0].argmax()), 0]],
    "the same, as a tensor": lambda x: x.T[:, [x[:, 0].argmax(), 0]],
    "written where the largest stands": lambda x: set_at(x.T, (slice(None), [int(x[:, 0].argmax()), 0]), 1.0),
    "plain": lambda x: x[[1, 0]] + x[[0, -1], [2, 1]].sum(),
    "a mask": lambda x: x[:, [True, False, True]],
}


@pytest.mark.ort
@pytest.mark.parametrize("name", INDEXED)
def test_a_graph_has_the_elements_that_lists_of_positions_name(name: str) -> None:
    net = Net(INDEXED[name]).eval()
    gm = fxopt.capture(net, (torch.randn(4, 3),), dynamic_shapes=({0: "rows"},), modes="current")
    for rows in (2, 4, 7):
        x, again = (torch.randn(rows, 3).requires_grad_() for _ in range(2))
        again.data.copy_(x.data)
        wanted, got = net(x), gm(again)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        wanted.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=0)
    to_onnx(gm)


def test_a_training_step_goes_past_it_as_in_eager():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * torch.tensor([y.mean(), y.amax(), 1.0])

    net = Weighted()
    gm = fxopt.capture(net, (x := torch.randn(4, 3),))
    gm(x).sum().backward()
    found = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(x).sum().backward()
    for got, parameter in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.tensor([x.sum(), 2.0], dtype=torch.int64),
        lambda x: torch.tensor([x[0], x[1]]),
        lambda x: torch.tensor([[x.sum()], [x.sum(), x.mean()]]),
    ],
    ids=["floats as integers", "rows", "lists of two lengths"],
)
def test_what_eager_refuses_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    net, x = Net(function), torch.randn(4, 3)
    with pytest.raises((TypeError, ValueError)):
        net(x)
    with pytest.raises(fxopt.CaptureError, match="the model itself raises"):
        fxopt.capture(net, (x,))
