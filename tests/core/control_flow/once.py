"""Graphs that several tests of a file start from are captured once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable

import fxopt


def captured_once(make: Callable[..., fxopt.CapturedModule]) -> Callable[..., fxopt.CapturedModule]:
    """Return a function that calls ``make`` once for the same arguments, and returns a copy of the graph each time."""
    made = functools.cache(make)

    @functools.wraps(make)
    def copied(*given: Hashable) -> fxopt.CapturedModule:
        return copy.deepcopy(made(*given))

    return copied
