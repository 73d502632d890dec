"""What torch's expressions of dynamic sizes are for many sizes at once: its algebra proves little, trying tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = ["NO_VALUE", "tried_sizes", "values_of"]

# What holds for all sizes up to the first, and together with another one up to the second, is taken to hold above.
_LARGEST, _LARGEST_OF_BOTH = 65_536, 512
_FAR = 4_096  # the largest that is tried together with a few values of another size
_FEW = (1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 64)
NO_VALUE = (ArithmeticError, TypeError, ValueError, AttributeError, KeyError, AssertionError, NotImplementedError)


def tried_sizes(symbols: Sequence[Any], environment: Any) -> dict[Any, Any] | None:
    """Return an array of sizes for each symbol, all of one length, which together hold many combinations.

    Args:
        symbols: torch's symbols for sizes, at most two.
        environment: torch's, which knows their ranges.

    Returns:
        None for another number of symbols.

    Raises:
        Exception: one of NO_VALUE: a symbol is no size.
    """
    if len(symbols) == 1:
        return {symbols[0]: _range(symbols[0], environment, _LARGEST)}
    if len(symbols) != 2:
        return None
    near = [_range(symbol, environment, _LARGEST_OF_BOTH) for symbol in symbols]
    far = [_range(symbol, environment, _FAR) for symbol in symbols]
    few = [sizes[np.isin(sizes, _FEW)] for sizes in near]
    grids = [np.meshgrid(*pair, indexing="ij") for pair in (near, (far[0], few[1]), (few[0], far[1]))]
    return {symbol: np.concatenate([grid[i].ravel() for grid in grids]) for i, symbol in enumerate(symbols)}


def _range(symbol: Any, environment: Any, largest: int) -> Any:
    limits = environment.var_to_range[symbol]
    first = max(int(limits.lower), 1)
    last = int(limits.upper) if limits.upper.is_Integer else first + largest
    return np.arange(first, min(last, first + largest) + 1)


def values_of(expression: Any, sizes: dict[Any, Any]) -> Any:
    """Return what an expression is for each of some sizes.

    Raises:
        Exception: one of NO_VALUE: it has no value for some of them, or cannot be computed for many at once.
    """
    with np.errstate(all="raise"):
        return sympy_interp(_OfMany, sizes, expression)


class _OfMany(PythonReferenceAnalysis):
    """Computes torch's expressions for arrays of sizes."""

    not_ = staticmethod(np.logical_not)
    and_ = staticmethod(np.logical_and)
    or_ = staticmethod(np.logical_or)
    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)
    sqrt = staticmethod(np.sqrt)

    @staticmethod
    def to_dtype(x: Any, dtype: torch.dtype) -> Any:
        return np.asarray(x, np.float64)

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> Any:
        return np.floor(x).astype(np.int64)

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> Any:
        return np.ceil(x).astype(np.int64)

    @staticmethod
    def trunc_to_int(x: Any, dtype: torch.dtype) -> Any:
        return np.trunc(x).astype(np.int64)

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return np.true_divide(a, b)

    truediv = int_truediv
