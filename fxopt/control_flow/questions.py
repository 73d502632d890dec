"""What is asked of a value: whether it is known while tracing, and its truth."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.control_flow.scalars import TracedNumber, Undecided, as_number
from fxopt.control_flow.session import Where, refusal
from fxopt.control_flow.source import is_library

__all__ = ["asking", "is_known", "is_traced", "truth"]


def is_traced(value: Any) -> bool:
    """Return whether a value's truth is known only when the graph runs."""
    if isinstance(value, torch.SymBool | torch.SymInt | torch.SymFloat):
        return value.node.is_symbolic() and not value.node.expr.is_number if hasattr(value.node, "expr") else True
    return isinstance(value, torch.Tensor | TracedNumber)


def is_known(value: Any) -> bool:
    """Return whether the truth of a condition on sizes follows from their ranges."""
    condition = value if isinstance(value, torch.SymBool) else value != 0
    return statically_known_true(condition) or statically_known_true(torch.sym_not(condition))


def asking(
    answer: Callable[[Any], Any], what: str, *, known: Callable[[Any], bool] = lambda size: False
) -> Callable[[Any], Any]:
    """Return a method of sizes to put in place of ``answer``: the user's function that calls it is one to rewrite.

    Args:
        answer: Python's method, which fixes a dynamic size; torch's own functions still get its answer.
        what: The user's function asks for, in words.
        known: Whether the answer is the same for all sizes, so that nothing is fixed.
    """

    @functools.wraps(answer)
    def method(size: Any) -> Any:
        if is_traced(size) and not is_library(sys._getframe(1).f_code) and not known(size):
            raise Undecided(what)
        return answer(size)

    return method


def truth(value: Any, at: Where) -> torch.Tensor:
    """Return what ``bool(value)`` would be, as a bool tensor without dimensions."""
    if isinstance(value, torch.SymBool):
        return _size_predicate(value)
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise refusal(
            "a branch asks for the truth of a tensor that has more than one element",
            at,
            got=f"shape {tuple(value.shape)}",
            try_="any() or all() of the tensor, or torch.where to choose element by element",
        )
    return as_number(value).as_kind(bool).tensor


def _size_predicate(condition: torch.SymBool) -> torch.Tensor:
    if statically_known_true(condition):
        return torch.full((), True)
    if statically_known_true(torch.sym_not(condition)):
        return torch.full((), False)
    return torch.full((), torch.sym_ite(condition, 1, 0), dtype=torch.int64).to(torch.bool)
