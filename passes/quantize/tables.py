"""Tables of few numbers that stand for many: optimal k-means in one dimension, uniform steps, powers of two.

k-means of numbers on a line is solved exactly by dynamic programming over the sorted numbers: a cluster is an interval.
Many numbers are first gathered in the cells of a fine grid, the program is run on the cells, and Lloyd's iteration on
the numbers themselves settles the rest.

Source: Wang, Song: Ckmeans.1d.dp, Optimal k-means Clustering in One Dimension by Dynamic Programming, R Journal 2011;
Lloyd: Least Squares Quantization in PCM, 1982; Zhou et al.: Incremental Network Quantization, ICLR 2017.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Table", "nearest_codes", "number_table"]

Table = Literal["kmeans", "uniform", "power-of-two"]
Numbers = npt.NDArray[np.float64]
_CELLS = 256  # of the grid, at least; and four for each entry
_ROUNDS = 100  # of Lloyd's iteration, which stops by itself long before


def number_table(values: torch.Tensor, entries: int, kind: Table) -> torch.Tensor:
    """Return the table for some numbers, f32[entries], sorted; entries that are not needed repeat the largest.

    Args:
        values: Finite numbers, any shape, at least one.
        entries: Numbers in the table; for powers of two at least 4.
        kind: ``"kmeans"`` has the smallest squared error; ``"uniform"`` has equal steps from the smallest to the
            largest value; ``"power-of-two"`` has 0 and powers of two of both signs.

    Raises:
        ValueError: there are no values, one is not finite, or there are too few entries.
    """
    if entries < (4 if kind == "power-of-two" else 2):
        raise ValueError(f"a table of {entries} entries is too small")
    if values.numel() == 0 or not bool(values.isfinite().all()):
        raise ValueError("a table needs values, all of them finite")
    numbers = np.sort(values.detach().cpu().double().numpy().ravel())
    if kind == "kmeans":
        table = _kmeans(numbers, entries)
    elif kind == "uniform":
        table = np.linspace(numbers[0], numbers[-1], entries)
    else:
        table = _powers_of_two(numbers, entries)
    table = np.concatenate([table, np.full(entries - len(table), table[-1])])
    return torch.from_numpy(table).float()


def nearest_codes(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the place of the nearest entry of a sorted table for each value, i64 of their shape."""
    middles = (table[1:].double() + table[:-1].double()) / 2
    return torch.bucketize(values.detach().double(), middles)


class _Sums:
    """Count, sum and sum of squares of every run of sorted numbers, from running sums."""

    def __init__(self, numbers: Numbers, edges: npt.NDArray[np.int64]) -> None:
        """Args: numbers: sorted. edges: where each cell begins, and the end of the last."""
        self.centre = float(numbers.mean())  # squares of small differences lose less
        moved = numbers - self.centre
        self.count = edges.astype(np.float64)
        self.first = np.concatenate([[0.0], np.cumsum(moved)])[edges]
        self.second = np.concatenate([[0.0], np.cumsum(moved**2)])[edges]

    def costs(self) -> Numbers:
        """Return the squared error of cells i..j around their mean, [i, j]; infinite where j < i."""
        count, first, second = (
            running[None, 1:] - running[:-1, None] for running in (self.count, self.first, self.second)
        )
        upper = count > 0
        error = np.full(count.shape, np.inf)
        error[upper] = np.maximum(second[upper] - first[upper] ** 2 / count[upper], 0.0)
        return error

    def means(self, bounds: npt.NDArray[np.int64]) -> Numbers:
        """Return the mean of the cells between neighbouring bounds."""
        count, first = np.diff(self.count[bounds]), np.diff(self.first[bounds])
        mean: Numbers = first / count + self.centre
        return mean


def _kmeans(numbers: Numbers, entries: int) -> Numbers:
    distinct, begins = np.unique(numbers, return_index=True)
    if len(distinct) <= entries:
        return distinct
    edges = np.append(begins, len(numbers)).astype(np.int64)
    cells = max(_CELLS, 4 * entries)
    if len(distinct) > cells:
        grid = np.searchsorted(numbers, np.linspace(numbers[0], numbers[-1], cells + 1)[1:-1])
        edges = np.unique(np.concatenate([[0], grid, [len(numbers)]])).astype(np.int64)
    sums = _Sums(numbers, edges)
    return _lloyd(numbers, sums.means(_best_bounds(sums.costs(), entries)))


def _best_bounds(costs: Numbers, entries: int) -> npt.NDArray[np.int64]:
    """Return where each of the intervals begins that cover all cells at the least cost, and the end of the last."""
    cells = len(costs)
    entries = min(entries, cells)
    best = costs[0]  # of cells 0..j in one interval
    begins = np.zeros((entries, cells), dtype=np.int64)
    last = np.ascontiguousarray(costs[1:, 1:].T)  # [j, i]: cells i + 1 to j; the least of a row is found fast
    total, rows = np.empty_like(last), np.arange(cells - 1)
    for interval in range(1, entries):
        np.add(last, best[:-1], out=total)
        begin = total.argmin(1)
        begins[interval, 1:] = begin + 1
        best = np.append(np.inf, total[rows, begin])
    bounds = [cells]
    for interval in range(entries - 1, -1, -1):
        bounds.append(int(begins[interval, bounds[-1] - 1]))
    return np.array(bounds[::-1], dtype=np.int64)


def _lloyd(numbers: Numbers, table: Numbers) -> Numbers:
    """Return the table after entries moved to the mean of the numbers nearest to them, until none moves."""
    running = np.concatenate([[0.0], np.cumsum(numbers)])
    for _ in range(_ROUNDS):
        inner = np.searchsorted(numbers, (table[1:] + table[:-1]) / 2)
        bounds = np.concatenate([[0], inner, [len(numbers)]])
        count = np.diff(bounds)
        moved = np.where(count > 0, np.diff(running[bounds]) / np.maximum(count, 1), table)
        if np.array_equal(moved, table):
            break
        table = moved
    return table


def _powers_of_two(numbers: Numbers, entries: int) -> Numbers:
    """Return 0 and the powers of two of both signs, with the largest exponent that gives the smallest error."""
    each = entries // 2 - 1
    largest = float(np.abs(numbers).max())
    if largest == 0:
        return np.zeros(1)
    top = int(np.ceil(np.log2(largest)))
    tables = [
        _signed(np.exp2(np.arange(last - each + 1, last + 1, dtype=np.float64))) for last in range(top - 3, top + 1)
    ]
    return min(tables, key=lambda table: _squared_error(numbers, table))


def _signed(magnitudes: Numbers) -> Numbers:
    return np.concatenate([-magnitudes[::-1], [0.0], magnitudes])


def _squared_error(numbers: Numbers, table: Numbers) -> float:
    chosen = table[np.searchsorted((table[1:] + table[:-1]) / 2, numbers)]
    return float(((chosen - numbers) ** 2).sum())
