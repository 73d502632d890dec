"""Search the range that loses least: by squared error, and by divergence of the distribution.

Both weigh finer steps inside of a narrower range against what lies outside and is moved to its end. The two ends of an
affine range are moved in turn, each to the best place for the other, until both stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fxopt.passes.quantize.sketch import MANTISSA_BITS, ValueSketch

__all__ = ["Density", "Divergence", "least_divergence", "least_squares", "squared_errors"]

Array = np.ndarray[Any, np.dtype[Any]]

_ROUNDS = 4  # of moving one end, then the other
_COARSE_BITS = 5  # of the mantissa, in the bins that squared errors are integrated over
_NEGLIGIBLE = 2.0**-16  # of the range: what lies nearer to zero rounds to it, at next to no error
_FRACTIONS = 2.0 ** -np.linspace(0.0, 6.0, 13)  # of the full range, tried at first, in all pairs
_NEIGHBOURS = (2.0 ** np.linspace(0.5, -0.5, 13), 2.0 ** np.linspace(0.08, -0.08, 9))  # then, itself among them
_BLOCK = 16  # ranges at a time, so that the arrays stay in the cache
_BINS_PER_LEVEL = 16  # as Migacz: 2048 bins for the 128 levels of a magnitude
_CANDIDATES = 128
_TYPICAL = 0.999  # the share of the nonzero values that must not be squeezed into a few bins
_MOST_CUT = 0.01  # the share of the nonzero values that may be cut off
_HEADROOM = 16.0  # ... which they are not if the histogram reaches this many times as far


def least_squares(sketch: ValueSketch, *, bits: int, symmetric: bool) -> tuple[float, float]:
    """Return the range, f64 ends, that minimizes the mean squared error of quantizing the values to ``bits`` bits.

    The values of a bin count as evenly spread over it, and the error is integrated over it in closed form.
    """
    low, high = min(sketch.low, 0.0), max(sketch.high, 0.0)
    if low == high:
        return low, high
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    density = Density(sketch)

    def errors(lows: Array, highs: Array) -> Array:
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(lows), _BLOCK)]
        return np.concatenate(
            [squared_errors(density, lows[b], highs[b], bits=bits, symmetric=symmetric) for b in blocks]
        )

    full = low, high
    if symmetric:
        for fractions in (_FRACTIONS, *_NEIGHBOURS):
            tried = np.minimum(high * fractions, full[1])
            high = float(tried[np.argmin(errors(-tried, tried))])
        return -high, high
    # Few levels have several minima, one for each integer that zero may be: look everywhere first.
    lows = low * _FRACTIONS if low else np.zeros(1)
    highs = high * _FRACTIONS if high else np.zeros(1)
    pairs = np.repeat(lows, len(highs)), np.tile(highs, len(lows))
    best = int(np.argmin(errors(*pairs)))
    low, high = float(pairs[0][best]), float(pairs[1][best])
    for fractions in _NEIGHBOURS:
        low, high = _alternate(errors, (low, high), full, fractions)
    return low, high


class Density:
    """Values as a density that is constant between edges, and points that hold many values each."""

    def __init__(self, sketch: ValueSketch) -> None:
        lower, upper, counts = _coarser(*sketch.intervals())
        # One value at least is exactly at either end, where cutting costs most.
        extremes = np.array([sketch.low, sketch.high])[: sketch.count]
        counts[0] -= 1
        counts[-1] -= len(extremes) - 1
        lower, upper = np.append(lower, extremes), np.append(upper, extremes)
        counts = np.append(counts, np.ones(len(extremes), counts.dtype))
        wide = upper > lower
        self.points, self.point_counts = lower[~wide], counts[~wide].astype(np.float64)
        lower, upper = lower[wide], upper[wide]
        self.edges = np.unique(np.concatenate([lower, upper]))
        density = np.zeros(len(self.edges) + 1)
        density[np.searchsorted(self.edges, lower) + 1] = counts[wide] / (upper - lower)
        # A sum over bins of density * (G(upper) - G(lower)), ordered by edge instead.
        self.weights = density[:-1] - density[1:]


def squared_errors(density: Density, lows: Array, highs: Array, *, bits: int, symmetric: bool) -> Array:
    """Return the sum of squared errors over all values, f64[n], for each of n ranges.

    With steps as the unit, quantization rounds y to k = round(y) inside the range, and moves it to the end outside. The
    integral of the squared error from 0 to y is G(y) = k / 12 + (y - k)^3 / 3 inside; outside, d beyond the end e, it
    is G(e) + d^3 / 3.
    """
    levels = (1 << bits) - 1
    if symmetric:
        steps = highs / (levels >> 1)
        first = np.full(len(highs), -(levels >> 1), np.float64)
        last = -first
    else:
        steps = (highs - lows) / levels
        first = np.rint(lows / steps)
        last = first + levels
    steps, first, last = steps[:, None], first[:, None], last[:, None]

    y = density.edges / steps
    inside = np.clip(y, first, last)
    whole = np.rint(inside)
    y -= inside
    inside -= whole
    integral = whole / 12 + (inside * inside * inside + y * y * y) / 3
    spread = steps[:, 0] ** 3 * (integral @ density.weights)

    y = density.points / steps
    errors = (y - np.clip(np.rint(y), first, last)) ** 2
    return np.asarray(spread + steps[:, 0] ** 2 * (errors @ density.point_counts))


def _coarser(lower: Array, upper: Array, counts: Array) -> tuple[Array, Array, Array]:
    """Merge bins to ``_COARSE_BITS`` of mantissa, but for those at either end, where many equal values may sit."""
    reach = max(-lower[0], upper[-1])
    small = np.maximum(-lower, upper) < reach * _NEGLIGIBLE
    nearer_zero = np.where(lower < 0, upper, lower).astype(np.float32)
    group = nearer_zero.view(np.int32) >> (23 - _COARSE_BITS)
    group[lower < 0] |= 1 << 30
    group[small & (lower != upper)] = -1
    starts = np.ones(len(group), bool)
    starts[1:] = group[1:] != group[:-1]
    extreme = np.zeros(len(group), bool)
    kept = 1 << (MANTISSA_BITS - _COARSE_BITS)
    extreme[: kept + 1], extreme[-kept:] = True, True
    first = np.flatnonzero(starts | extreme)
    last = np.append(first[1:], len(group)) - 1
    return lower[first], upper[last], np.add.reduceat(counts, first)


def _alternate(
    errors: Callable[[Array, Array], Array], start: tuple[float, float], full: tuple[float, float], fractions: Array
) -> tuple[float, float]:
    """Move one end after the other to the best of its fractions, until both stay where they are."""
    ends = list(start)
    for _ in range(_ROUNDS):
        before = list(ends)
        for side in (1, 0):
            if ends[side] == 0:
                continue
            tried = np.clip(start[side] * fractions, min(full[side], 0.0), max(full[side], 0.0))
            others = np.full(len(tried), ends[1 - side])
            found = errors(others, tried) if side else errors(tried, others)
            ends[side] = float(tried[np.argmin(found)])
        if ends == before or 0 in ends:
            break
    return ends[0], ends[1]


def least_divergence(sketch: ValueSketch, *, bits: int, symmetric: bool) -> tuple[float, float]:
    """Return the range, f64 ends, whose quantized distribution has the least Kullback-Leibler divergence.

    After Migacz (8-bit Inference with TensorRT, GTC 2017): of a linear histogram with 16 bins for each level, P is the
    part inside a range with the rest added to the bins at its ends, Q the same part with each level's sum spread evenly
    over its bins that are not empty. Four things differ. Exact zeros stay out, for they are exact in every range.
    Both ends of an affine range move. The histogram reaches at most 16 times as far as 99.9 percent of the magnitudes,
    so that a single huge value does not squeeze all others into a few bins; it is always cut off. No range cuts off
    more than one percent of the nonzero values: where nearly all are, P and Q are the same spike, and do not differ.
    With more than 8 bits all ranges are nearly the same to this measure, and the full one is returned.
    """
    full = min(sketch.low, 0.0), max(sketch.high, 0.0)
    lower, upper, counts = sketch.intervals()
    some = (lower != 0) | (upper != 0)
    lower, upper, counts = lower[some], upper[some], counts[some]
    if bits > 8 or len(counts) < 2:
        return full
    if symmetric:
        order = np.argsort(np.where(lower < 0, -upper, lower), kind="stable")
        lower, upper = (np.where(lower < 0, -upper, lower)[order], np.where(lower < 0, -lower, upper)[order])
        counts, full = counts[order], (0.0, max(-full[0], full[1]))
    low, high = _span(full, lower, upper, counts)
    levels = 1 << (bits - 1) if symmetric else 1 << bits
    bins = levels * _BINS_PER_LEVEL
    edges = np.linspace(low, high, bins + 1)
    divergence = Divergence(_counts_below(edges, lower, upper, counts), float(counts.sum()), levels)
    zero = round(-low / (high - low) * bins)
    first, last = _alternate_bins(divergence, zero, bins)
    low, high = float(edges[first]), float(edges[last])
    return (-high, high) if symmetric else (low, high)


def _span(full: tuple[float, float], lower: Array, upper: Array, counts: Array) -> tuple[float, float]:
    magnitudes = np.maximum(-lower, upper)
    order = np.argsort(magnitudes, kind="stable")
    upto = np.cumsum(counts[order])
    typical = magnitudes[order][np.searchsorted(upto, _TYPICAL * upto[-1])]
    return max(full[0], -_HEADROOM * typical), min(full[1], _HEADROOM * typical)


def _counts_below(edges: Array, lower: Array, upper: Array, counts: Array) -> Array:
    """Return how many values lie below each edge, f64, those of a bin evenly spread."""
    ends = np.stack([lower, upper], axis=1).ravel()
    upto = np.cumsum(counts).astype(np.float64)
    below = np.interp(edges, *_ascending(ends, np.stack([upto - counts, upto], axis=1).ravel()))
    below[edges <= ends[0]] = 0.0  # where many values are exactly the smallest, they lie above it
    return np.asarray(below)


def _ascending(ends: Array, below: Array) -> tuple[Array, Array]:
    order = np.argsort(ends, kind="stable")
    return ends[order], np.maximum.accumulate(below[order])


class Divergence:
    """The divergences of ranges of bins ``[first, last)`` of one histogram, from running sums over its bins.

    With P and Q as in :func:`least_divergence`, N values in all and n in the range, the divergence is ::

        sum P/N log((P/N) / (Q/n))  =  (sum over bins of P log P  -  sum over levels of P log Q) / N  +  log(n / N)
    """

    def __init__(self, below: Array, total: float, levels: int) -> None:
        """Args: below: number of values below each border of a bin. total: of all values. levels: of a range."""
        self.total = total
        self.levels = levels
        self.below = below
        self.counts = np.diff(below)
        self.filled = np.concatenate([[0.0], np.cumsum(self.counts > 0)])
        self.entropy = np.concatenate([[0.0], np.cumsum(_x_log_x(self.counts))])

    def __call__(self, first: Array, last: Array) -> Array:
        """Return the divergence in nats, f64[n], for n ranges; infinite where too much is cut, or only Q is zero."""
        total = self.total
        inside = self.below[last] - self.below[first]
        borders = first[:, None] + (last - first)[:, None] * np.arange(self.levels + 1) // self.levels
        q = np.diff(self.below[borders], axis=1)
        filled = np.diff(self.filled[borders], axis=1)
        p = q.copy()
        entropy = self.entropy[last] - self.entropy[first]
        for level, bin_, outside in ((0, first, self.below[first]), (-1, last - 1, total - self.below[last])):
            at_end = self.counts[bin_]
            entropy += _x_log_x(at_end + outside) - _x_log_x(at_end)
            filled[:, level] += (at_end == 0) & (outside > 0)
            p[:, level] += outside
        with np.errstate(divide="ignore", invalid="ignore"):
            cross = np.where(p > 0, p * np.log(q / filled), 0.0).sum(axis=1)
            found = (entropy - cross) / total + np.log(inside / total)
        return np.where(np.isfinite(found) & (inside >= (1 - _MOST_CUT) * total), found, np.inf)


def _x_log_x(x: Array) -> Array:
    return x * np.log(np.where(x > 0, x, 1.0))


def _alternate_bins(divergence: Divergence, zero: int, bins: int) -> tuple[int, int]:
    """Return the best first and last bin border around that of zero."""
    ends = [0, bins]
    for _ in range(_ROUNDS):
        before = list(ends)
        for side in (1, 0):
            outermost = (0, bins)[side]
            if outermost == zero:
                continue
            # At least one bin a level: finer than the histogram, every range looks perfect.
            nearest = max(zero, ends[0] + divergence.levels) if side else min(zero, ends[1] - divergence.levels)
            tried = np.unique(np.linspace(outermost, nearest, _CANDIDATES).round().astype(np.int64))
            tried = tried[::-1] if side else tried  # of equal ones, the widest
            others = np.full(len(tried), ends[1 - side])
            found = divergence(others, tried) if side else divergence(tried, others)
            ends[side] = int(tried[np.argmin(found)])
        if ends == before:
            break
    return ends[0], ends[1]
