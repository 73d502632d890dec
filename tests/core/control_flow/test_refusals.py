"""What cannot be captured is refused with the user's line, what was found and what to try."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.control_flow import loops

X = torch.randn(3, 4)


def shapes_differ(x: Tensor) -> Tensor:
    if x.sum() > 0:
        y = x[:, :2]
    else:
        y = x
    return y


def types_differ(x: Tensor) -> Tensor:
    return x.long() if x.sum() > 0 else x


def none_on_one_side(x: Tensor) -> Tensor | None:
    if x.sum() > 0:
        return x
    return None


def many_elements(x: Tensor) -> Tensor:
    if x > 0:
        x = x + 1
    return x


def grows_a_list(x: Tensor) -> Tensor:
    seen = [x]
    while x.norm() > 1:
        x = x / 2
        seen.append(x)
    return torch.stack(seen).sum(0)


def grows_a_tensor(x: Tensor) -> Tensor:
    y = x
    while y.norm() < 10:
        y = torch.cat([y, x])
    return y


def lists_of_two_lengths(x: Tensor) -> Tensor:
    seen = [x]
    if x.sum() > 0:
        seen.append(x * 2)
    return torch.stack(seen).sum(0)


class CountsInPython(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            self.calls += 1
        return x


def filters(x: Tensor) -> Tensor:
    return sum(row for row in x if row.sum() > 0)


def filters_in_a_branch(x: Tensor) -> Tensor:
    if x.mean() > -10:
        x = x + sum(row for row in x if row.sum() > 0)
    return x


def generates(x: Tensor) -> Tensor:
    def rows():
        for row in x:
            if row.sum() > 0:
                yield row * 2
            else:
                yield row

    return torch.stack(list(rows()))


def writes_a_view_in_a_loop(x: Tensor) -> Tensor:
    out = torch.zeros(4)
    holder = {"view": out[:2]}
    total = x.sum()
    while total < 3:
        add_one(holder)
        total = total + 1
    return out


def add_one(holder: dict[str, Tensor]) -> None:
    holder["view"].add_(1)


REFUSED = {
    "sides of two shapes": (
        shapes_differ,
        "the two sides of a branch cannot become one value: 'y' is f32[3, 2] on one side and f32[3, 4] on the other",
        "if x.sum() > 0:",
    ),
    "sides of two types": (types_differ, "is i64[3, 4] on one side and f32[3, 4] on the other", "x.long() if"),
    "a side that returns None": (
        none_on_one_side,
        "what is returned is f32[3, 4] on one side and None on the other",
        "if x.sum() > 0:",
    ),
    "more than one element": (
        many_elements,
        "a branch asks for the truth of a tensor that has more than one element",
        "if x > 0:",
    ),
    "a list that grows in a loop": (grows_a_list, "depends on a tensor changes a list of 1", "while x.norm() > 1:"),
    "a tensor that grows in a loop": (
        grows_a_tensor,
        "depends on a tensor changes a type: 'y' is f32[3, 4] before a turn and f32[6, 4] after it",
        "while y.norm() < 10:",
    ),
    "a list longer on one side": (
        lists_of_two_lengths,
        "a list of 2 holds other items on one side than on the other",
        "if x.sum() > 0:",
    ),
    "a counter in Python": (
        CountsInPython(),
        "attribute 'calls' of CountsInPython becomes 1 on one side and 0 on the other",
        "if x.sum() > 0:",
    ),
    "the condition of a comprehension": (
        filters,
        "in a place that cannot be rewritten",
        "for row in x if row.sum() > 0",
    ),
    "the condition of a comprehension on one side": (
        filters_in_a_branch,
        "in a place that cannot be rewritten",
        "x = x + sum(row for row in x if row.sum() > 0)",
    ),
    "a generator": (generates, "holds a generator", "yield row"),
    "a view written in a loop": (writes_a_view_in_a_loop, "it writes, inside a loop, into", "add_one(holder)"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_line_and_reason(reason: str) -> None:
    model, text, line = REFUSED[reason]
    # In eager the first one raises by itself; it is the trace's message that is asked for.
    x = X[:1, :1] if reason == "more than one element" else X
    shapes = ({0: "batch"},) if reason == "more than one element" else None
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(model, (x if shapes is None else X.sum().reshape(1, 1),), dynamic_shapes=shapes)
    assert text in str(caught.value)
    assert line in str(caught.value)
    assert "test_refusals.py:" in str(caught.value)


def test_print_in_a_branch_is_left_out_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    def talks(x: Tensor) -> Tensor:
        print("running")  # noqa: T201  (what is tested)
        if x.sum() > 0:
            print("positive")  # noqa: T201  (what is tested)
            x = x * 2
        return x

    with pytest.warns(fxopt.CaptureWarning, match=r"test_refusals.py:\d+, in .*: print\(\) where a tensor decides"):
        gm = fxopt.capture(talks, (X.abs(),), verify=False)
    assert torch.equal(gm(X.abs()), X.abs() * 2)
    assert torch.equal(gm(-X.abs()), -X.abs())
    assert capsys.readouterr().out.count("positive") == 1  # the model's own run, none of the traces


def test_assertion_fails_when_the_graph_runs() -> None:
    def guarded(x: Tensor) -> Tensor:
        assert x.min() > 0, "x must be positive"
        if x.sum() > 100:
            raise ValueError("too large")
        return x if x.sum() > 1 else x * 2

    gm = fxopt.capture(guarded, (X.abs() + 1,))
    assert torch.equal(gm(X.abs() + 1), X.abs() + 1)
    with pytest.raises(RuntimeError, match=r"x must be positive \(test_refusals.py:\d+, in guarded\)"):
        gm(-X.abs())
    with pytest.raises(RuntimeError, match=r"ValueError: too large \(test_refusals.py"):
        gm(X.abs() + 100)


def test_loop_without_end_is_not_unrolled_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_LONGEST_UNROLLED", 1000)

    def endless(x: Tensor, stop: Tensor) -> Tensor:
        turns = 0
        while turns >= 0:
            turns += 1
            if turns > 100_000:
                break
        return x if stop.item() > 0 else x + 1

    with pytest.raises(fxopt.CaptureError, match=r"a loop did not end within 1,000 turns while it was traced"):
        fxopt.capture(endless, (X, torch.tensor(1)))


def test_function_without_text_is_refused() -> None:
    space: dict[str, object] = {}
    exec("def forward(x):\n    return x if x.sum() > 0 else -x", space)
    with pytest.raises(fxopt.CaptureError, match="cannot be rewritten"):
        fxopt.capture(space["forward"], (X,))
