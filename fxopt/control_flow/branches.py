"""Run a branch as Python would, or, where a tensor decides, trace both of its sides.

One side is traced, every name and every container is put back to what it was, the other side is traced, and of the two
values that each name then has one is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.control_flow import markers
from fxopt.control_flow.heap import Heap
from fxopt.control_flow.jumps import VALUE
from fxopt.control_flow.questions import is_traced, truth
from fxopt.control_flow.scalars import TracedNumber, as_number
from fxopt.control_flow.session import Raised, Where, in_branch, place, refusal, session
from fxopt.control_flow.sizes import SizeCondition, all_of, any_of, condition_of, joined_sizes
from fxopt.control_flow.state import NO_STATE, State
from fxopt.control_flow.values import (
    UNDEFINED,
    Differ,
    common_type,
    map_leaves,
    pair_leaves,
    same_sizes,
    same_value,
)

__all__ = [
    "and_", "assert_", "if_", "if_expression", "not_", "or_", "raised", "trace_branch", "truth_and_", "truth_or_",
]  # fmt: skip


def if_(test: Any, side: Callable[[], Any], other: Callable[[], Any], state: State, at: Where) -> None:
    """Run ``if test: side() else: other()``."""
    if not is_traced(test):
        (side if test else other)()
        return
    trace_branch(test, side, other, state, at)


def trace_branch(
    test: Any,
    side: Callable[[], Any],
    other: Callable[[], Any],
    state: State,
    at: Where,
    *,
    is_shortcut: bool = False,
) -> Any:
    """Trace both sides of a branch; return what stands for the results of both."""
    here = session()
    predicate = truth(test, at)
    region = here.new_region(at, is_shortcut=is_shortcut)
    before = state.take()
    heap = Heap(state.seen(), before, here.modules)
    markers.BEGIN_BRANCH(predicate, region)
    first = _traced_side(side, state, heap, region)
    markers.OTHER_SIDE(region)
    state.put(before)
    heap.restore()
    second = _traced_side(other, state, heap, region)
    markers.END_BRANCH(region)
    if isinstance(first, Raised) and isinstance(second, Raised):
        raise first
    if isinstance(first, Raised) or isinstance(second, Raised):
        return _one_side_raises(first, second, predicate, state, heap, at)
    (result, values, written), (result_2, values_2, written_2) = first, second
    choose = _chooser(region, condition_of(test))
    try:
        merged = [
            pair_leaves(a, b, choose, _told(name)) if name in state.live else _dead(a, b)
            for name, a, b in zip(state.names, values, values_2, strict=True)
        ]
        outcome = pair_leaves(result, result_2, choose, "the value")
        heap.write(heap.pair(written, written_2, choose))
    except Differ as difference:
        raise refusal(
            f"the two sides of a branch cannot become one value: {difference}",
            at,
            try_="give both sides the same shape and element type, or return the same structure from both",
        ) from None
    state.put(merged)
    return outcome


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.SymInt) or type(value) is int


def _told(name: str) -> str:
    return "what is returned" if name == VALUE else repr(name)


def _dead(a: Any, b: Any) -> Any:
    return a if same_value(a, b) else UNDEFINED


def _traced_side(run: Callable[[], Any], state: State, heap: Heap, region: int) -> Any:
    """Return (result, values of the names, what was written into containers) of one side, or how it raised."""
    try:
        with session().inside():
            result = run()
    except Raised as error:
        markers.ABORT_SIDE(region)
        return error
    known: dict[int, Any] = {}

    def left(leaf: Any) -> Any:
        if isinstance(leaf, torch.SymBool | torch.SymFloat):
            leaf = as_number(leaf)  # here: what is computed of a size inside has no node outside
        tensor = leaf.tensor if isinstance(leaf, TracedNumber) else leaf
        if not isinstance(tensor, torch.Tensor):
            return leaf
        if id(tensor) not in known:
            known[id(tensor)] = (tensor, markers.LEAVE(tensor, region))
        inside = known[id(tensor)][1]
        return TracedNumber(inside, leaf.condition) if isinstance(leaf, TracedNumber) else inside

    before = {id(leaf) for leaf in heap.known_leaves()}

    def leave(value: Any) -> Any:
        # What was there before needs no way out; the same object on both sides needs no choice.
        return map_leaves(lambda leaf: leaf if id(leaf) in before else left(leaf), value)

    values = [leave(v) if name in state.live else v for name, v in zip(state.names, state.take(), strict=True)]
    return leave(result), values, heap.written(leave)


def _chooser(region: int, condition: SizeCondition | None) -> Callable[[Any, Any, str], Any]:
    def choose(a: Any, b: Any, where: str) -> Any:
        if _is_size(a) and _is_size(b) and (sizes := joined_sizes([a], [b], condition)):
            return sizes[0]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            a, b = _fitted(a, b, region, condition)
        a, b = common_type(a, b, where)
        if isinstance(a, TracedNumber):
            return TracedNumber(markers.MERGE(a.tensor, b.tensor, region))
        return markers.MERGE(a, b, region)

    return choose


def _fitted(
    a: torch.Tensor, b: torch.Tensor, region: int, condition: SizeCondition | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both with the same sizes, where the condition that decides between them makes these equal."""
    sizes = joined_sizes(a.shape, b.shape, condition)
    if sizes is None:
        return a, b
    first, second = (t if same_sizes(t.shape, sizes) else markers.FIT(t, sizes, region) for t in (a, b))
    return first, second


