"""``for`` over what Python can count, and over ranges and rows of tensors whose number the graph alone knows."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.control_flow.branches import trace_branch, truth_and_
from fxopt.control_flow.growing import Growth, Rows
from fxopt.control_flow.indexing import get_item
from fxopt.control_flow.loops import trace_loop
from fxopt.control_flow.questions import is_traced
from fxopt.control_flow.scalars import TracedNumber, Undecided, UndecidedRows, as_number
from fxopt.control_flow.session import Where, refusal, session
from fxopt.control_flow.source import asking_frame
from fxopt.control_flow.state import State

__all__ = ["enumerate_", "for_", "range_", "zip_"]


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Items by number, and how many there are is known only when the graph runs.

    Attributes:
        start: The first number.
        stop: Where the numbers end.
        step: From one to the next.
        item: Returns the item of a number.
        unrolled: Returns the items as Python has them, if that can be without their number.
    """

    start: Any
    stop: Any
    step: int = 1
    item: Callable[[Any], Any] = lambda number: number
    unrolled: Callable[[], Iterable[Any]] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.unrolled is None:
            raise Undecided("a range whose bounds depend on a tensor")
        asking = asking_frame(sys._getframe(1))
        if asking is None or asking.f_code not in session().unrolled:
            raise UndecidedRows("the rows of a tensor of dynamic size one by one")
        return iter(self.unrolled())


def range_(at: Where, *bounds: Any) -> Any:
    """Return ``range(*bounds)``."""
    if not any(is_traced(bound) for bound in bounds):
        return builtins.range(*bounds)
    start, stop, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if not isinstance(step, int) or step == 0:
        raise refusal("the step of a range depends on a tensor", at)
    return _Counted(start, stop, step)


def enumerate_(at: Where, items: Any, start: Any = 0) -> Any:
    """Return ``enumerate(items, start)``."""
    rows = _from_zero(items)
    if rows is None:
        return builtins.enumerate(items, start)
    return _Counted(
        0,
        rows.stop,
        item=lambda number: (number + start, rows.item(number)),
        unrolled=None if rows.unrolled is None else lambda: builtins.enumerate(items, start),
    )


def zip_(at: Where, *operands: Any, strict: bool = False) -> Any:
    """Return ``zip(*operands)``; Python's own where the graph cannot count all of them."""
    counted = [_from_zero(operand) for operand in operands]
    found = [one or _rows_of(operand) for one, operand in zip(counted, operands, strict=True)]
    rows = [each for each in found if each is not None]
    stops = [each.stop for each in rows]
    if not any(counted) or None in found or (strict and not all(_is_same(stops[0], stop) for stop in stops)):
        return builtins.zip(*operands, strict=strict)
    ranges = any(each.unrolled is None for each in rows)
    return _Counted(
        0,
        functools.reduce(_smaller, stops),
        item=lambda number: tuple(each.item(number) for each in rows),
        unrolled=None if ranges else lambda: builtins.zip(*operands, strict=strict),
    )


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (
        not isinstance(a, TracedNumber) and not isinstance(b, TracedNumber) and statically_known_true(a == b)
    )


def _smaller(a: Any, b: Any) -> Any:
    if _is_same(a, b):
        return a
    if isinstance(a, TracedNumber) or isinstance(b, TracedNumber):
        return TracedNumber(torch.minimum(as_number(a).tensor, as_number(b).tensor))
    return torch.sym_min(a, b)


def _from_zero(items: Any) -> _Counted | None:
    """Return items that the graph counts from 0 on, or None."""
    if isinstance(items, _Counted):
        return items if items.step == 1 and isinstance(items.start, int) and items.start == 0 else None
    rows = _rows_of(items)
    return rows if rows is not None and is_traced(rows.stop) else None


def _rows_of(tensor: Any) -> _Counted | None:
    tensor = tensor.tensor if isinstance(tensor, Rows) else tensor
    if not isinstance(tensor, torch.Tensor) or not tensor.ndim:
        return None
    return _Counted(0, tensor.shape[0], item=lambda number: get_item(tensor, number), unrolled=lambda: tensor.unbind())


def for_(
    items: Iterable[Any], body: Callable[[Any], Any], asks: Callable[[], Any] | None, state: State, at: Where
) -> None:
    """Run ``for item in items: body(item)``, as long as ``asks()``, if it is given."""
    counted = items if isinstance(items, _Counted) else _from_zero(items)
    if counted is not None:
        _counted_for(counted, body, asks, state, at)
        return
    for item in items:
        goes = True if asks is None else asks()
        if is_traced(goes):
            trace_branch(goes, lambda item=item: body(item), lambda: None, state, at)  # type: ignore[misc]  # mypy infers no type of a default
        elif not goes:
            break
        else:
            body(item)


def _counted_for(
    items: _Counted, body: Callable[[Any], Any], asks: Callable[[], Any] | None, state: State, at: Where
) -> None:
    count, stop = [as_number(items.start)], as_number(items.stop)

    def one() -> None:
        body(items.item(count[0]))

    # Behind a `break` there are fewer items than the range has numbers.
    growth = Growth.of(one, lambda: _turns(items), state, at) if asks is None else None
    buffers = [] if growth is None else growth.buffers

    def more() -> Any:
        inside = operator.lt if items.step > 0 else operator.gt
        return TracedNumber(as_number(inside(count[0], stop)).tensor)

    def test() -> Any:
        return more() if asks is None else truth_and_(at, asks(), more)

    def turn() -> None:
        number = count[0]
        if growth is None:
            one()
        else:
            place = number if (items.start, items.step) == (0, 1) else (number - items.start) // items.step
            with growth.turn(as_number(place).tensor.reshape(1)):
                one()
        count[0] = number + items.step

    def put(values: list[Any]) -> None:
        count[0], buffers[:] = values[0], values[1 : 1 + len(buffers)]
        state.put(values[1 + len(buffers) :])

    own = ["the counter of the loop", *(f"list {number} that the loop makes" for number in range(len(buffers)))]
    counted = State(
        [*own, *state.names], [*own, *state.live], lambda: [count[0], *buffers, *state.take()], put, state.seen
    )
    trace_loop(test, turn, counted, at)
    if growth is not None:
        growth.finish()


def _turns(items: _Counted) -> Any:
    """Return how many items there are, as a size."""
    width, forward = abs(items.step), 1 if items.step > 0 else -1
    start, stop = items.start, items.stop
    if not isinstance(start, TracedNumber) and not isinstance(stop, TracedNumber | torch.Tensor):
        turns = (forward * (stop - start) + width - 1) // width
        return turns if statically_known_true(turns >= 0) else torch.sym_max(turns, 0)
    distance = (as_number(stop) - start) * forward + (width - 1)
    return TracedNumber(as_number(distance // width).tensor.clamp(min=0)).symbolic()
