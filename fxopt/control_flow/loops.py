"""Run a loop as Python would, or, where a tensor decides how often it turns, trace one turn of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.args import shape_text
from fxopt.control_flow import markers
from fxopt.control_flow.questions import is_traced, truth
from fxopt.control_flow.scalars import TracedNumber, as_number
from fxopt.control_flow.session import Where, refusal, session
from fxopt.control_flow.state import State, trial
from fxopt.control_flow.values import UNDEFINED, Differ, Undefined, common_type, map_leaves, pair_leaves

__all__ = ["trace_loop", "while_"]

_LONGEST_UNROLLED = 10_000


def while_(asks: Callable[[], Any], body: Callable[[], Any], state: State, at: Where) -> None:
    """Run ``while asks(): body()``."""
    for _ in range(_LONGEST_UNROLLED):
        test = asks()
        if not is_traced(test):
            if not test:
                return
            if not _becomes_traced(asks, body, state, at):
                body()
                continue
        trace_loop(asks, body, state, at)
        return
    raise refusal(
        f"a loop did not end within {_LONGEST_UNROLLED:,} turns while it was traced",
        at,
        try_="let a tensor decide when it ends, so that the graph can hold the loop itself",
    )


def _becomes_traced(asks: Callable[[], Any], body: Callable[[], Any], state: State, at: Where) -> bool:
    """Return whether the loop, whose first test Python can answer, asks a tensor later: ``while True: if t: break``."""
    if session().in_trial:
        return False
    with trial(state, at):
        body()
        return is_traced(asks())


def trace_loop(asks: Callable[[], Any], body: Callable[[], Any], state: State, at: Where) -> None:
    """Trace the test and one turn of a loop, and bind every name to what it holds after the last."""
    here = session()
    start = _loop_start(asks, body, state, at)
    region = here.new_region(at)
    markers.BEGIN_LOOP(region)
    variables: list[torch.Tensor] = []

    def variable(leaf: Any) -> Any:
        if not isinstance(leaf, _Carried):
            return leaf
        made = markers.LOOP_VARIABLE(leaf.tensor, region)
        variables.append(made)
        return TracedNumber(made) if leaf.is_number else made

    state.put([map_leaves(variable, value) for value in start])
    with here.inside():
        markers.LOOP_TEST(truth(asks(), at), region)
        body()
        after = state.take()
    following: list[torch.Tensor] = []
    for name, began, ended in zip(state.names, start, after, strict=True):
        if name in state.live:
            _next_values(began, ended, following)
    markers.LOOP_NEXT(following, region)
    markers.END_LOOP(region)
    results = iter([markers.LOOP_RESULT(one, region) for one in variables])

    def result(leaf: Any) -> Any:
        if not isinstance(leaf, _Carried):
            return leaf
        made = next(results)
        return TracedNumber(made) if leaf.is_number else leaf.tensor if leaf.is_written else made

    state.put([map_leaves(result, value) for value in start])


@dataclasses.dataclass
class _Carried:
    """A tensor or number that changes from turn to turn: its value before the first.

    Attributes:
        tensor: The value.
        is_number: Whether it is a Python number.
        is_written: Whether the loop writes into it, so that it is the same tensor afterwards.
    """

    tensor: torch.Tensor
    is_number: bool = False
    is_written: bool = False


def _loop_start(asks: Callable[[], Any], body: Callable[[], Any], state: State, at: Where) -> list[Any]:
    """Return the values of the names before the loop, what changes from turn to turn replaced by ``_Carried``.

    What changes, and of which type it becomes, is found by turns whose trace is thrown away: until the types that go
    into a turn are those that come out of it.
    """
    start: list[Any] = [
        v if name in state.live else UNDEFINED for name, v in zip(state.names, state.take(), strict=True)
    ]
    for _ in range(4):
        versions = _versions(start)
        with trial(state, at) as heap:
            state.put([map_leaves(_as_value, value) for value in start])
            asks()
            body()
            after = state.take()
            grown = heap.changed()
            widened = [
                _widened(began, ended, versions, name, at) if name in state.live else UNDEFINED
                for name, began, ended in zip(state.names, start, after, strict=True)
            ]
        if grown:
            raise refusal(
                f"a loop whose number of turns depends on a tensor changes {grown}",
                at,
                try_="a list that the function makes itself, to which a for loop without break appends a tensor "
                "on each turn; or a tensor of fixed size, written by index",
            )
        if all(old is new for old, new in zip(start, widened, strict=True)):
            return start
        _check_memory(start, state, versions, at)
        start = widened
    raise refusal("the types of the values that a loop hands on do not settle", at)


def _versions(values: list[Any]) -> dict[int, int]:
    """Return how often each tensor has been written in place."""
    return {id(t): t._version for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)}


def _check_memory(start: list[Any], state: State, versions: dict[int, int], at: Where) -> None:
    """Refuse a loop that writes into a tensor and uses another one of the same memory: it would not see the write."""
    leaves = [leaf for leaf in pytree.tree_leaves([*start, *state.seen()]) if isinstance(leaf, torch.Tensor)]
    written = [leaf for leaf in leaves if _was_written(leaf, versions)]
    for leaf in written:
        if any(other is not leaf and _memory(other) == _memory(leaf) for other in leaves):
            raise refusal(
                "a loop whose number of turns depends on a tensor writes into a value "
                "that shares its memory with another one that the loop uses",
                at,
                got=shape_text(leaf),
                try_="write into one of the two only, or into a copy: y = x.clone()",
            )


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_value(leaf: Any) -> Any:
    if not isinstance(leaf, _Carried):
        return leaf
    return TracedNumber(leaf.tensor.clone()) if leaf.is_number else leaf.tensor.clone()


def _widened(began: Any, ended: Any, versions: dict[int, int], name: str, at: Where) -> Any:
    """Return what the name holds before the loop, in a type that it keeps; the same object if nothing has to change."""
    settled = True

    def carry(a: Any, b: Any, where: str) -> Any:
        nonlocal settled
        settled = False
        a, _ = common_type(a, b, where)
        if _was_written(a, versions):
            raise refusal(
                f"a loop whose number of turns depends on a tensor writes into {name!r} and then binds it anew",
                at,
                try_=f"one of the two only, or a copy before the loop: {name} = {name}.clone()",
            )
        return _Carried(a.tensor, is_number=True) if isinstance(a, TracedNumber) else _Carried(a)

    def write(leaf: Any) -> Any:
        nonlocal settled
        if not _was_written(leaf, versions):
            return leaf
        settled = False
        return _Carried(leaf, is_written=True)

    try:
        found = _paired_with_carried(began, ended, carry, repr(name))
        found = map_leaves(write, found)
    except Differ as difference:
        text = str(difference).replace("on one side", "before a turn").replace("on the other", "after it")
        raise refusal(
            f"a loop whose number of turns depends on a tensor changes a type: {text}",
            at,
            try_="give the value its final shape and element type before the loop",
        ) from None
    return began if settled else found


def _was_written(leaf: Any, versions: dict[int, int]) -> bool:
    return isinstance(leaf, torch.Tensor) and versions.get(id(leaf), leaf._version) != leaf._version


def _paired_with_carried(began: Any, ended: Any, carry: Callable[[Any, Any, str], Any], where: str) -> Any:
    if isinstance(began, Undefined):
        return pair_leaves(began, ended, carry, where)
    leaves, spec = pytree.tree_flatten(began)
    others, other_spec = pytree.tree_flatten(ended)
    if spec != other_spec:
        return pair_leaves(began, ended, carry, where)
    paired = []
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, _Carried):
            value = TracedNumber(a.tensor) if a.is_number else a.tensor
            kinds = (type(value), value.kind if isinstance(value, TracedNumber) else value.dtype)
            merged = pair_leaves(value, b, lambda x, y, w: common_type(x, y, w)[0], where)
            now = (type(merged), merged.kind if isinstance(merged, TracedNumber) else merged.dtype)
            paired.append(a if kinds == now else carry(merged, b, where))
        else:
            paired.append(pair_leaves(a, b, carry, where))
    return pytree.tree_unflatten(paired, spec)


def _next_values(began: Any, ended: Any, following: list[torch.Tensor]) -> None:
    if isinstance(began, Undefined):
        return
    for a, b in zip(pytree.tree_leaves(began), pytree.tree_leaves(ended), strict=True):
        if isinstance(a, _Carried):
            tensor = as_number(b).tensor if a.is_number or not isinstance(b, torch.Tensor) else b
            following.append(tensor if tensor.dtype == a.tensor.dtype else tensor.to(a.tensor.dtype))
