"""Trace for dynamic sizes of any value: none is told from 0 or 1, or from another one, by what it is in the example.

Otherwise torch asks, of each size that is computed from others, whether it is 1, since a value of size 1 is repeated
and its stride does not count; where the answer is not the same for all sizes, it refuses the range.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import sympy
import torch
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from fxopt.size_values import NO_VALUE, tried_sizes, values_of

__all__ = ["any_sizes"]


@contextlib.contextmanager
def any_sizes() -> Iterator[None]:
    """While active, torch's operators are traced as for sizes above 1, whatever those of the example are.

    What a model's code asks of sizes has to be kept from torch: it would be answered in the same way.
    """
    caches: Any = importlib.import_module("torch._dynamo.config")  # takes seconds to load: not on import
    sizes: Any = _config

    evaluate, known = ShapeEnv.evaluate_expr, _Known()

    def evaluate_expr(environment: Any, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        answer = known.answer(environment, orig_expr)
        return evaluate(environment, orig_expr, *args, **kwargs) if answer is None else answer

    # What torch keeps of earlier results it checks against the sizes of the example.
    with (
        sizes.patch(backed_size_oblivious=True),
        caches.patch(fake_tensor_cache_enabled=False),
        _CopiesInOrder(),
    ):
        setattr(ShapeEnv, "evaluate_expr", evaluate_expr)  # noqa: B010  (mypy forbids the assignment that this is)
        try:
            yield
        finally:
            setattr(ShapeEnv, "evaluate_expr", evaluate)  # noqa: B010  (as above)


class _Known:
    """Answers to torch's questions about sizes, the same for all sizes."""

    def __init__(self) -> None:
        self._answers: dict[tuple[Any, Any], Any] = {}

    def answer(self, environment: Any, question: Any) -> Any:
        """Return sympy's true or false; None where torch has to answer."""
        if not isinstance(question, sympy.logic.boolalg.Boolean) or question in (sympy.true, sympy.false):
            return None
        key = (environment, question)
        if key not in self._answers:
            self._answers[key] = _answered(environment, question)
        return self._answers[key]


def _answered(environment: Any, question: Any) -> Any:
    if free_unbacked_symbols(question) or environment._maybe_evaluate_static(question) is not None:
        return None
    with contextlib.suppress(*NO_VALUE):
        tried = tried_sizes(sorted(question.free_symbols, key=str), environment)
        found = values_of(question, tried) if tried is not None else [True, False]
        if np.all(found) or not np.any(found):
            return sympy.true if np.all(found) else sympy.false
    return _as_above_one(question)


# Not "at least 2", which a kernel of 2 needs, and which asks for no single row.
_ABOVE_ONE = {
    (sympy.Eq, 0): sympy.false, (sympy.Eq, 1): sympy.false, (sympy.Ne, 0): sympy.true, (sympy.Ne, 1): sympy.true,
    (sympy.Gt, 1): sympy.true, (sympy.Le, 1): sympy.false,
}  # fmt: skip


def _as_above_one(question: Any) -> Any:
    """Return the answer to whether a size is 0, 1, or above 1; None to another question."""
    if not isinstance(question, sympy.core.relational.Relational):
        return None
    relation = question if question.rhs.is_Integer else question.reversed
    return _ABOVE_ONE.get((relation.func, relation.rhs))


class _CopiesInOrder(TorchFunctionMode):
    """Copies what is asked to lie in memory in order, whether it does or not: the sizes tell which."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.contiguous and any(isinstance(size, torch.SymInt) for size in args[0].shape):
            return args[0].clone(memory_format=kwargs.get("memory_format", torch.contiguous_format))
        return func(*args, **kwargs)
