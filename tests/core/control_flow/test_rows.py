"""``for`` over the rows of tensors, as many as a dynamic size or the values of a tensor say: one graph with a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.graph_module import graph_modules
from fxopt.regions import WHILE_LOOP


def rows(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for row in x:
        total = total * 0.5 + row.sum()
    return total


def until(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for row in x:
        if row.sum() < -1:
            continue
        total = total + row.max()
        if total > 2:
            break
    return total


def enumerated(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for k, row in enumerate(x, start=1):
        total = total * 0.5 + row.sum() * k
    return total


def side_by_side(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for a, b in zip(x, x * 2, strict=True):
        total = total * 0.5 + (a * b).sum()
    return total


def to_the_shorter_one(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for k, (a, b) in enumerate(zip(x, torch.ones(3, 2), strict=False)):
        total = total * 0.5 + (a * b).sum() * k
    return total


def chosen(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for row in x[x.sum(1) > 0]:
        total = total * 0.5 + row.sum()
    return total


def places(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for i, j in (x > 0).nonzero():
        total = total * 0.5 + x[i, j]
    return total


def numbered_places(x: Tensor) -> Tensor:
    total, found = torch.zeros(()), (x > 0).nonzero()
    for k in range(found.shape[0]):
        total = total * 0.5 + x[found[k, 0], 1]
    return total


def written(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 2)
    for k, row in enumerate(x):
        y[k] = row.sort().values
    return y


FUNCTIONS = [
    rows,
    until,
    enumerated,
    side_by_side,
    to_the_shorter_one,
    chosen,
    places,
    numbered_places,
    written,
]


@pytest.mark.ort
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_graph_equals_eager_at_every_number_of_rows(function: Callable[[Tensor], Tensor]) -> None:
    from fxopt.export import to_onnx

    gm = fxopt.capture(function, (torch.randn(4, 2),), dynamic_shapes=({0: "n"},))
    assert sum(node.target is WHILE_LOOP for module in graph_modules(gm) for node in module.graph.nodes) == 1
    for n in (1, 2, 3, 4, 7, 11):
        for scale in (0.3, 1.0, -1.0):
            x = (torch.randn(n, 2) * scale).requires_grad_()
            want, got = function(x), gm(x)
            assert torch.equal(want, got)
            if want.requires_grad:
                wanted = torch.autograd.grad(want.sum(), x)
                torch.testing.assert_close(torch.autograd.grad(got.sum(), x), wanted)
    to_onnx(gm)  # compares, at other sizes and values too


class Experts(nn.Module):
    """A mixture whose Python code goes through the experts that any token chose."""

    def __init__(self, experts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = torch.topk(self.router(x).softmax(-1), 2)
        chosen = nn.functional.one_hot(experts, len(self.up)).permute(2, 1, 0)
        result = torch.zeros_like(x)
        for expert in chosen.sum((-1, -2)).greater(0).nonzero():
            place, token = torch.where(chosen[expert].squeeze(0))
            hidden = nn.functional.linear(x[token], self.up[expert[0]]).relu()
            hidden = nn.functional.linear(hidden, self.down[expert[0]]) * weights[token, place, None]
            result.index_add_(0, token, hidden)
        return result


@pytest.mark.ort
def test_a_mixture_goes_through_the_experts_that_were_chosen() -> None:
    from fxopt.export import to_onnx

    model = Experts().eval()
    gm = fxopt.capture(model, (torch.randn(6, 8),), dynamic_shapes=({0: "tokens"},))
    for tokens in (1, 2, 5, 40):
        x = torch.randn(tokens, 8)
        assert torch.equal(model(x), gm(x))
        wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(gm(x).square().sum(), list(gm.parameters()))
        torch.testing.assert_close(found, wanted)
    to_onnx(fxopt.optimize(gm, strict=True))


def listed(x: Tensor) -> Tensor:
    return torch.stack([row.sum() for row in x])


def summed(x: Tensor) -> Tensor:
    return torch.stack([a.sum() + b.sum() for a, b in zip(x, x, strict=True)])


def unpacked(x: Tensor) -> Tensor:
    first, *_ = x
    return first


def generated(x: Tensor) -> Tensor:
    def doubled() -> Iterator[Tensor]:
        for row in x:
            yield row * 2

    total = torch.zeros(())
    for row in doubled():
        total = total + row.sum()
    return total


def beside_a_list(x: Tensor) -> Tensor:
    total = torch.zeros(())
    for row, factor in zip(x, [1.0, 2.0], strict=False):
        total = total + row.sum() * factor
    return total


@pytest.mark.parametrize(
    "function", [listed, summed, unpacked, generated, beside_a_list], ids=lambda function: function.__name__
)
def test_where_no_loop_can_stand_the_error_names_the_size_to_leave_out(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(fxopt.CaptureError, match="leave 'n' out: n = 4 is its only size"):
        fxopt.capture(function, (x,), dynamic_shapes=({0: "n"},))
    assert torch.equal(fxopt.capture(function, (x,))(x), function(x))


def test_rows_of_a_fixed_number_are_no_loop() -> None:
    gm = fxopt.capture(rows, (torch.randn(4, 2),))
    assert all(node.target is not WHILE_LOOP for node in gm.graph.nodes)
