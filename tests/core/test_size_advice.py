"""Dynamic sizes that a model does not take: the error names sizes that it does take, and these can be captured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxopt
from fxopt.export import to_onnx
from fxopt.size_advice import sizes_that_work
from fxopt.size_guards import checks_always_hold


class ReadsColumns(nn.Module):
    """Convolutions with pools of other strides along the width, then an LSTM over what is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d((2, 1)), nn.Conv2d(4, 4, 2)
        )
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.layers(x).flatten(1, 2).transpose(1, 2))[0]


class DownAndUp(nn.Module):
    """Halves and doubles height and width, and adds what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 2, 2), nn.ConvTranspose2d(4, 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def halves_swapped(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, half:], x[:, :half]], 1)


def middle(x: Tensor) -> Tensor:
    return x[:, int(x.shape[1] * 0.25) : int(x.shape[1] * 0.75)]


def add_next(x: Tensor, y: Tensor) -> Tensor:
    return x[:, 1:] + y


def halves(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]


def add_long_enough(x: Tensor, y: Tensor) -> Tensor:
    return x[:, :5] + y[:, 3:8]


WIDTH = {"x": {0: "batch", 3: "width"}}
LINES = torch.randn(2, 1, 24, 40)
ROWS = torch.randn(2, 8)
# What is asked for, the advice, what it says to ask for, and the sizes of inputs that must then run.
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], Any, str, Any, list[tuple[tuple[int, ...], ...]]]] = {
    "a bound that torch cannot solve": (
        ReadsColumns(),
        (LINES,),
        WIDTH,
        "'8<=width' in place of 'width'",
        {"x": {0: "batch", 3: "8<=width"}},
        [((1, 1, 24, 8),), ((1, 1, 24, 12),), ((3, 1, 24, 41),)],
    ),
    "within the bounds that were given": (
        ReadsColumns(),
        (LINES,),
        {"x": {3: "3<=width<=64"}},
        "'8<=width<=64' in place of 'width'",
        {"x": {3: "8<=width<=64"}},
        [((2, 1, 24, 8),), ((2, 1, 24, 64),)],
    ),
    "multiples": (
        DownAndUp(),
        (LINES,),
        {"x": {2: "height", 3: "width"}},
        "2 * torch.export.Dim('_width', min=1) in place of 'width'",
        {"x": {2: 2 * Dim("_height", min=1), 3: 2 * Dim("_width", min=1)}},
        [((2, 1, 4, 6),), ((2, 1, 16, 4),), ((2, 1, 2, 2),)],
    ),
    "multiples that torch finds": (
        halves,
        (ROWS,),
        {"x": {1: "width"}},
        "2 * torch.export.Dim('_width', min=1) in place of 'width'",
        {"x": {1: 2 * Dim("_width", min=1)}},
        [((2, 4),), ((2, 10),), ((2, 2),)],
    ),
    "one size only": (
        lambda x: x @ torch.ones(8, 2),
        (ROWS,),
        {"x": {0: "batch", 1: "width"}},
        "leave 'width' out: width = 8 is its only size",
        {"x": {0: "batch"}},
        [((1, 8),), ((5, 8),)],
    ),
    "one size only, beside guards": (
        lambda x: x.chunk(2, 1)[0],
        (ROWS[:, :7],),
        {"x": {0: "batch", 1: "width"}},
        "leave 'width' out: width = 7 is its only size",
        {"x": {0: "batch"}},
        [((1, 7),), ((5, 7),)],
    ),
    "two that are equal": (
        add,
        (ROWS, ROWS.clone()),
        {"x": {1: "width"}, "y": {1: "other"}},
        "'width' in place of 'other': the two are always equal",
        {"x": {1: "width"}, "y": {1: "width"}},
        [((2, 3), (2, 3))],
    ),
    "one more than another": (
        add_next,
        (ROWS, ROWS[:, 1:].clone()),
        {"x": {1: "width"}, "y": {1: "other"}},
        "torch.export.Dim('other') + 1 in place of 'width'",
        {"x": {1: Dim("other") + 1}, "y": {1: "other"}},
        [((2, 4), (2, 3))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_error_says_to_try_can_be_captured(name: str) -> None:
    model, inputs, asked, advice, shapes, sizes = CASES[name]
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(model, inputs, dynamic_shapes=asked)
    assert advice in str(caught.value)
    gm = fxopt.capture(model, inputs, dynamic_shapes=shapes)
    for several in sizes:
        others = [torch.randn(size) for size in several]
        torch.testing.assert_close(gm(*others), model(*others))


@pytest.mark.parametrize("function", [lambda x: x[:, : x.shape[1] // 2], middle, halves_swapped])
def test_sizes_that_torch_refuses_for_guards_that_hold_or_do_not_matter_are_taken(
    function: Callable[[Tensor], Tensor],
) -> None:
    gm = fxopt.capture(function, (ROWS,), dynamic_shapes={"x": {0: "batch", 1: "width"}})
    for rows, width in [(1, 1), (2, 2), (1, 3), (5, 4), (2, 9), (3, 41)]:
        x = torch.randn(rows, width)
        assert torch.equal(gm(x), function(x))


def test_the_bound_is_the_smallest_that_the_model_takes() -> None:
    with pytest.raises(fxopt.CaptureError, match="must be such that 8 <= width\n"):
        fxopt.capture(ReadsColumns(), (LINES,), dynamic_shapes={"x": {3: "7<=width"}})
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        ReadsColumns()(LINES[..., :7])


def test_advice_that_torch_cannot_solve_is_not_repeated() -> None:
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(ReadsColumns(), (LINES,), dynamic_shapes=WIDTH)
    assert "Suggested fixes" not in str(caught.value)
    assert "min=8" not in str(caught.value)
    assert "width = L['x'].size()[3] must be such that 8 <= width\n" in str(caught.value)


GUARD = "  - Not all values of n = L['x'].size()[1] in the specified range satisfy the generated guard {}.\n"


def advice(*guards: str, refused: str | None = None, dim: Any = None, rest: str = "") -> str | None:
    text = "Constraints violated (n)!\n" + "".join(map(GUARD.format, guards)) + rest
    return sizes_that_work(text, {"x": {1: dim or Dim("n")}}, {"x": ROWS}, lambda shapes: refused)


def test_nothing_that_was_refused_is_advised() -> None:
    assert advice("8 <= L['x'].size()[1]", refused="something else") is None


def test_a_second_refusal_narrows_the_first() -> None:
    told = ["Constraints violated (n)!\n" + GUARD.format("6 <= L['x'].size()[1]"), None]
    asked: list[Any] = []

    def attempt(shapes: Any) -> str | None:
        asked.append(shapes["x"][1].min)
        return told[len(asked) - 1]

    text = GUARD.format("L['x'].size()[1] != 3")
    assert sizes_that_work(text, {"x": {1: Dim("n")}}, {"x": ROWS}, attempt) == (
        "in dynamic_shapes, '6<=n' in place of 'n'"
    )
    assert asked == [4, 6]


@pytest.mark.parametrize(
    ("guards", "dim", "wanted"),
    [
        (["L['x'].size()[1] <= 19"], Dim("n"), "'1<=n<=19' in place of 'n'"),
        (["(L['x'].size()[1] % 3) != 0"], Dim("n"), "'7<=n<=8' in place of 'n'"),
        (["(12 // (L['x'].size()[1] // 4)) >= 1"], Dim("n"), "'4<=n<=51' in place of 'n'"),
        (["(L['x'].size()[1] % 4) == 0"], Dim("n", min=3, max=30), "4 * torch.export.Dim('_n', min=1, max=7)"),
        (["2 <= L['x'].size()[1] and L['x'].size()[1] <= IntInfinity()"], Dim("n"), "'2<=n' in place of 'n'"),
        (["L['x'].size()[1] >= L['y'].size()[0]", "L['x'].size()[1] > 4"], Dim("n"), "'5<=n' in place of 'n'"),
    ],
)
def test_sizes_for_which_all_guards_hold(guards: list[str], dim: Any, wanted: str) -> None:
    found = advice(*guards, dim=dim)
    assert found is not None
    assert re.sub("^in dynamic_shapes, ", "", found).startswith(wanted)


def test_a_guard_that_only_the_example_meets_has_no_advice() -> None:
    assert advice("L['x'].size()[1] == 8") is None


def test_sizes_without_that_of_the_example_are_no_advice() -> None:
    text = GUARD.format("L['x'].size()[1] != 1")
    assert sizes_that_work(text, {"x": {1: Dim("n")}}, {"x": torch.ones(2, 1)}, lambda shapes: None) is None


@pytest.mark.ort
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, : x.shape[1] // 2],
        lambda x: x[:, -(x.shape[1] // 2) :] * 2,
        lambda x: x[:, : math.ceil(x.shape[1] / 2)],
        lambda x: x[:, math.floor(x.shape[1] * 0.5) :],
    ],
    ids=["half", "last half", "ceil", "floor"],
)
def test_what_torch_cannot_prove_is_tried_for_all_sizes(function: Callable[[Tensor], Tensor]) -> None:
    gm = fxopt.capture(function, (ROWS,), dynamic_shapes=({0: "batch", 1: "4<=width"},))
    assert all(node.target is not torch.ops.aten._assert_scalar.default for node in gm.graph.nodes)
    for width in range(4, 20):
        assert torch.equal(gm(x := torch.randn(3, width)), function(x))
    to_onnx(gm)


@pytest.mark.parametrize("asked", ["4<=width", "5<=width", "8<=width<=12"])
@pytest.mark.parametrize(
    "function",
    [lambda x: x.chunk(2, 1)[0], lambda x: x.reshape(len(x), -1, 2).sum(1)],
    ids=["as many parts as the example has", "even sizes alone"],
)
def test_guards_that_do_not_hold_for_all_sizes_stay(function: Callable[[Tensor], Tensor], asked: str) -> None:
    with pytest.raises(fxopt.CaptureError, match="fixes a size"):
        fxopt.capture(function, (ROWS,), dynamic_shapes=({0: "batch", 1: asked},))


@pytest.mark.parametrize(
    ("holds", "always"),
    [
        (lambda a, b: a * b != 35, False),
        (lambda a, b: a * b != 4095 * 4094, False),
        (lambda a, b: (a + b) // 2 <= a * b, True),
        (lambda a, b: a // (b - 3) < 9999, False),  # not defined for b = 3
        (lambda a, b: a * (b - b // 2) >= 2, True),
    ],
)
def test_an_assertion_of_two_sizes_is_computed_for_all_pairs(holds: Callable[[int, int], bool], always: bool) -> None:
    class Asserts(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(holds(x.shape[0], x.shape[1]))
            return x * 2

    program = torch.export.export(
        Asserts(),
        (ROWS,),
        dynamic_shapes=({0: Dim("a", min=2), 1: Dim("b", min=2)},),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    assert any(node.target is torch.ops.aten._assert_scalar.default for node in program.graph.nodes)
    assert checks_always_hold(program) is always
