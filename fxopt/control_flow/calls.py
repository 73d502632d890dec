"""Builtins and functions of ``math`` that ask for the value of a number."""

from __future__ import annotations

import builtins
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxopt.control_flow.arguments import call_with_numbers, holds_numbers
from fxopt.control_flow.branches import truth_and_, truth_or_
from fxopt.control_flow.growing import Rows, of_rows
from fxopt.control_flow.iteration import enumerate_, range_, zip_
from fxopt.control_flow.questions import is_traced, truth
from fxopt.control_flow.scalars import TracedNumber, as_number
from fxopt.control_flow.session import CaptureWarning, Where, in_branch, place, refusal
from fxopt.control_flow.values import common_type

__all__ = ["call", "invoke"]


def call(name: str, function: Callable[..., Any], at: Where, *args: Any, **kwargs: Any) -> Any:
    """Call ``function``, which the user's code calls ``name``: a builtin or one of ``math``, on traced numbers too."""
    if name == "len" and args and isinstance(args[0], Rows):
        return args[0].tensor.shape[0]
    # By name, since torch.export puts others in the place of some builtins while it traces.
    if getattr(builtins, name, getattr(math, name.removeprefix("math."), None)) is not function:
        return function(*args, **kwargs)
    if name == "print" and in_branch():
        warnings.warn(
            CaptureWarning(f"{place(at)}: print() where a tensor decides whether it runs is left out of the graph"),
            stacklevel=2,
        )
        return None
    if name in _ITERATION and kwargs.keys() <= {"start", "strict"}:
        return _ITERATION[name](at, *args, **kwargs)
    if (found := of_rows(function, args, kwargs)) is not NotImplemented:
        return found
    if not any(is_traced(value) for value in _operands(args)) or kwargs:
        return function(*args, **kwargs)
    if name in _CALLS:
        return _CALLS[name](at, *args)
    if name in _MATH:
        numbers = [as_number(value).as_kind(float).tensor for value in args]
        return TracedNumber(_MATH[name](*numbers))
    return function(*args)


def invoke(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function``; one of torch gets numbers that depend on tensors in a form that it takes."""
    if (found := of_rows(function, args, kwargs)) is not NotImplemented:
        return found
    if holds_numbers((args, kwargs)) and _is_torchs(function):
        return call_with_numbers(function, args, kwargs)
    return function(*args, **kwargs)


def _is_torchs(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    return isinstance(getattr(function, "__self__", None), torch.Tensor) or module.partition(".")[0] == "torch"


def _operands(args: tuple[Any, ...]) -> Iterator[Any]:
    for value in args:
        yield value
        if isinstance(value, list | tuple):
            yield from value


_SYMBOLIC: dict[type, Callable[[Any], Any]] = {int: torch.sym_int, float: torch.sym_float}


def _kind(kind: type) -> Callable[..., Any]:
    def convert(at: Where, value: Any, *rest: Any) -> Any:
        if kind is bool and isinstance(value, torch.Tensor | torch.SymBool):
            return TracedNumber(truth(value, at))
        if kind in _SYMBOLIC and isinstance(value, torch.SymInt | torch.SymFloat) and not rest:
            return _SYMBOLIC[kind](value)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) or rest:
            return kind(value, *rest)
        return as_number(value).as_kind(kind)

    return convert


def _extreme(better: Callable[[Any, Any], Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def choose(at: Where, *args: Any) -> Any:
        items = list(args[0]) if len(args) == 1 else list(args)
        if all(isinstance(item, torch.Tensor) for item in items):
            return functools.reduce(plain, items)
        found = as_number(items[0])
        for item in items[1:]:
            wins = better(as_number(item), found)
            a, b = common_type(as_number(item), found, "the extreme")
            found = TracedNumber(torch.where(wins.tensor, a.tensor, b.tensor))
        return found

    return choose


def _fold(shortcut: Callable[..., Any]) -> Callable[..., Any]:
    def fold(at: Where, items: Any) -> Any:
        if isinstance(items, torch.Tensor):
            items = items.unbind()
        items = list(items)
        if not items:
            return shortcut is truth_and_
        return shortcut(at, items[0], *[lambda item=item: item for item in items[1:]])

    return fold


def _rounded(at: Where, value: Any, *digits: Any) -> Any:
    if digits:
        raise refusal("round() to digits of a number that depends on a tensor", at, try_="torch.round(x, decimals=n)")
    return TracedNumber(torch.round(as_number(value).tensor.double()).to(torch.int64))


_CALLS: dict[str, Callable[..., Any]] = {
    "int": _kind(int),
    "float": _kind(float),
    "bool": _kind(bool),
    "range": range_,
    "min": _extreme(operator.lt, torch.minimum),
    "max": _extreme(operator.gt, torch.maximum),
    "abs": lambda at, value: abs(value),
    "round": _rounded,
    "any": _fold(truth_or_),
    "all": _fold(truth_and_),
    "math.floor": lambda at, value: TracedNumber(as_number(value).tensor.double().floor().to(torch.int64)),
    "math.ceil": lambda at, value: TracedNumber(as_number(value).tensor.double().ceil().to(torch.int64)),
    "math.isnan": lambda at, value: TracedNumber(as_number(value).tensor.double().isnan()),
    "math.isinf": lambda at, value: TracedNumber(as_number(value).tensor.double().isinf()),
    "math.isfinite": lambda at, value: TracedNumber(as_number(value).tensor.double().isfinite()),
}
_ITERATION: dict[str, Callable[..., Any]] = {"enumerate": enumerate_, "zip": zip_}
_ELEMENTWISE = "sqrt exp log log2 log10 sin cos tan tanh asin acos atan pow atan2"
_MATH: dict[str, Callable[..., torch.Tensor]] = {
    f"math.{name}": getattr(torch, name) for name in _ELEMENTWISE.split()
} | {"math.fabs": torch.abs}
