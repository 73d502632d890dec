"""How much is pruned when, while a net trains: the share that is masked after so many steps of the optimizer.

    OneShot(0.5)                                        all of it behind the first step
    Iterative(0.8, rounds=4, every=100)                 in rounds, each of which takes the same share of what is left
    Cubic(0.8, begin=0, end=1000, every=100)            fast at first, slowly at the end

A schedule of your own is any object with ``fraction_at(step)`` that never falls.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

__all__ = ["Cubic", "Iterative", "OneShot", "Schedule"]


class Schedule(Protocol):
    """What a schedule is asked."""

    def fraction_at(self, step: int) -> float:
        """Return the share that is masked after ``step`` steps of the optimizer: from 0, and below 1."""


@dataclasses.dataclass(frozen=True)
class OneShot:
    """Mask everything behind the first step.

    Attributes:
        fraction: Share that goes, above 0 and below 1.
    """

    fraction: float

    def __post_init__(self) -> None:
        """Check the options."""
        _check_fraction("fraction", self.fraction)

    def fraction_at(self, step: int) -> float:
        """Return the share that is masked after ``step`` steps."""
        return self.fraction if step > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Mask in rounds, each of which takes the same share of what is left.

    Source: Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019: ``p ** (1 / n)`` of the weights stay in each
    of n rounds, where p stay in the end.

    Attributes:
        fraction: Share that goes in the end, above 0 and below 1.
        rounds: How many rounds.
        every: Steps between rounds, the first of them among these.
    """

    fraction: float
    rounds: int
    every: int

    def __post_init__(self) -> None:
        """Check the options."""
        _check_fraction("fraction", self.fraction)
        _check_count("rounds", self.rounds, 1)
        _check_count("every", self.every, 1)

    def fraction_at(self, step: int) -> float:
        """Return the share that is masked after ``step`` steps."""
        done = min(step // self.every, self.rounds)
        return self.fraction if done == self.rounds else 1 - (1 - self.fraction) ** (done / self.rounds)


@dataclasses.dataclass(frozen=True)
class Cubic:
    """Mask fast at first and slowly at the end: ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt)) ** 3``.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, equation 1.

    Attributes:
        fraction: Share that goes in the end, s_f; above 0 and below 1.
        begin: Step of the first change, t_0.
        end: Step at which the end is reached, t_0 + n dt; the last whole interval before it is, if it is none.
        every: Steps between changes, dt.
        initial: Share at the beginning, s_i.
    """

    fraction: float
    begin: int
    end: int
    every: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        _check_fraction("fraction", self.fraction)
        _check_count("begin", self.begin, 0)
        _check_count("every", self.every, 1)
        _check_count("end", self.end, self.begin + self.every)
        if not _is_number(self.initial) or not 0 <= self.initial < self.fraction:
            raise ValueError(f"initial is {self.initial!r}; wanted a share from 0 and below fraction, {self.fraction}")

    def fraction_at(self, step: int) -> float:
        """Return the share that is masked after ``step`` steps."""
        if step < self.begin:
            return 0.0
        changes = (self.end - self.begin) // self.every
        left = 1 - min((step - self.begin) // self.every, changes) / changes
        return self.fraction + (self.initial - self.fraction) * left**3


def _check_fraction(name: str, value: float) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} is {value!r}; wanted a number, such as 0.5")
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value!r}; wanted a share above 0 and below 1 of what goes")


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; wanted a whole number of {'rounds' if name == 'rounds' else 'steps'}")
    if value < least:
        raise ValueError(f"{name} is {value}; wanted {least} or more")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
