"""What torch's own operators of control flow are refused for, and what is left to torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import fxopt
from fxopt.control_flow import markers, operators_traced
from fxopt.function_module import as_module
from fxopt.trace import trace

# torch's own operators look at the gradients of what is in a closure when they run.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

X = torch.linspace(-2, 2, 20).reshape(2, 10)


class Two(nn.Module):
    """Two layers to choose between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(10, 10), nn.Linear(10, 10)


class SizesDiffer(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: self.layer(t), lambda t: self.other(t)[:, :5] * 1, (x,))


class TypesDiffer(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: self.layer(t), lambda t: self.other(t).long(), (x,))


class StructuresDiffer(Two):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda t: (self.layer(t),), lambda t: (self.other(t), t * 2), (x,))


class LoopGrows(Two):
    def forward(self, x: Tensor) -> Any:
        return while_loop(lambda t: t.shape[0] < 9, lambda t: (torch.cat([t, self.layer(t)]),), (x,))


class LoopDrops(Two):
    def forward(self, x: Tensor) -> Any:
        return while_loop(lambda i, t: i < 3, lambda i, t: (self.layer(t),), (torch.tensor(0), x))


class ManyDecide(Two):
    def forward(self, x: Tensor) -> Any:
        return torch.cond(x > 0, lambda t: self.layer(t), lambda t: self.other(t), (x,))


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (
            SizesDiffer,
            "the two sides of a branch cannot become one value: the value is f32[2, 10] on one side and f32[2, 5] on",
        ),
        (TypesDiffer, "cannot become one value: the value is f32[2, 10] on one side and i64[2, 10] on the other"),
        (StructuresDiffer, "cannot become one value: the value is a tuple of 1 on one side and a tuple of 2 on the"),
        (LoopGrows, "changes a type: 'carried_inputs[0]' is f32[2, 10] before a turn and f32[4, 10] after it"),
        (LoopDrops, "a turn of a while_loop hands on another number of values than it was given"),
        (ManyDecide, "a branch asks for the truth of a tensor that has more than one element"),
    ],
)
def test_sides_that_do_not_match_are_refused_with_their_line(cls: type[Two], text: str) -> None:
    # The trace itself: in eager, before it, torch refuses most of these too.
    with pytest.raises(fxopt.CaptureError) as caught:
        trace(cls(), fxopt.Sample((X,)), None)
    assert text in str(caught.value)
    assert "test_operators_refused.py:" in str(caught.value)
    assert "in forward: return" in str(caught.value)
    assert "  try " in str(caught.value)
    with pytest.raises(fxopt.CaptureError, match=r"test_operators_refused\.py:"):
        fxopt.capture(cls(), X)


class SizesByFlag(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        half = 0.5 if self.training else 1.0
        return torch.cond(x.sum() > 0, lambda x: x[:1] * half, lambda x: x * half, (x,))


def test_sides_of_two_sizes_and_modes_are_captured_in_one() -> None:
    gm = fxopt.capture(SizesByFlag().eval(), X, verify=False)
    assert gm.modes == "eval"
    assert torch.equal(gm(X + 3), X[:1] + 3)


def test_sides_of_two_sizes_are_still_left_to_torch() -> None:
    gm = fxopt.capture(lambda x: torch.cond(x.sum() > 0, lambda x: x[:1] * 1, lambda x: x * 2, (x,)), X, verify=False)
    for x in (X + 1, X - 1):
        assert torch.equal(gm(x), x[:1] if x.sum() > 0 else x * 2)


class MapsRows(Two):
    def forward(self, x: Tensor) -> Any:
        return map_rows(lambda row: self.layer(row), x)


class ScansRows(Two):
    def forward(self, x: Tensor) -> Any:
        return scan(lambda state, row: (self.layer(state) + row, state * 2), x[0] * 1, x)


@pytest.mark.parametrize(("cls", "name"), [(MapsRows, "map"), (ScansRows, "scan")])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_map_and_scan_over_a_module_are_refused_with_their_line(cls: type[Two], name: str, training: bool) -> None:
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(cls().train(training), X)
    text = str(caught.value)
    assert f"torch traces the function that {name} is given by itself, and cannot" in text
    assert "got     it reads a module, which may answer otherwise in training than in evaluation" in text
    assert "test_operators_refused.py:" in text
    assert f"in forward: return {'map_rows' if name == 'map' else 'scan'}(lambda" in text
    assert "try     a Python loop over the items" in text


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")  # the reason comes after it
def test_function_that_torch_cannot_trace_is_refused_with_its_reason() -> None:
    # The trace itself: in eager, before it, torch refuses this too.
    model = as_module(lambda x: map_rows(lambda row: row * 2 if row.sum() > 0 else row, x))
    with pytest.raises(fxopt.CaptureError, match="the function that map is given by itself, and cannot") as caught:
        trace(model, fxopt.Sample((X,)), None)
    assert "Explanation: " in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "in forward" in str(caught.value)


class MapsByFlag(nn.Module):
    def __init__(self, *, differs: bool) -> None:
        super().__init__()
        self.differs, self.norm = differs, nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Any:
        twice = self.training and self.differs
        return map_rows(lambda row: row * 2 if twice else row * 3, self.norm(x))


@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_graph_of_map_that_differs_between_the_modes_is_captured_in_one(differs: bool, training: bool) -> None:
    model = MapsByFlag(differs=differs).train(training)
    gm = fxopt.capture(copy.deepcopy(model), X)
    assert gm.modes == (("train" if training else "eval") if differs else "both")
    assert ("map, scan" in gm.modes_reason) == differs
    torch.testing.assert_close(gm(X), model(X), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_advised_instead_of_map_and_scan_is_captured() -> None:
    class Rows(Two):
        def forward(self, x: Tensor) -> Any:
            state, seen = x[0] * 1, []
            for row in x:
                seen.append(state * 2)
                state = self.layer(state) + row
            return state, torch.stack(seen)

    model, scanned = Rows(), ScansRows()
    scanned.load_state_dict(model.state_dict())
    gm = fxopt.capture(model, X)
    for a, b in zip(gm(X), scanned(X), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nonlocal_variables_of_the_functions_become_choices() -> None:
    def forward(x: Tensor) -> Tensor:
        y, seen = x * 1, [x]

        def side(t: Tensor) -> Tensor:
            nonlocal y
            y = t.sin()
            seen[0] = t.cos()
            return t * 1

        z = torch.cond(x.sum() > 0, side, lambda t: t * 2, (x,))
        return y + seen[0] + z

    # torch itself refuses a side with effects, so that capture does too; the trace alone would be right.
    with pytest.raises(fxopt.CaptureError, match="the model itself raises on the example inputs"):
        fxopt.capture(forward, X.abs())
    found = trace(as_module(forward), fxopt.Sample((X,)), None)
    merges = [node for node in found.graph.nodes if node.target is markers.MERGE]
    assert len(merges) == 3


class Plain(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: self.other(x), (x,))


def test_functions_of_torch_are_left_as_they_were() -> None:
    codes = [torch.cond.__code__, while_loop.__code__]
    fxopt.capture(Plain(), X)
    with pytest.raises(fxopt.CaptureError):
        trace(SizesDiffer(), fxopt.Sample((X,)), None)
    with operators_traced():
        assert torch.cond.__code__ is not codes[0]
    assert [torch.cond.__code__, while_loop.__code__] == codes
