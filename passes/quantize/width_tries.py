"""Measure choices of widths with the user's metric, write them down, and look for the cheapest within the budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fxopt.graph_module import CapturedModule
from fxopt.metric import Metric, measured
from fxopt.passes.quantize.costs import FLOAT, Width, WidthTable
from fxopt.passes.quantize.trials import Candidate

__all__ = ["NAMED", "WidthTries", "decibels"]

_MOST_TRIES = 7  # by noise, or by falls of the metric
_REACH = 3  # the first tries are the 3rd, 9th, 27th and last of at most 64 choices
_PARTS = 16  # of the layers, which the metric is asked about alone
NAMED = 12
"""Layers that a line of the ledger names."""

Make = Callable[[Mapping[str, Width]], tuple[Candidate, CapturedModule]]
"""Returns the candidate of the widths of all layers, and its graph."""


class WidthTries:
    """The tries of one search.

    Attributes:
        least: The metric that the budget allows.
    """

    def __init__(self, table: WidthTable, make: Make, metric: Metric, least: float, ledger: list[str]) -> None:
        """Take what is known of the layers; ``ledger`` gets a line for each try."""
        self.table, self.least = table, least
        self._tried: dict[tuple[int, ...], tuple[Candidate, float]] = {}
        self._make, self._metric, self._ledger = make, metric, ledger

    @property
    def count(self) -> int:
        """How many choices were measured."""
        return len(self._tried)

    @property
    def best(self) -> float:
        """The highest metric of them."""
        return max(value for _, value in self._tried.values())

    @property
    def found(self) -> Candidate | None:
        """The cheapest candidate within the budget, of those that were measured."""
        choice = self._cheapest_within()
        return None if choice is None else self._tried[choice][0]

    @property
    def dear(self) -> bool:
        """Whether what was found saves less than three quarters of what integers everywhere would save, if anything."""
        choice = self._cheapest_within()
        if choice is None:
            return True
        least, cost, most = (self.table.total(c)[0] for c in (self.table.cheapest(), choice, self.table.quietest()))
        return cost - least > (most - least) / 4

    def measure(self, choice: tuple[int, ...]) -> bool:
        """Return whether a choice is within the budget; the metric is asked once about each."""
        if choice not in self._tried:
            number, widths = self.count + 1, self.table.named(choice)
            candidate, graph = self._make(widths)
            value = measured(self._metric, graph, f"try {number}")
            cost, noise = self.table.total(choice)
            self._tried[choice] = candidate, value
            self._ledger.append(
                f"try {number}: {_summary(widths)}; noise {decibels(noise)} by the model, cost {100 * cost:.1f} % of "
                f"float: metric {value:.6g}, {'within' if value >= self.least else 'below'} the budget"
            )
        return self._tried[choice][1] >= self.least

    def find(self, choices: Sequence[tuple[int, ...]], reach: int = _REACH) -> None:
        """Look for the cheapest choice within the budget.

        Args:
            choices: The cheapest first; with each the metric should rise.
            reach: The number of the first try, counted from 1. It is near the cheap end, since few layers are fragile
                in most models, and since a metric of few examples may fall where noise does. If none is within the
                budget, the last choice was tried, too.
        """
        low, high, end, found = 0, len(choices), self.count + _MOST_TRIES - 1, False
        while low < high and self.count < end:
            middle = (low + high) // 2 if found else min(reach, len(choices)) - 1
            if self.measure(choices[middle]):
                high, found = middle, True
            else:
                low, reach = middle + 1, reach * _REACH

    def find_by_metric(self, reference: float) -> None:
        """Look for the cheapest choice within the budget by the falls of the metric with parts of the layers alone.

        Args:
            reference: The metric of the float graph.
        """
        cheapest, quietest = self.table.cheapest(), self.table.quietest()
        open_layers = [layer for layer, index in enumerate(cheapest) if index != quietest[layer]]
        if not open_layers:
            return
        parts = np.array_split(open_layers, min(len(open_layers), _PARTS))
        self._ledger.append(f"noise does not tell what the metric keeps: it is asked about {len(parts)} parts alone")

        def cheap(chosen: Iterable[int]) -> tuple[int, ...]:
            layers = {int(layer) for part in chosen for layer in parts[part]}
            return tuple((cheapest if layer in layers else quietest)[layer] for layer in range(len(cheapest)))

        falls = []
        for part in range(len(parts)):
            alone = cheap([part])
            self.measure(alone)
            falls.append(max(reference - self._tried[alone][1], 0.0))
        table = self._table_of(parts, falls)
        ways = table.frontier()
        first = 1 + sum(table.total(way)[1] > reference - self.least for way in ways)
        choices = [cheap(part for part, quiet in enumerate(way) if not quiet) for way in ways]
        self.find([choice for choice in choices if self.table.quantizes(choice)], first)

    def _cheapest_within(self) -> tuple[int, ...] | None:
        within = [choice for choice, (_, value) in self._tried.items() if value >= self.least]
        return min(within, key=lambda choice: self.table.total(choice)[0], default=None)

    def _table_of(self, parts: Sequence[np.ndarray[Any, Any]], falls: Sequence[float]) -> WidthTable:
        """Return the table with parts for layers, each at its cheapest or at its quietest, and falls for noise."""
        rows = np.arange(len(self.table.layers))
        ends = np.stack([self.table.cost[rows, list(c)] for c in (self.table.cheapest(), self.table.quietest())], 1)
        return WidthTable(
            layers=tuple(map(str, range(len(parts)))),
            widths=("cheapest", "quietest"),
            cost=np.array([ends[part].sum(0) for part in parts]),
            noise=np.array([[fall, 0.0] for fall in falls]),
        )


def decibels(power: float) -> str:
    """Return a power beside that of the signal, in dB."""
    return f"{10 * math.log10(power):.1f} dB" if power > 0 else "none"


def _summary(widths: Mapping[str, Width]) -> str:
    """Return how many layers have each width, with the names of those in float."""
    counts = Counter(widths.values())
    told = [f"{count} layers {width}{'' if width == FLOAT else ' bits'}" for width, count in counts.most_common()]
    floats = [name for name, width in widths.items() if width == FLOAT]
    if floats:
        told.append(f"float are {', '.join(floats[:NAMED])}{', ...' if len(floats) > NAMED else ''}")
    return ", ".join(told)