def _one_side_raises(first: Any, second: Any, predicate: torch.Tensor, state: State, heap: Heap, at: Where) -> Any:
    """Go on with the side that does not raise, under an assertion that it is the one."""
    raised_, (result, values, written) = (first, second) if isinstance(first, Raised) else (second, first)
    holds = predicate.logical_not() if raised_ is first else predicate
    torch.ops.aten._assert_async.msg(holds, raised_.text(at))
    state.put(values)
    heap.write(written)
    return result


def if_expression(test: Any, side: Callable[[], Any], other: Callable[[], Any], at: Where) -> Any:
    """Return ``side() if test else other()``."""
    if not is_traced(test):
        return side() if test else other()
    return trace_branch(test, side, other, NO_STATE, at)


def and_(at: Where, first: Any, *rest: Callable[[], Any]) -> Any:
    """Return ``a and b and ...``: the first operand that is false, or the last."""
    return _shortcut(at, first, rest, lambda value: value, stop=False)


def or_(at: Where, first: Any, *rest: Callable[[], Any]) -> Any:
    """Return ``a or b or ...``: the first operand that is true, or the last."""
    return _shortcut(at, first, rest, lambda value: value, stop=True)


def truth_and_(at: Where, first: Any, *rest: Callable[[], Any]) -> Any:
    """Return the truth of ``a and b and ...``."""
    return _shortcut(at, first, rest, lambda value: _truth_number(value, at), stop=False)


def truth_or_(at: Where, first: Any, *rest: Callable[[], Any]) -> Any:
    """Return the truth of ``a or b or ...``."""
    return _shortcut(at, first, rest, lambda value: _truth_number(value, at), stop=True)


def _truth_number(value: Any, at: Where) -> Any:
    return TracedNumber(truth(value, at), condition_of(value)) if is_traced(value) else bool(value)


def _shortcut(
    at: Where, first: Any, rest: tuple[Callable[[], Any], ...], form: Callable[[Any], Any], *, stop: bool
) -> Any:
    value = form(first)
    if not rest:
        return value
    last: Any = None

    def others() -> Any:
        nonlocal last
        last = _shortcut(at, rest[0](), rest[1:], form, stop=stop)
        return last

    if not is_traced(value):
        return value if bool(value) is stop else others()
    side, other = ((lambda: value), others) if stop else (others, (lambda: value))
    outcome = trace_branch(value, side, other, NO_STATE, at, is_shortcut=True)
    if isinstance(outcome, TracedNumber):
        outcome.condition = (any_of if stop else all_of)(condition_of(value), condition_of(last))
    return outcome


def not_(value: Any) -> Any:
    """Return ``not value``."""
    if not is_traced(value):
        return not value
    condition = condition_of(value)
    return TracedNumber(truth(value, ("", 0, "")).logical_not(), condition.negated() if condition else None)


def assert_(test: Any, message: Callable[[], Any], at: Where) -> None:
    """Run ``assert test, message``; on a tensor, the graph asserts it when it runs."""
    if not is_traced(test):
        if not test:
            raise raised(AssertionError(message()))
        return
    torch.ops.aten._assert_async.msg(truth(test, at), f"{message()} ({place(at)})")


def raised(error: Any) -> BaseException:
    """Return what to raise for ``raise error``: on one side of a traced branch, something that stops that side."""
    made: BaseException = error() if isinstance(error, type) else error
    return Raised(made) if in_branch() else made
