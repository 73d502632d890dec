"""Trace ``len``, ``max``, ``min`` and ``math.sqrt`` of dynamic sizes.

Python asks for a plain number where ``len(x)`` or ``math.sqrt(len(x))`` is called, and for a decision where
``max(len(x), 4)`` is; a trace that answers fixes the size. torch has symbolic forms of all of them.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["symbolic_sizes"]

_LEN, _MAX, _MIN, _SQRT = builtins.len, builtins.max, builtins.min, math.sqrt


@contextlib.contextmanager
def symbolic_sizes() -> Iterator[None]:
    """While active, these functions yield sizes of dynamic axes as the symbols that they are."""
    replaced: dict[tuple[Any, str], Callable[..., Any]] = {
        (builtins, "len"): _length,
        (builtins, "max"): _extreme(_MAX, torch.sym_max),
        (builtins, "min"): _extreme(_MIN, torch.sym_min),
        (math, "sqrt"): _root,
    }
    before = {place: getattr(*place) for place in replaced}
    for place, function in replaced.items():
        setattr(*place, function)
    try:
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


def _length(held: Any, /) -> Any:
    if isinstance(held, torch.Tensor) and held.ndim and isinstance(held.shape[0], torch.SymInt):
        return held.shape[0]
    return _LEN(held)


def _root(number: Any, /) -> Any:
    return torch.sym_sqrt(number) if isinstance(number, torch.SymInt | torch.SymFloat) else _SQRT(number)


def _extreme(plain: Callable[..., Any], symbolic: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def found(*values: Any, **options: Any) -> Any:
        candidates = values[0] if _LEN(values) == 1 and isinstance(values[0], list | tuple) else values
        sizes = [isinstance(value, torch.SymInt) for value in candidates]
        numbers = all(isinstance(value, int | torch.SymInt) for value in candidates)
        if options or not numbers or not any(sizes):
            return plain(*values, **options)
        return functools.reduce(symbolic, candidates)

    return found
