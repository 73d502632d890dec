"""The local names that a branch or a loop binds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from fxopt.control_flow import markers
from fxopt.control_flow.heap import Heap
from fxopt.control_flow.session import Where, session
from fxopt.control_flow.values import UNDEFINED

__all__ = ["NO_STATE", "State", "peek", "trial"]


@dataclasses.dataclass(frozen=True)
class State:
    """The local names that a branch or loop binds, and how to read and write them.

    Attributes:
        names: All of them.
        live: Those that may be read later; only these must become one value.
        take: Reads them, in order.
        put: Writes them, in order.
        seen: Reads the other names that the body uses, in whose containers it may write.
    """

    names: list[str]
    live: list[str]
    take: Callable[[], list[Any]]
    put: Callable[[list[Any]], None]
    seen: Callable[[], list[Any]]


NO_STATE = State([], [], list, lambda values: None, list)


def peek(read: Callable[[], Any]) -> Any:
    """Return what a name holds, or UNDEFINED."""
    try:
        return read()
    except NameError:
        return UNDEFINED


@contextlib.contextmanager
def trial(state: State, at: Where) -> Iterator[Heap]:
    """Run the block as a trace that is thrown away, then put every name and container back; yields the containers."""
    here = session()
    region = here.new_region(at)
    before = state.take()
    heap = Heap(state.seen(), before, here.modules)
    markers.BEGIN_TRIAL(region)
    try:
        with here.inside(trial=True):
            yield heap
    finally:
        markers.END_TRIAL(region)
        state.put(before)
        heap.restore()
