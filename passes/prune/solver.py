"""Choose one option for each family: the least loss whose cost is within a limit.

An integer program, solved by HiGHS: a binary for each family and option. A piece of the cost over two coordinates has a
continuous variable for each pair of their points, whose sums over either side are the variables of the other one: with
binaries on one side at least that is the product. A size that several families add up to is a mean of the points of
its grid, of two neighbours if there are more than two. If the solver finds nothing in its time, options are lowered one
by one, always that which costs the least loss for what it saves.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy  # loads its parts when they are first used

from fxopt.passes.prune.costs import Coordinate, Grid, Piece, Term, total

__all__ = ["Solution", "cheapest", "greedy", "solve"]

_SLACK = 1e-9  # relative; a sum in another order must not miss the limit
_TRIES = 4  # a solution whose cost is a hair too large is looked for again below a lower limit
_OPTIMAL, _OUT_OF_TIME, _INFEASIBLE = 0, 1, 2  # statuses of scipy.optimize.milp


@dataclasses.dataclass(frozen=True)
class Solution:
    """What was chosen.

    Attributes:
        choice: The option of each family.
        solver: What found it.
        gap: By how much a better loss is not ruled out, as a share of the loss; None if nothing is known.
    """

    choice: tuple[int, ...]
    solver: str
    gap: float | None


def solve(losses: Sequence[Sequence[float]], terms: Sequence[Term], limit: float, *, seconds: float) -> Solution | None:
    """Return the choice of least loss, or None if none is within the limit.

    Args:
        losses: The loss of each option of each family.
        terms: What adds up to the cost.
        limit: Of the cost.
        seconds: How long the solver may take; then the best choice so far counts, or what :func:`greedy` finds.
    """
    options = [len(each) for each in losses]
    scale = max(total(terms, [count - 1 for count in options]), 1e-300)
    program = _Program(options, terms, scale)
    bound = limit / scale
    for _ in range(_TRIES):
        found = program.minimize(np.concatenate([np.asarray(each, float) for each in losses]), bound, seconds)
        if found.choice is None and found.status == _INFEASIBLE:
            return None
        if found.choice is None:
            break
        excess = total(terms, found.choice) / scale - limit / scale
        if excess <= _SLACK * bound:
            how = "HiGHS" if found.status == _OPTIMAL else f"HiGHS, stopped after {seconds:g} s"
            return Solution(found.choice, how, found.gap)
        bound -= 1.01 * excess + _SLACK
    choice = greedy(losses, terms, limit)
    return None if choice is None else Solution(choice, f"greedy, since HiGHS found nothing in {seconds:g} s", None)


def cheapest(options: Sequence[int], terms: Sequence[Term], *, seconds: float) -> tuple[int, ...]:
    """Return the choice of least cost, which need not be the narrowest one where times were measured."""
    narrowest = (0,) * len(options)
    scale = max(total(terms, narrowest), 1e-300)
    found = _Program(options, terms, scale).minimize(None, math.inf, seconds).choice
    choices = [narrowest] if found is None else [narrowest, found]
    return min(choices, key=lambda choice: total(terms, choice))


def greedy(losses: Sequence[Sequence[float]], terms: Sequence[Term], limit: float) -> tuple[int, ...] | None:
    """Return a choice within the limit, made in steps, or None if the steps end before it."""
    choice = [len(each) - 1 for each in losses]
    touching = [[term for term in terms if family in term.families] for family in range(len(losses))]
    cost = total(terms, choice)
    bound = limit * (1 + _SLACK)

    def saved(family: int, option: int) -> float:
        lower = [*choice[:family], option, *choice[family + 1 :]]
        return total(touching[family], choice) - total(touching[family], lower)

    while cost > bound:
        steps = [
            ((losses[family][option] - losses[family][choice[family]]) / less, -less, family, option)
            for family in range(len(losses))
            for option in range(choice[family])
            if (less := saved(family, option)) > 0
        ]
        if not steps:
            return None
        _, less, family, option = min(steps)
        choice[family] = option
        cost += less
    for family in sorted(range(len(losses)), key=lambda f: -losses[f][choice[f]]):
        for option in range(len(losses[family]) - 1, choice[family], -1):
            if total(terms, [*choice[:family], option, *choice[family + 1 :]]) <= bound:
                choice[family] = option
                break
    return tuple(choice)


@dataclasses.dataclass(frozen=True)
class _Found:
    choice: tuple[int, ...] | None
    status: int
    gap: float | None


class _Program:
    """The rows and columns of the integer program; the cost is scaled so that a solver's tolerances suit it."""

    def __init__(self, options: Sequence[int], terms: Sequence[Term], scale: float) -> None:
        self.options = options
        self._whole: list[bool] = []  # whether a variable is a binary, by number
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._vectors: dict[Coordinate, list[int]] = {}
        self._cost: dict[int, float] = {}
        self._constant = 0.0
        for family, count in enumerate(options):
            self._vectors[family] = self._mean(count, whole=True)
        pieces: dict[tuple[Coordinate, ...], np.ndarray[Any, Any]] = {}
        for piece in itertools.chain.from_iterable(term.pieces(options) for term in terms):
            coordinates, table = _sorted(piece)
            pieces[coordinates] = pieces.get(coordinates, 0.0) + table / scale
        for coordinates, table in pieces.items():
            self._add(coordinates, table)

    def minimize(self, losses: np.ndarray[Any, Any] | None, limit: float, seconds: float) -> _Found:
        """Minimize the loss with a cost of at most ``limit``, or the cost if no losses are given."""
        count = len(self._whole)
        objective = np.zeros(count)
        if losses is None:
            objective[list(self._cost)] = list(self._cost.values())
        else:
            objective[: len(losses)] = losses / max(float(np.abs(losses).max(initial=0.0)), 1e-300)
        rows = [*self._rows, (self._cost, -math.inf, limit - self._constant)]
        at = [(number, column, value) for number, (row, _, _) in enumerate(rows) for column, value in row.items()]
        numbers, columns, values = zip(*at, strict=True) if at else ((), (), ())
        matrix = scipy.sparse.csr_array((values, (numbers, columns)), shape=(len(rows), count))
        low, high = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
        result = scipy.optimize.milp(
            objective,
            integrality=np.array(self._whole, int),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=scipy.optimize.LinearConstraint(matrix, low, high),
            options={"time_limit": seconds, "mip_rel_gap": 1e-4},
        )
        if result.x is None:
            return _Found(None, int(result.status), None)
        ends = np.cumsum(self.options)
        choice = tuple(int(part.argmax()) for part in np.split(result.x[: ends[-1]], ends[:-1]))
        return _Found(choice, int(result.status), float(result.mip_gap))

    def _variables(self, count: int, *, whole: bool) -> list[int]:
        self._whole += [whole] * count
        return list(range(len(self._whole) - count, len(self._whole)))

    def _mean(self, count: int, *, whole: bool) -> list[int]:
        """Return variables that add up to 1."""
        found = self._variables(count, whole=whole)
        self._rows.append((dict.fromkeys(found, 1.0), 1.0, 1.0))
        return found

    def _vector(self, coordinate: Coordinate) -> list[int]:
        """Return what each point of a coordinate counts: 1 for an option, or shares of the points of a grid."""
        if coordinate not in self._vectors:
            assert isinstance(coordinate, Grid)
            self._vectors[coordinate] = self._grid(coordinate)
        return self._vectors[coordinate]

    def _grid(self, grid: Grid) -> list[int]:
        shares = self._mean(len(grid.points), whole=False)
        row = dict(zip(shares, (point / grid.size.full for point in grid.points), strict=True))
        for family, counts in grid.size.parts:
            for variable, count in zip(self._vectors[family], counts, strict=True):
                row[variable] = -count / grid.size.full
        self._rows.append((row, grid.size.fixed / grid.size.full, grid.size.fixed / grid.size.full))
        if len(shares) > 2:
            between = self._mean(len(shares) - 1, whole=True)
            for at, share in enumerate(shares):
                beside = dict.fromkeys(between[max(at - 1, 0) : at + 1], -1.0)
                self._rows.append(({share: 1.0, **beside}, -math.inf, 0.0))
        return shares

    def _add(self, coordinates: tuple[Coordinate, ...], table: np.ndarray[Any, Any]) -> None:
        """Add a table to the cost."""
        if not coordinates:
            self._constant += float(table)
            return
        vectors = [self._vector(coordinate) for coordinate in coordinates]
        if len(vectors) == 1:
            pairs = vectors[0]
        else:
            pairs = self._variables(table.size, whole=False)
            cells = np.array(pairs).reshape(table.shape)
            for axis, vector in enumerate(vectors):
                for variable, line in zip(vector, np.moveaxis(cells, axis, 0).tolist(), strict=True):
                    self._rows.append(({**dict.fromkeys(line, 1.0), variable: -1.0}, 0.0, 0.0))
        for variable, value in zip(pairs, table.ravel().tolist(), strict=True):
            self._cost[variable] = self._cost.get(variable, 0.0) + value


def _sorted(piece: Piece) -> tuple[tuple[Coordinate, ...], np.ndarray[Any, Any]]:
    """Return a piece with its coordinates in one order, so that those over the same ones can be added."""
    if len(piece.coordinates) == 2 and str(piece.coordinates[0]) > str(piece.coordinates[1]):
        return piece.coordinates[::-1], piece.table.T
    return piece.coordinates, piece.table
