"""A summary of all values that one tensor takes during calibration, of a size that does not grow with their number.

A histogram over the float32 bit pattern: sign, exponent and the first 8 bits of the mantissa name the bin, so that a
bin is at most ``2**-8`` of its values wide, over the whole range of float32. Minimum, maximum and count are exact, and
so is the mean of the minima and maxima of the batches. All that is added up are integers. A sketch therefore does not
depend on the order of the batches, and sketches of parts of them merge into the sketch of all, bit for bit.

Source: the bins of fixed relative width are those of DDSketch (Masson, Rim and Lee, VLDB 2019), with the exponent of
the float in place of its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from fxopt.args import shape_text
from fxopt.errors import CalibrationError

__all__ = ["MANTISSA_BITS", "ValueSketch"]

MANTISSA_BITS = 8
_SHIFT = 23 - MANTISSA_BITS  # bits of a float32 that its bin does not tell
_MAGNITUDES = 0xFF << MANTISSA_BITS  # bins of one sign: those of every finite magnitude
_SIGNLESS = 1 << (8 + MANTISSA_BITS)
_UNIT = 149  # every float32 is an integer times 2**-149
_CHUNK = 1 << 16  # elements at a time, so that what is made on the way stays in the cache
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Array = np.ndarray[Any, np.dtype[Any]]


class ValueSketch:
    """What one tensor's values were, over all batches: exact extremes and a histogram of fixed relative resolution.

    Attributes:
        axis: The axis along which extremes are kept for each channel, or None.
        count: Number of values seen; 0 if the tensor was never computed.
        batches: Number of tensors seen, not counting empty ones.
        low, high: Exact smallest and largest value; ``inf`` and ``-inf`` while ``count`` is 0.
        channel_low, channel_high: Exact extremes of each channel, f32[channels]; None without ``axis``, or values.

    Size: at most 1 MiB, and 16 KiB for each power of two between the smallest and the largest nonzero magnitude.
    Values of another floating type are rounded to float32 first, which is exact for float16 and bfloat16.
    """

    def __init__(self, *, axis: int | None = None) -> None:
        """Args: axis: keep the extremes of each channel along this axis, too."""
        self.axis = axis
        self.count = 0
        self.batches = 0
        self.low, self.high = math.inf, -math.inf
        self.channel_low: Array | None = None
        self.channel_high: Array | None = None
        self._zeros = 0
        self._first = 0  # the magnitude bin of the first row of _counts
        self._counts = np.zeros((0, 2), np.int64)  # positive and negative values by magnitude bin
        self._low_sum = self._high_sum = 0  # sums of the batches' extremes, in units of 2**-149

    def update(self, tensor: torch.Tensor) -> None:
        """Take in the values of one batch; an empty tensor counts for nothing.

        Raises:
            CalibrationError: a value is NaN or infinite. The sketch is as before.
            TypeError: the tensor is not of a floating type.
            ValueError: the tensor has no such axis, or another number of channels than before.
        """
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"a sketch takes floating-point values and got {shape_text(tensor)}")
        if tensor.numel() == 0:
            return
        values = tensor.detach().to("cpu", torch.float32).numpy()
        # NaN goes through min and max; adding 0.0 makes -0.0 into 0.0, of which either may be called the smaller one.
        low, high = float(values.min()) + 0.0, float(values.max()) + 0.0
        if not (math.isfinite(low) and math.isfinite(high)):
            raise _not_finite(values)
        if self.axis is not None:
            self._widen_channels(*_channel_extremes(values, self.axis))
        self.count += values.size
        self.batches += 1
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._low_sum += _in_units(low)
        self._high_sum += _in_units(high)
        flat = values.ravel(order="K")  # in the order of memory: no copy of a channels-last tensor
        for start in range(0, flat.size, _CHUNK):
            self._add(*_histogram(flat[start : start + _CHUNK]))

    def merge(self, other: ValueSketch) -> None:
        """Take in what ``other`` has seen. Any order and grouping of merges gives the same sketch.

        Raises:
            ValueError: the sketches have another axis, or number of channels.
        """
        if self.axis != other.axis:
            raise ValueError(f"sketches along axis {self.axis} and {other.axis} do not merge")
        if other.channel_low is not None and other.channel_high is not None:
            self._widen_channels(other.channel_low, other.channel_high)
        self.count += other.count
        self.batches += other.batches
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._low_sum += other._low_sum
        self._high_sum += other._high_sum
        self._add(other._zeros, other._first, other._counts)

    @property
    def mean_low(self) -> float:
        """The mean of the smallest value of each batch, correctly rounded.

        Raises:
            ValueError: no batch was seen.
        """
        return self._mean(self._low_sum)

    @property
    def mean_high(self) -> float:
        """The mean of the largest value of each batch, correctly rounded.

        Raises:
            ValueError: no batch was seen.
        """
        return self._mean(self._high_sum)

    @property
    def channel_largest(self) -> torch.Tensor:
        """The largest magnitude of each channel, f32[channels].

        Raises:
            ValueError: no extremes by channel are kept, or no batch was seen.
        """
        if self.channel_low is None or self.channel_high is None:
            raise ValueError(f"{self!r} keeps no extremes by channel")
        return torch.from_numpy(np.maximum(-self.channel_low, self.channel_high))

    def intervals(self) -> tuple[Array, Array, Array]:
        """Return lower ends, upper ends and counts of the bins that hold values, in ascending order: f64, f64, i64.

        The outer ends are the exact extremes. Zeros (and magnitudes below ``2**-134``) are a bin without width.
        """
        positive_counts, negative_counts = self._counts.T
        negative_bins, positive_bins = np.flatnonzero(negative_counts)[::-1], np.flatnonzero(positive_counts)
        negative, positive = _edges(self._first + negative_bins), _edges(self._first + positive_bins)
        zero = np.zeros(1 if self._zeros else 0)
        zeros = np.full(zero.shape, self._zeros, np.int64)
        lower = np.concatenate([-negative[1], zero, positive[0]])
        upper = np.concatenate([-negative[0], zero, positive[1]])
        counts = np.concatenate([negative_counts[negative_bins], zeros, positive_counts[positive_bins]])
        return np.clip(lower, self.low, self.high), np.clip(upper, self.low, self.high), counts

    def bins(self) -> tuple[Array, Array]:
        """Return the middle of each bin that holds values, f64[n] and ascending, and how many it holds, i64[n]."""
        lower, upper, counts = self.intervals()
        return (lower + upper) / 2, counts

    def quantile(self, p: float) -> float:
        """Return the smallest value that at least the share ``p`` of all values does not exceed.

        Exact for ``p`` 0 and 1; otherwise off by less than ``2**-8`` of the value: it lies in the right bin, and inside
        it where even spacing would put it.

        Raises:
            ValueError: ``p`` is not within [0, 1], or no value was seen.
        """
        rank = self._rank(p)
        if rank in (1, self.count):
            return self.low if rank == 1 else self.high
        return _ranked(rank, *self.intervals())

    def magnitude_quantile(self, p: float) -> float:
        """Return the same of the magnitudes of the values.

        Raises:
            ValueError: ``p`` is not within [0, 1], or no value was seen.
        """
        rank, largest = self._rank(p), max(-self.low, self.high)
        if rank == self.count:
            return largest
        zero = np.zeros(1)
        lower, upper = _edges(self._first + np.arange(len(self._counts)))
        counts = np.concatenate([[self._zeros], self._counts.sum(axis=1)])
        return _ranked(rank, np.concatenate([zero, lower]), np.concatenate([zero, upper.clip(max=largest)]), counts)

    def to_state(self) -> dict[str, Array]:
        """Return all there is to know as arrays, which ``numpy.savez`` writes without pickling."""
        state: dict[str, Array] = {
            "axis": np.array([] if self.axis is None else [self.axis], np.int64),
            "totals": np.array([self.count, self.batches, self._zeros, self._first], np.int64),
            "extremes": np.array([self.low, self.high]),
            "counts": self._counts.copy(),
            "low_sum": _to_bytes(self._low_sum),
            "high_sum": _to_bytes(self._high_sum),
        }
        if self.channel_low is not None and self.channel_high is not None:
            state["channels"] = np.stack([self.channel_low, self.channel_high])
        return state

    def without_channels(self) -> ValueSketch:
        """Return a copy that keeps no extremes by channel, and so merges with those of any other tensor."""
        state = self.to_state()
        state.pop("channels", None)
        return self.from_state(state | {"axis": np.array([], np.int64)})

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> ValueSketch:
        """Return the sketch whose :meth:`to_state` this is.

        Raises:
            KeyError: an entry is missing.
        """
        sketch = cls(axis=int(state["axis"][0]) if state["axis"].size else None)
        sketch.count, sketch.batches, sketch._zeros, sketch._first = (int(total) for total in state["totals"])
        sketch.low, sketch.high = (float(extreme) for extreme in state["extremes"])
        sketch._counts = np.array(state["counts"], np.int64)
        sketch._low_sum, sketch._high_sum = (_from_bytes(state[name]) for name in ("low_sum", "high_sum"))
        if "channels" in state:
            sketch.channel_low, sketch.channel_high = np.array(state["channels"], np.float32)
        return sketch

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ValueSketch):
            return NotImplemented
        mine, theirs = self.to_state(), other.to_state()
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)

    __hash__ = None  # type: ignore[assignment]  # a sketch changes

    def __repr__(self) -> str:
        if not self.count:
            return "ValueSketch(no values)"
        return f"ValueSketch({self.count} values in {self.batches} batches, {self.low:g} to {self.high:g})"

    def _add(self, zeros: int, first: int, counts: Array) -> None:
        """Add a histogram, whose outer rows are not empty, so that the window is the same in any order."""
        self._zeros += zeros
        if not len(counts):
            return
        if not len(self._counts):
            self._first, self._counts = first, counts.copy()
            return
        start, stop = min(first, self._first), max(first + len(counts), self._first + len(self._counts))
        if (start, stop - start) != (self._first, len(self._counts)):
            wider = np.zeros((stop - start, 2), np.int64)
            wider[self._first - start :][: len(self._counts)] = self._counts
            self._first, self._counts = start, wider
        self._counts[first - start :][: len(counts)] += counts

    def _widen_channels(self, low: Array, high: Array) -> None:
        if self.channel_low is None or self.channel_high is None:
            self.channel_low, self.channel_high = low.copy(), high.copy()
            return
        if self.channel_low.shape != low.shape:
            raise ValueError(
                f"axis {self.axis} has {low.shape[0]} channels, and had {self.channel_low.shape[0]} before; "
                "extremes by channel need an axis of fixed size"
            )
        self.channel_low, self.channel_high = np.minimum(self.channel_low, low), np.maximum(self.channel_high, high)

    def _mean(self, total: int) -> float:
        self._check_seen()
        return float(Fraction(total, self.batches << _UNIT))

    def _rank(self, p: float) -> int:
        """Return which value, counted from 1 in ascending order, is the quantile."""
        if not 0 <= p <= 1:
            raise ValueError(f"a quantile is asked for at a share within [0, 1], not {p}")
        self._check_seen()
        return max(math.ceil(p * self.count), 1)  # as a float: 0.01 of 4000 is 40, and not a little more

    def _check_seen(self) -> None:
        if not self.count:
            raise ValueError("the sketch has seen no values: the tensor was never computed")


def _ranked(rank: int, lower: Array, upper: Array, counts: Array) -> float:
    """Return the value of a rank, counted from 1, if the values of each bin were evenly spaced."""
    upto = np.cumsum(counts)
    index = int(np.searchsorted(upto, rank))
    share = (rank - int(upto[index] - counts[index]) - 0.5) / int(counts[index])
    return float(lower[index] + share * (upper[index] - lower[index]))


def _histogram(values: Array) -> tuple[int, int, Array]:
    """Return the number of zeros, the first magnitude bin, and counts i64[bins, 2] of f32[n] finite values.

    In numpy, which runs in one thread: the steps are too short to share, and waiting for a second thread on a busy
    machine takes a thousand times as long as they do.
    """
    bits = values.view(np.uint32)
    index = (bits >> (_SHIFT - 1)) & (2 * _SIGNLESS - 2)
    index |= bits >> 31  # magnitude bin and sign, the sign last
    largest = int(index.max()) >> 1
    index -= 2  # zeros wrap around to the largest integers
    first = (int(index.min()) >> 1) + 1
    if largest == 0:
        return values.size, 0, np.zeros((0, 2), np.int64)
    width = largest - first + 1
    index -= np.uint32(2 * (first - 1))
    np.minimum(index, np.uint32(2 * width), out=index)
    counts = np.bincount(index, minlength=2 * width + 1)
    return int(counts[-1]), first, counts[:-1].reshape(width, 2)


def _edges(magnitudes: Array) -> tuple[Array, Array]:
    """Return the lower and upper ends of magnitude bins, f64[n] each, >= 0."""
    lower, upper = (
        ((magnitudes + step).astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
        for step in (0, 1)
    )
    return lower, np.where(magnitudes + 1 >= _MAGNITUDES, np.float64(2.0**128), upper)


def _channel_extremes(values: Array, axis: int) -> tuple[Array, Array]:
    if not -values.ndim <= axis < values.ndim:
        raise ValueError(f"a tensor of shape {values.shape} has no axis {axis}")
    others = tuple(other for other in range(values.ndim) if other != axis % values.ndim)
    zero = np.float32(0.0)  # see update()
    return values.min(axis=others) + zero, values.max(axis=others) + zero


def _not_finite(values: Array) -> CalibrationError:
    numbers = {"NaN": np.isnan(values).sum(), "infinite": np.isinf(values).sum()}
    kinds = " and ".join(f"{number} {kind}" for kind, number in numbers.items() if number)
    return CalibrationError(f"{kinds} of {values.size} values")


def _in_units(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return (numerator << _UNIT) // denominator  # exact: the denominator of a float32 divides 2**149


def _to_bytes(number: int) -> Array:
    length = number.bit_length() // 8 + 1
    return np.frombuffer(number.to_bytes(length, "little", signed=True), np.uint8).copy()


def _from_bytes(content: Array) -> int:
    return int.from_bytes(content.astype(np.uint8).tobytes(), "little", signed=True)
