"""Schedules against their published formulas, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.passes import Cubic, Iterative, OneShot


def test_one_shot_masks_all_behind_the_first_step() -> None:
    assert [OneShot(0.5).fraction_at(step) for step in (0, 1, 2, 10**9)] == [0.0, 0.5, 0.5, 0.5]


def test_iterative_keeps_the_same_share_of_what_is_left_in_each_round() -> None:
    schedule = Iterative(0.875, rounds=3, every=10)
    at = [schedule.fraction_at(step) for step in (0, 9, 10, 19, 20, 29, 30, 1000)]
    assert at == pytest.approx([0, 0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875])
    assert at[-1] == 0.875


@given(st.floats(0.01, 0.99), st.integers(0, 50), st.integers(1, 9), st.integers(1, 20), st.floats(0, 0.9))
def test_cubic_is_the_formula_of_zhu_and_gupta_at_every_change(
    final: float, begin: int, every: int, changes: int, initial: float
) -> None:
    initial *= final * 0.9
    schedule = Cubic(final, begin=begin, end=begin + changes * every, every=every, initial=initial)
    for step in range(begin, begin + changes * every + 1, every):
        want = final + (initial - final) * (1 - (step - begin) / (changes * every)) ** 3
        assert schedule.fraction_at(step) == pytest.approx(want, abs=1e-12)
        assert schedule.fraction_at(step) == schedule.fraction_at(step + every - 1)
    assert schedule.fraction_at(begin - 1) == 0.0
    assert schedule.fraction_at(10**9) == final


@given(st.integers(0, 300), st.sampled_from([OneShot(0.7), Iterative(0.7, 5, 20), Cubic(0.7, 10, 215, 10, 0.1)]))
def test_no_schedule_ever_falls(step: int, schedule: Any) -> None:
    assert 0 <= schedule.fraction_at(step) <= schedule.fraction_at(step + 1) <= 0.7


MAKERS: dict[str, Callable[[Any], Any]] = {
    "one shot": OneShot,
    "iterative": lambda fraction: Iterative(fraction, 2, 10),
    "cubic": lambda fraction: Cubic(fraction, 0, 10, 1),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2.0, math.nan, math.inf])
def test_fraction_that_is_no_share_is_refused(make: Callable[[Any], Any], fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction is .*; wanted a share above 0 and below 1 of what goes"):
        make(fraction)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("fraction", ["0.5", None, True])
def test_fraction_that_is_no_number_is_refused(make: Callable[[Any], Any], fraction: Any) -> None:
    with pytest.raises(TypeError, match=r"fraction is .*; wanted a number, such as 0\.5"):
        make(fraction)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no rounds": (lambda: Iterative(0.5, 0, 10), ValueError, "rounds is 0; wanted 1 or more"),
    "half a round": (lambda: Iterative(0.5, 1.5, 10), TypeError, r"rounds is 1\.5; wanted a whole number of rounds"),  # type: ignore[arg-type]  # the test's point
    "never": (lambda: Iterative(0.5, 2, 0), ValueError, "every is 0; wanted 1 or more"),
    "before the start": (lambda: Cubic(0.5, -1, 10, 1), ValueError, "begin is -1; wanted 0 or more"),
    "end before begin": (lambda: Cubic(0.5, 10, 5, 1), ValueError, "end is 5; wanted 11 or more"),
    "no whole interval": (lambda: Cubic(0.5, 0, 5, 10), ValueError, "end is 5; wanted 10 or more"),
    "falling": (lambda: Cubic(0.5, 0, 10, 1, 0.6), ValueError, r"initial is 0\.6; wanted a share from 0 and below"),
    "text": (lambda: Cubic(0.5, 0, "10", 1), TypeError, "end is '10'; wanted a whole number of steps"),  # type: ignore[arg-type]  # the test's point
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_schedule_that_makes_no_sense_is_refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()
