"""Models that do something apart for a single row, or for none, which torch's trace leaves out of the program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CaptureError
from fxopt.export import Session, to_onnx


def doubled_alone(x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return x * 2
    return x + 1


def centred_among_others(x: Tensor) -> Tensor:
    if len(x) > 1:
        x = x - x.mean(0, keepdim=True)
    return x


def negated_alone(x: Tensor) -> Tensor:
    return -x if x.size(0) < 2 else x


def alone_in_both(x: Tensor) -> Tensor:
    if x.shape[0] == 1 and x.shape[1] == 1:
        return x - 7
    return x + 7


def counted(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    weight = 0.5 if rows == 1 else 0.25
    return x * weight, x.sum() * rows


@pytest.mark.parametrize(
    "function",
    [doubled_alone, centred_among_others, negated_alone, alone_in_both, counted],
    ids=lambda function: function.__name__,
)
def test_what_is_done_apart_is_a_branch(function: Callable[[Tensor], Tensor]) -> None:
    gm = fxopt.capture(function, (torch.randn(3, 4),), dynamic_shapes=({0: "n", 1: "m"},))
    session = Session(to_onnx(gm).to_bytes())
    for n, m in [(1, 1), (1, 4), (2, 1), (2, 2), (5, 3)]:
        x = torch.randn(n, m)
        want = function(x)
        got = gm(x)
        torch.testing.assert_close(got, want)
        wanted = list(want) if isinstance(want, tuple) else [want]
        for there, here in zip(session.run([x]), wanted, strict=True):
            torch.testing.assert_close(there, here)


class Alone(nn.Module):
    """Normalizes over the batch, except for a single row, as BatchNorm in training has to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x = self.norm(x)
        return self.dropout(self.linear(x))


def test_in_both_modes() -> None:
    torch.manual_seed(0)
    model = Alone()
    with torch.no_grad():
        model.norm.bias += 1
    gm = fxopt.capture(model, (torch.randn(6, 4),), dynamic_shapes=({0: "n"},))
    assert gm.modes == "both"
    for training in (True, False):
        model.train(training)
        gm.train(training)
        for rows in (1, 2, 7):
            x = torch.randn(rows, 4)
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            torch.manual_seed(5)
            want = model(x)
            model.load_state_dict(before)
            torch.manual_seed(5)
            torch.testing.assert_close(gm(x), want)


def test_a_shortcut_for_speed_is_no_branch() -> None:
    def summed(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x.sum(0, keepdim=True)

    gm = fxopt.capture(summed, (torch.randn(3, 4),), dynamic_shapes=({0: "n"},))
    assert not [node for node in gm.graph.nodes if "cond" in str(node.target)]


def test_a_range_without_it_needs_no_branch() -> None:
    gm = fxopt.capture(doubled_alone, (torch.randn(3, 4),), dynamic_shapes=({0: "2<=n"},))
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]


def test_refused_where_the_sides_are_of_different_shape() -> None:
    def squeezed(x: Tensor) -> Tensor:
        x = x.exp()
        return x.squeeze(0) if x.shape[0] == 1 else x

    with pytest.raises(CaptureError) as caught:
        fxopt.capture(squeezed, (torch.randn(3, 4),), dynamic_shapes=({0: "n"},))
    text = str(caught.value)
    assert text.startswith("the captured graph does something else than the model where n is 1")
    assert "'2<=n' in place of 'n'" in text
    assert "got f32[1, 4], wanted f32[4]" in text
    assert "test_zero_one.py" in text
    assert "x = x.exp()" in text


def test_a_dynamic_axis_of_size_one_is_not_squeezed_behind_the_back_of_the_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 1), Squeezed())
    with pytest.raises(CaptureError, match=r"where n is 1\n(.|\n)*wanted f32\[\](.|\n)*'2<=n<=9' in place of 'n<=9'"):
        fxopt.capture(model, (torch.randn(3, 4),), dynamic_shapes=({0: "n<=9"},))
    gm = fxopt.capture(model, (torch.randn(3, 4),), dynamic_shapes=({0: "2<=n<=9"},))
    x = torch.randn(5, 4)
    for got in (gm(x), Session(to_onnx(gm).to_bytes()).run([x])[0]):
        torch.testing.assert_close(got, model(x))


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze()


def test_none_at_all_is_compared_too() -> None:
    def zero_of_none(x: Tensor) -> Tensor:
        return x.new_zeros(()) if x.shape[0] == 0 else x.mean()

    with pytest.raises(CaptureError, match=r"where n is 0\n(.|\n)*'1<=n' in place of 'n'"):
        fxopt.capture(zero_of_none, (torch.randn(3, 4),), dynamic_shapes=({0: "n"},))


def test_nothing_is_compared_that_the_model_does_not_take() -> None:
    def paired(x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("a single row")
        return x - x.mean(0)

    gm = fxopt.capture(paired, (torch.randn(3, 4),), dynamic_shapes=({0: "n"},))
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x), paired(x))
