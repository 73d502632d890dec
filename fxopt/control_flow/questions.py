"""What is asked of a value: whether it is known while tracing, and its truth."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from fxopt.control_flow.scalars import TracedNumber, Undecided, as_number
from fxopt.control_flow.session import Where, is_running, refusal, session
from fxopt.control_flow.source import is_library, is_torch

__all__ = ["asking", "is_traced", "known_truth", "truth"]


def is_traced(value: Any) -> bool:
    """Return whether a value's truth is known only when the graph runs."""
    if isinstance(value, torch.SymBool) and known_truth(value) is not None:
        return False
    if isinstance(value, torch.SymBool | torch.SymInt | torch.SymFloat):
        return value.node.is_symbolic() and not value.node.expr.is_number if hasattr(value.node, "expr") else True
    return isinstance(value, torch.Tensor | TracedNumber)


def known_truth(value: Any) -> bool | None:
    """Return the truth of a condition on sizes where it follows from their ranges."""
    condition = value if isinstance(value, torch.SymBool) else value != 0
    if statically_known_true(condition):
        return True
    if statically_known_true(torch.sym_not(condition)):
        return False
    if is_running() and session().size_one_branches:
        return None
    return _truth_above_one(condition)


def _truth_above_one(condition: Any) -> bool | None:
    """Return the truth of a condition for sizes of inputs above 1, as torch answers where it fixes 0 and 1.

    What a model does apart for one row, it mostly does for speed, and the general way is right for one row too.
    """
    if not isinstance(condition, torch.SymBool) or not hasattr(condition.node, "expr"):
        return None
    environment: Any = condition.node.shape_env
    expression, ranges = condition.node.expr, environment.var_to_range
    symbols = expression.free_symbols
    if free_unbacked_symbols(expression) or not all(s in ranges and ranges[s].upper >= 2 for s in symbols):
        return None
    found = bound_sympy(expression, {symbol: ranges[symbol] & ValueRanges(2, int_oo) for symbol in symbols})
    return bool(found.lower) if found.is_singleton() else None


def asking(
    answer: Callable[[Any], Any], what: str, *, known: Callable[[Any], Any] = lambda size: None
) -> Callable[[Any], Any]:
    """Return a method of sizes to put in place of ``answer``: the user's function that calls it is one to rewrite.

    Args:
        answer: Python's method, which fixes a dynamic size; torch's own functions still get its answer.
        what: The user's function asks for, in words.
        known: Returns the answer if it is the same for all sizes, so that nothing is fixed.
    """

    @functools.wraps(answer)
    def method(size: Any) -> Any:
        asker = sys._getframe(1).f_code
        if is_torch(asker):
            return answer(size)
        found = known(size)
        if found is not None:
            return found
        if is_traced(size) and not is_library(asker):
            raise Undecided(what)
        return answer(size)

    return method


def truth(value: Any, at: Where) -> torch.Tensor:
    """Return what ``bool(value)`` would be, as a bool tensor without dimensions."""
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise refusal(
            "a branch asks for the truth of a tensor that has more than one element",
            at,
            got=f"shape {tuple(value.shape)}",
            try_="any() or all() of the tensor, or torch.where to choose element by element",
        )
    return as_number(value).as_kind(bool).tensor
