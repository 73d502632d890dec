"""Lists that grow in loops whose number of turns the graph counts: stacked, concatenated and read as in eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.export import Session, to_onnx

SHAPES = {0: "batch", 1: "length"}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = torch.zeros(x.shape[0], 6), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            outs.append(h)
        return torch.stack(outs, dim=1)


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.GRUCell(4, 6), nn.GRUCell(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        h = torch.zeros(x.shape[0], 6)
        ahead, back = [], []
        for t in range(x.shape[1]):
            h = self.one(x[:, t], h)
            ahead.append(h)
        h = torch.zeros(x.shape[0], 6)
        for t in range(x.shape[1] - 1, -1, -1):
            h = self.other(x[:, t], h)
            back.append(h)
        both = torch.cat([torch.stack(ahead, 1), torch.stack(back[::-1], 1)], -1)
        return both, ahead[-1], torch.stack(list(reversed(ahead))), len(back)


class SelectiveScan(nn.Module):
    """The recurrence of a state space model, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 4, 3)
        outs: list[Tensor] = []
        for t in range(x.shape[1]):
            state = torch.exp(-self.decay) * state + x[:, t, :, None]
            outs.append((state * self.decay).sum(-1))
        return torch.stack(outs, dim=-1)


class TwoATurn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        outs = [x[:, :1] * 3]
        for row in x.transpose(0, 1):
            outs.append(row[:, None].relu())
            outs.append(row[:, None] * 2)
        return torch.cat(outs, dim=1)


class ByTwos(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(1, x.shape[1] + 1, 2):
            outs.append(x[:, t - 1] * t)
        return torch.stack(outs, -1)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for i in range(x.shape[0]):
            cells = []
            for j in range(x.shape[1]):
                cells.append(x[i, j] * (i + j))
            rows.append(torch.stack(cells))
        return torch.stack(rows)


class Between(nn.Module):
    """The list goes from one method to another, and its items are gone through."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs = self.steps(x)
        total = torch.zeros_like(outs[0])
        for y in outs:
            total = total * 0.5 + y
        return self.joined(outs), total

    def steps(self, x: Tensor) -> list[Tensor]:
        outs = []
        for t in range(x.shape[1]):
            outs.append(x[:, t] * t)
        return outs

    def joined(self, outs: list[Tensor]) -> Tensor:
        return torch.stack(outs, -1)


class Decoder(nn.Module):
    """As many steps as an input says."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 6)
        y, outs = x[:, 0], []
        for _ in range(int(steps)):
            h, c = self.cell(y, (h, c))
            y = self.head(h)
            outs.append(y)
        return torch.stack(outs, 1)


def inputs_of(model: nn.Module, batch: int, length: int) -> tuple[Tensor, ...]:
    x = torch.randn(batch, length, 4)
    return (x, torch.tensor(length)) if isinstance(model, Decoder) else (x,)


NETS = [Recurrent, BothWays, SelectiveScan, TwoATurn, ByTwos, Nested, Between, Decoder]


@pytest.mark.ort
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_graph_equals_eager_at_every_length(net: type[nn.Module]) -> None:
    model = net().eval()
    shapes: tuple[Any, ...] = (SHAPES, None) if net is Decoder else (SHAPES,)
    if net is ByTwos:  # torch asks whether there is a single turn
        shapes = ({0: "batch", 1: "3<=length"},)
    gm = fxopt.capture(model, inputs_of(model, 2, 5), dynamic_shapes=shapes)
    for batch, length in ((2, 5), (1, 1), (3, 2), (2, 12)) if net is not ByTwos else ((2, 5), (1, 3), (2, 12)):
        inputs = inputs_of(model, batch, length)
        inputs[0].requires_grad_()
        want, got = (pytree.tree_leaves(each(*inputs)) for each in (model, gm))
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(want, got, strict=True))
        leaves = [inputs[0], *model.parameters()]
        wanted = torch.autograd.grad(want[0].square().sum(), leaves, allow_unused=True)
        torch.testing.assert_close(torch.autograd.grad(got[0].square().sum(), leaves, allow_unused=True), wanted)
    to_onnx(fxopt.optimize(gm, strict=True))


def reads_the_list(x: Tensor) -> Tensor:
    outs: list[Tensor] = []
    for t in range(x.shape[1]):
        outs.append(x[:, t])
        outs.append(outs[-1] * 2)
    return torch.stack(outs, 1)


def asks_its_length(x: Tensor) -> Tensor:
    outs: list[Tensor] = []
    for t in range(x.shape[1]):
        outs.append(x[:, t] * len(outs))
    return torch.stack(outs, 1)


def on_some_turns(x: Tensor) -> Tensor:
    outs = []
    for t in range(x.shape[1]):
        if x[0, t].sum() > 0:
            outs.append(x[:, t])
    return torch.stack(outs, 1)


