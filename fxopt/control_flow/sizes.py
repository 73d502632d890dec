"""The size that two sides of a branch give one value, where a condition on sizes decides between the sides.

    pad = (8 - n % 8) % 8
    if pad > 0:
        x = F.pad(x, (0, pad))

Where the branch is not taken ``n`` is ``n + pad``, so that this is the size of ``x`` behind it for all ``n``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxopt.control_flow.scalars import TracedNumber
from fxopt.size_values import NO_VALUE, tried_sizes, values_of

__all__ = ["SizeCondition", "all_of", "any_of", "condition_of", "joined_sizes"]


@dataclasses.dataclass(frozen=True)
class SizeCondition:
    """What is true of dynamic sizes on one side of a branch.

    Attributes:
        expression: Of torch's symbols for sizes.
        environment: torch's, in which the symbols have ranges.
    """

    expression: Any
    environment: Any

    def negated(self) -> SizeCondition:
        """Return what is true on the other side."""
        return dataclasses.replace(self, expression=sympy.Not(self.expression))


def condition_of(test: Any) -> SizeCondition | None:
    """Return what ``if test:`` asks of sizes; None where it asks for anything else."""
    if isinstance(test, TracedNumber):
        test = test.condition
    if isinstance(test, SizeCondition):
        return test
    if isinstance(test, torch.SymBool):
        return SizeCondition(test.node.expr, test.node.shape_env)
    if isinstance(test, torch.SymInt):
        return SizeCondition(sympy.Ne(test.node.expr, 0), test.node.shape_env)
    return None


def any_of(first: SizeCondition | None, second: SizeCondition | None) -> SizeCondition | None:
    """Return the condition of ``first or second``."""
    return _both(sympy.Or, first, second)


def all_of(first: SizeCondition | None, second: SizeCondition | None) -> SizeCondition | None:
    """Return the condition of ``first and second``."""
    return _both(sympy.And, first, second)


def _both(form: Any, first: SizeCondition | None, second: SizeCondition | None) -> SizeCondition | None:
    if first is None or second is None:
        return None
    return dataclasses.replace(first, expression=form(first.expression, second.expression))


def joined_sizes(first: Sequence[Any], second: Sequence[Any], condition: SizeCondition | None) -> list[Any] | None:
    """Return sizes that are those of ``first`` where ``condition`` holds, and those of ``second`` where it does not.

    Without a condition they are those of both for all sizes, which torch's algebra may not tell.

    Returns:
        One size for each axis; None if there are none, or none that could be found.
    """
    if len(first) != len(second):
        return None
    found = []
    for a, b in zip(first, second, strict=True):
        size = a if statically_known_true(a == b) else _joined(a, b, condition)
        if size is None:
            return None
        found.append(size)
    return found


def _joined(a: Any, b: Any, condition: SizeCondition | None) -> Any:
    p, q, asked = _expression(a), _expression(b), condition.expression if condition else sympy.true
    environment = next((size.node.shape_env for size in (a, b) if isinstance(size, torch.SymInt)), None)
    symbols = sorted(p.free_symbols | q.free_symbols | asked.free_symbols, key=str)
    if environment is None or any(free_unbacked_symbols(item) for item in (p, q, asked)):
        return None
    try:
        tried = tried_sizes(symbols, environment)
        wanted = _wanted(p, q, asked, tried) if tried is not None else None
    except NO_VALUE:  # a side divides by zero for sizes for which it runs, or computes what is no size
        return None
    if wanted is None or tried is None:
        return None
    for candidate in _candidates(p, q, asked):
        try:
            fits = bool(np.all(values_of(candidate, tried) == wanted))
        except NO_VALUE:
            continue
        if fits:
            return _size(candidate, (a, b), environment)
    return None


def _wanted(p: Any, q: Any, asked: Any, tried: dict[Any, Any]) -> Any:
    """Return the size for each of those tried; None if none of them tells what one side does."""
    length = len(next(iter(tried.values())))
    if asked == sympy.true:
        first, second = (np.broadcast_to(values_of(item, tried), length) for item in (p, q))
        return first if np.array_equal(first, second) else None
    holds = np.broadcast_to(values_of(asked, tried), length)
    if holds.all() or not holds.any():
        return None
    wanted = np.zeros(length, np.int64)
    for expression, side in ((p, holds), (q, ~holds)):
        wanted[side] = values_of(expression, {symbol: sizes[side] for symbol, sizes in tried.items()})
    return wanted


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _size(expression: Any, known: tuple[Any, Any], environment: Any) -> Any:
    for size in known:
        if _expression(size) == expression:
            return size
    # From torch's own operations on sizes, each of which leaves a node in the trace that runs.
    symbols = {symbol: environment.create_symintnode(symbol, hint=None) for symbol in expression.free_symbols}
    return sympy_interp(PythonReferenceAnalysis, symbols, expression)


def _candidates(p: Any, q: Any, condition: Any) -> Iterator[Any]:
    """Yield expressions that may be both ``p`` on its side and ``q`` on its own, the simplest first."""
    yield from sorted((p, q), key=lambda expression: (sympy.count_ops(expression), str(expression)))
    yield Min(p, q)
    yield Max(p, q)
    # Sizes that are cut or filled up to a multiple.
    divisions = [atom for item in (p, q, condition) for atom in item.atoms(Mod, PythonMod, FloorDiv)]
    divisors = dict.fromkeys(atom.args[1] for atom in divisions if atom.args[1].is_Integer and atom.args[1] > 1)
    sizes = dict.fromkeys(item for item in (p, q) if item.is_Symbol)
    for size, divisor in itertools.product(sizes, divisors):
        yield divisor * FloorDiv(size + divisor - 1, divisor)
        yield divisor * FloorDiv(size, divisor)
