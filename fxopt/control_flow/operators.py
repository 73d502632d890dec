"""``torch.cond`` and ``torch.while_loop`` in a model's code, traced as the ``if`` and ``while`` that they stand for.

torch traces the functions that it is given with a compiler of its own, apart from the rest of the model: that compiler
takes neither a module in a closure while a training flag is watched, nor a flag that differs between the modes. Here
both sides are traced in place, between the markers that a Python branch leaves.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._higher_order_ops.while_loop import while_loop as torchs_while_loop

from fxopt.control_flow.branches import trace_branch
from fxopt.control_flow.loops import trace_loop
from fxopt.control_flow.questions import is_traced
from fxopt.control_flow.scalars import Undecided
from fxopt.control_flow.session import Where, is_running, refusal
from fxopt.control_flow.source import asking_frame
from fxopt.control_flow.state import State
from fxopt.control_flow.values import UNDEFINED, describe_value

__all__ = ["cond", "operators_traced", "while_loop"]


def cond(predicate: Any, side: Callable[..., Any], other: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """Return what ``torch.cond`` would: the result of ``side``, or of ``other``.

    Raises:
        CaptureError: the results of both sides cannot become one value.
        Undecided: the trace that runs cannot hold branches.
    """
    if not is_traced(predicate):
        return (side if predicate else other)(*operands)
    if not is_running():
        raise Undecided("the side that torch.cond takes")
    state = _Closures([side, other], operands).state()
    return trace_branch(predicate, lambda: side(*operands), lambda: other(*operands), state, _call_site())


def while_loop(asks: Callable[..., Any], body: Callable[..., Any], carried: Sequence[Any]) -> Any:
    """Return what ``torch.while_loop`` would: ``carried`` after the last turn.

    Raises:
        CaptureError: a turn hands on another number or type of values than it was given.
        Undecided: the trace that runs cannot hold loops.
    """
    if not is_running():
        raise Undecided("the number of turns of a while_loop")
    at, values, form = _call_site(), list(carried), tuple

    def turn() -> None:
        nonlocal form
        result = body(*values)
        _check_carried(result, values, at)
        form, values[:] = type(result), result

    outer = _Closures([asks, body], carried).state()
    names = [f"carried_inputs[{index}]" for index in range(len(values))]

    def put(new: list[Any]) -> None:
        values[:] = new[: len(values)]
        outer.put(new[len(values) :])

    state = State([*names, *outer.names], [*names, *outer.live], lambda: [*values, *outer.take()], put, outer.seen)
    trace_loop(lambda: asks(*values), turn, state, at)
    return form(values)


def _check_carried(result: Any, values: Sequence[Any], at: Where) -> None:
    if not isinstance(result, tuple | list) or len(result) != len(values):
        raise refusal(
            "a turn of a while_loop hands on another number of values than it was given",
            at,
            got=describe_value(result),
            wanted=f"a tuple of {len(values)}",
            try_="return one value for each of carried_inputs, unchanged ones too",
        )


def _call_site() -> Where:
    """Return the line of the user's code that called the operator."""
    frame = asking_frame()
    return (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) if frame is not None else ("", 0, "")


class _Closures:
    """The variables around some functions: what they bind with ``nonlocal``, and in whose containers they may write."""

    def __init__(self, functions: Sequence[Any], operands: Sequence[Any]) -> None:
        self.cells: dict[int, tuple[str, types.CellType]] = {}
        self.seen: list[Any] = [*operands]
        for function in functions:
            self._add(function)

    def _add(self, function: Any) -> None:
        while isinstance(function, functools.partial):
            self.seen += [*function.args, *function.keywords.values()]
            function = function.func
        if isinstance(function, types.MethodType):
            self.seen.append(function.__self__)
            function = function.__func__
        if isinstance(function, types.FunctionType):
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            self.cells |= {id(cell): (name, cell) for name, cell in cells}

    def state(self) -> State:
        """Return the variables as a branch or loop binds local names."""
        names = [name for name, _ in self.cells.values()]
        return State(names, names, self._take, self._put, lambda: self.seen)

    def _take(self) -> list[Any]:
        return [_content(cell) for _, cell in self.cells.values()]

    def _put(self, values: list[Any]) -> None:
        for (_, cell), value in zip(self.cells.values(), values, strict=True):
            if value is not UNDEFINED:
                cell.cell_contents = value
            elif _content(cell) is not UNDEFINED:
                del cell.cell_contents


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is bound yet
        return UNDEFINED


def _cond_of_torch(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
    from fxopt.control_flow.operators import cond  # it runs with the global names of torch's function

    return cond(pred, true_fn, false_fn, operands)


def _while_loop_of_torch(cond_fn: Any, body_fn: Any, carried_inputs: Any) -> Any:
    from fxopt.control_flow.operators import while_loop  # as above

    return while_loop(cond_fn, body_fn, carried_inputs)


_STAND_INS: dict[Any, Any] = {torch.cond: _cond_of_torch, torchs_while_loop: _while_loop_of_torch}


@contextlib.contextmanager
def operators_traced() -> Iterator[None]:
    """Let calls of torch's operators come here, by whatever name the model's code has them."""
    kept = [(function, function.__code__) for function in _STAND_INS]
    for function, stand_in in _STAND_INS.items():
        function.__code__ = stand_in.__code__
    try:
        yield
    finally:
        for function, code in kept:
            function.__code__ = code