def until_a_break(x: Tensor) -> Tensor:
    outs = []
    for t in range(x.shape[1]):
        outs.append(x[:, t])
        if x[0, t].sum() > 2:
            break
    return torch.stack(outs, 1)


def returned(x: Tensor) -> list[Tensor]:
    outs = []
    for t in range(x.shape[1]):
        outs.append(x[:, t])
    return outs


def extended_later(x: Tensor) -> Tensor:
    outs = []
    for t in range(x.shape[1]):
        outs.append(x[:, t])
    return torch.stack([*outs, x[:, 0]], 1)


def of_somebody_else(x: Tensor) -> Tensor:
    outs: list[Tensor] = []
    fill(x, outs)
    return torch.stack(outs, 1)


def fill(x: Tensor, outs: list[Tensor]) -> None:
    for t in range(x.shape[1]):
        outs.append(x[:, t])


def by_another_name(x: Tensor) -> Tensor:
    outs: list[Tensor] = []
    same = outs
    for t in range(x.shape[1]):
        outs.append(x[:, t])
    return torch.stack(same, 1)


def of_numbers(x: Tensor) -> Tensor:
    outs: list[Any] = []
    for t in range(x.shape[1]):
        outs.append(x[0, t].sum().item())
    return torch.tensor(outs)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (reads_the_list, "is read in it"),
        (asks_its_length, "is read in it"),
        (on_some_turns, "holds other items on one side"),
        (until_a_break, "changes a list of 0"),
        (returned, "otherwise than as the rows of a tensor"),
        (extended_later, "otherwise than as the rows|cannot be rewritten"),
        (of_somebody_else, "changes a list of 0"),
        (by_another_name, "cannot be rewritten"),
        (of_numbers, "changes a list of 0"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_what_is_no_tensor_of_rows_is_refused(function: Any, words: str) -> None:
    with pytest.raises(fxopt.CaptureError, match=words) as caught:
        fxopt.capture(function, (torch.randn(2, 5, 4),), dynamic_shapes=(SHAPES,))
    assert "test_growing.py:" in str(caught.value)


def test_a_tensor_that_later_turns_write_into_is_not_taken_for_many() -> None:
    def one_state(x: Tensor) -> Tensor:
        state, outs = torch.zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            state.mul_(0.5).add_(x[:, t])
            outs.append(state)
        return torch.stack(outs, 1)

    with pytest.raises(fxopt.CaptureError, match="computes something else than the model"):
        fxopt.capture(one_state, (torch.randn(2, 5, 4),), dynamic_shapes=(SHAPES,))


@pytest.mark.ort
def test_rows_that_a_loop_writes_one_by_one_are_collected_and_never_copied() -> None:
    gm = fxopt.capture(Recurrent().eval(), (torch.randn(2, 5, 4),), dynamic_shapes=(SHAPES,))
    file = to_onnx(gm)
    (loop,) = (node for node in file.model.graph if node.op_type == "Loop")
    body = loop.attributes["body"].as_graph()
    assert "ScatterND" not in {node.op_type for node in body}
    assert (len(body.inputs), len(body.outputs)) == (2 + 2, 1 + 3)  # the counter and the state; the rows come on top
    x = torch.randn(3, 300, 4)
    torch.testing.assert_close(Session(file.to_bytes()).run((x,))[0], gm(x).detach(), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """Rows that the loop also reads, so that they must be there while it turns."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 4)
        for k, row in enumerate(x):
            y[k] = row + y.sum(0)
        return y


class HalfOfThem(nn.Module):
    """Fewer turns than rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 4)
        for k in range(x.shape[0] // 2):
            y[k] = x[k].exp()
        return y


@pytest.mark.ort
@pytest.mark.parametrize("net", [Twice, HalfOfThem])
def test_other_rows_are_written_in_place(net: type[nn.Module]) -> None:
    gm = fxopt.capture(net(), (torch.randn(6, 4),), dynamic_shapes=({0: "rows"},))
    file = to_onnx(gm)
    (loop,) = (node for node in file.model.graph if node.op_type == "Loop")
    assert {"ScatterND", "ScatterElements"} & {node.op_type for node in loop.attributes["body"].as_graph()}


@pytest.mark.ort
def test_noise_of_kernels_in_a_loop_counts() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(x.shape[0], 8)
            for t in range(x.shape[1]):
                h = torch.tanh(self.layer(h) * 3 + x[:, t])
            return h

    from fxopt.export.kernel_noise import kernel_noise

    x = torch.randn(2, 6, 8)
    unrolled = fxopt.capture(Gated().eval(), (x,))
    torch.manual_seed(0)
    looped = fxopt.capture(Gated().eval(), (x,), dynamic_shapes=({0: "batch", 1: "length"},))
    floors = [kernel_noise(gm, [x])[0] for gm in (unrolled, looped)]
    assert floors[1] > 1e-8
    assert 0.2 < floors[0] / floors[1] < 5
