"""Trace ``len``, ``max``, ``min``, ``int``, ``float``, ``torch.linspace`` and functions of ``math`` of dynamic sizes.

Python asks for a plain number where ``len(x)``, ``int(len(x) * 0.5)`` or ``math.sqrt(len(x))`` is called, and for a
decision where ``max(len(x), 4)`` is; a trace that answers fixes the size. torch has symbolic forms of most of them.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxopt.control_flow.questions import asking
from fxopt.creation_ops import LINSPACE

__all__ = ["symbolic_sizes"]

_LEN, _MAX, _MIN, _SQRT = builtins.len, builtins.max, builtins.min, math.sqrt
_LINSPACE, _OPTIONS = torch.linspace, {"dtype", "device"}


@contextlib.contextmanager
def symbolic_sizes() -> Iterator[None]:
    """While active, these functions yield sizes of dynamic axes as the symbols that they are.

    ``int`` and ``float`` are types, which cannot be replaced: a function that calls them on a size is one to rewrite,
    as one that branches on values is.
    """
    replaced: dict[tuple[Any, str], Callable[..., Any]] = {
        (builtins, "len"): _length,
        (builtins, "max"): _extreme(_MAX, torch.sym_max),
        (builtins, "min"): _extreme(_MIN, torch.sym_min),
        (math, "sqrt"): _root,
        (torch, "linspace"): _spaced,
    }
    for method in ((torch.SymFloat, "__int__"), (torch.SymFloat, "__float__"), (torch.SymInt, "__int__")):
        replaced[method] = asking(getattr(*method), "a dynamic size as a plain number")
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


def _spaced(start: Any, end: Any, steps: Any, **options: Any) -> Any:
    tensors = any(isinstance(value, torch.Tensor) for value in (start, end))
    dtype = options.get("dtype") or torch.get_default_dtype()
    if isinstance(steps, torch.SymInt) and not tensors and dtype.is_floating_point and options.keys() <= _OPTIONS:
        return LINSPACE(start, end, steps, **options)
    return _LINSPACE(start, end, steps, **options)


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
