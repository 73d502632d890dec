"""Choose the range of values that integers are to stand for, and the scale and zero point that make it so.

A range always holds zero, so that padding, ReLU and masked elements stay exact. A narrower range than the values have
cuts off the largest of them, and has finer steps for all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from fxopt.passes.quantize.range_search import least_divergence, least_squares
from fxopt.passes.quantize.sketch import ValueSketch

__all__ = ["METHODS", "RangeMethod", "choose_range", "integer_limits", "qparams"]

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # below it float32 loses digits, and some kernels read zero
_DEFAULT_PERCENTILE = 99.99


@dataclasses.dataclass(frozen=True)
class RangeMethod:
    """How to get a range from values.

    Attributes:
        kind: One of ``METHODS``.
        percentile: For ``"percentile"``: the percentage of the values that neither end may cut into, in (50, 100].

    The kinds:
        minmax: From the smallest to the largest value.
        moving-average: From the mean of the smallest values of the batches to the mean of their largest ones.
        percentile: From the (100 - p)th to the pth percentile: at most 100 - p percent are cut off at either end. For a
            symmetric range, the pth percentile of the magnitudes.
        entropy: The range whose quantized distribution has the least Kullback-Leibler divergence from that of the
            values (Migacz, 8-bit Inference with TensorRT, GTC 2017), both ends of an affine range apart.
        mse: The range with the least mean squared error of quantization.
    """

    kind: str
    percentile: float = _DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        if self.kind not in METHODS:
            raise ValueError(f"there is no range method {self.kind!r}; wanted one of {', '.join(METHODS)}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"the percentile of a range is above 50 and at most 100, not {self.percentile:g}")
        if self.kind != "percentile" and self.percentile != _DEFAULT_PERCENTILE:
            raise ValueError(f"range method {self.kind!r} takes no percentile")

    @classmethod
    def of(cls, method: RangeMethod | str) -> RangeMethod:
        """Return the method that a text such as ``"mse"`` or ``"percentile:99.9"`` names.

        Raises:
            ValueError: it names none.
        """
        if isinstance(method, RangeMethod):
            return method
        kind, colon, number = method.partition(":")
        if not colon:
            return cls(kind)
        if kind != "percentile":
            raise ValueError(f"range method {method!r}: only 'percentile' takes a number, as in 'percentile:99.9'")
        try:
            return cls(kind, float(number))
        except ValueError as error:
            raise ValueError(f"range method {method!r}: {error}") from None

    def __str__(self) -> str:
        return f"percentile:{self.percentile:g}" if self.kind == "percentile" else self.kind


def choose_range(
    sketch: ValueSketch, method: RangeMethod | str, *, bits: int, signed: bool, symmetric: bool
) -> tuple[float, float]:
    """Return the ends of the range to quantize, in the unit of the values: ``low <= 0 <= high``.

    Args:
        sketch: What the values were.
        method: How to choose; see :class:`RangeMethod`.
        bits: Width of the integer, 2 to 16.
        signed: Whether the integer is signed.
        symmetric: Make ``low == -high``.

    Never wider than the values and zero, but for ``symmetric``. Where a method has nothing to choose from, and where it
    would cut off every nonzero value, the result is that of ``minmax``: for values that are all the same, and for
    percentiles of tensors that are almost always zero. ``(0.0, 0.0)`` only if all values are zero.

    Raises:
        ValueError: the sketch is empty, the method unknown, or the width not supported.
    """
    method = RangeMethod.of(method)
    integer_limits(bits, signed)
    if not sketch.count:
        raise ValueError("no range follows from a tensor that was never computed during calibration")
    full = min(sketch.low, 0.0), max(sketch.high, 0.0)
    low, high = METHODS[method.kind](sketch, method, bits, symmetric)
    low, high = min(max(low, full[0]), 0.0), max(min(high, full[1]), 0.0)
    if (low, high) == (0.0, 0.0):
        low, high = full
    if symmetric:
        high = max(-low, high)
        return -high, high
    return low, high


def integer_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Return the smallest and largest integer of a width.

    Raises:
        ValueError: the width is not within 2 to 16 bits.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"integers are 2 to 16 bits wide, not {bits}")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def qparams(low: float, high: float, *, bits: int, signed: bool, symmetric: bool) -> tuple[float, int]:
    """Return scale and zero point that quantize a range.

    Args:
        low: Lower end of the range, in the unit of the values; at most 0.
        high: Upper end; at least 0.
        bits: Width of the integer, 2 to 16.
        signed: Whether the integer is signed.
        symmetric: Put zero in the middle of the integers, which then reach as far to either side: 0 for signed ones
            (of which the smallest is left over), ``2**(bits - 1)`` for unsigned ones.

    Returns:
        scale: Units per step: exactly a float32, at least the smallest normal one; 1.0 for a range of width 0.
        zero_point: The integer that stands for 0.0, exactly.

    Raises:
        ValueError: the range does not hold zero, an end is not a finite float32, or the width is not supported.

    Error: |dequantize(quantize(x)) - x| <= scale / 2 for x in [low, high], but for the rounding of the scale to
    float32, which moves the ends by up to half a unit in their last place.
    Source: ONNX QuantizeLinear: round half to even, then saturate.
    """
    smallest, largest = integer_limits(bits, signed)
    if not low <= 0 <= high:
        raise ValueError(f"a range to quantize holds zero; got {low} to {high}")
    if max(-low, high) > float(np.finfo(np.float32).max):
        raise ValueError(f"a range to quantize is finite in float32; got {low} to {high}")
    middle = (smallest + largest + 1) // 2
    steps = largest - middle if symmetric else largest - smallest
    width = max(-low, high) if symmetric else high - low
    if width == 0:
        return 1.0, middle if symmetric else 0
    scale = max(float(np.float32(width / steps)), _SMALLEST_SCALE)
    if symmetric:
        return scale, middle
    return scale, min(max(smallest - round(low / scale), smallest), largest)


def _minmax(sketch: ValueSketch, method: RangeMethod, bits: int, symmetric: bool) -> tuple[float, float]:
    return sketch.low, sketch.high


def _moving_average(sketch: ValueSketch, method: RangeMethod, bits: int, symmetric: bool) -> tuple[float, float]:
    return sketch.mean_low, sketch.mean_high


def _percentile(sketch: ValueSketch, method: RangeMethod, bits: int, symmetric: bool) -> tuple[float, float]:
    share = method.percentile / 100
    if symmetric:
        high = sketch.magnitude_quantile(share)
        return -high, high
    return sketch.quantile((100 - method.percentile) / 100), sketch.quantile(share)


def _entropy(sketch: ValueSketch, method: RangeMethod, bits: int, symmetric: bool) -> tuple[float, float]:
    return least_divergence(sketch, bits=bits, symmetric=symmetric)


def _mse(sketch: ValueSketch, method: RangeMethod, bits: int, symmetric: bool) -> tuple[float, float]:
    return least_squares(sketch, bits=bits, symmetric=symmetric)


METHODS: dict[str, Callable[[ValueSketch, RangeMethod, int, bool], tuple[float, float]]] = {
    "minmax": _minmax,
    "moving-average": _moving_average,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
