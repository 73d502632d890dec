"""Lists to which each turn of a loop appends the same number of tensors, where the graph counts the turns.

    outs = []                               rows = zeros(n, ...)
    for t in range(n):                      for t in range(n):
        outs.append(step(x[:, t]))              rows[t] = step(x[:, t])
    return torch.stack(outs, 1)             return rows.movedim(0, 1)

The list is one that the function makes itself, so that nobody else sees that it is none any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from fxopt.args import shape_text
from fxopt.control_flow.indexing import get_item
from fxopt.control_flow.scalars import Undecided
from fxopt.control_flow.session import Where, refusal, session
from fxopt.control_flow.state import State, trial
from fxopt.control_flow.values import same_sizes

__all__ = ["Growth", "Rows", "append", "of_rows"]

_GREW = "a list that grows in a loop whose number of turns depends on a tensor"
_TRY = "torch.stack or torch.cat of the whole list behind the loop, or a tensor of fixed size, written by index"


class _Growing:
    """What stands for a list inside the loop: it can be appended to, and nothing else."""

    __slots__ = ("added", "at", "depth")

    def __init__(self, at: Where) -> None:
        self.added: list[torch.Tensor] = []
        self.at, self.depth = at, -1

    def append(self, value: Any) -> None:
        if session().depth != self.depth:
            raise self.refusal("is appended to on some turns only, or in a loop inside")
        if not isinstance(value, torch.Tensor):
            raise self.refusal(f"gets a {type(value).__name__}, which is no tensor")
        self.added.append(value)

    def refusal(self, what: str) -> BaseException:
        return refusal(f"{_GREW} {what}", self.at, try_=_TRY)

    def _read(self, *_: Any) -> NoReturn:
        raise self.refusal("is read in it")

    __len__ = __iter__ = __bool__ = __getitem__ = __setitem__ = __contains__ = __add__ = __iadd__ = _read

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python and its libraries ask of any object
            raise AttributeError(name)
        self._read()


class Rows:
    """What stands for a list behind the loop: its items are the rows of a tensor.

    Attributes:
        tensor: [items, ...].
        at: The loop.
    """

    __slots__ = ("at", "tensor")

    def __init__(self, tensor: torch.Tensor, at: Where) -> None:
        self.tensor, self.at = tensor, at

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and (index.start, index.stop, index.step) == (None, None, -1):
            return Rows(self.tensor.flip(0), self.at)
        if isinstance(index, slice):
            return Rows(get_item(self.tensor, index), self.at)
        return get_item(self.tensor, index)

    def __iter__(self) -> NoReturn:
        raise Undecided("the items of a list that grew in a loop, one by one")

    def other(self, *_: Any) -> NoReturn:
        """Refuse what a list can do, and the rows of a tensor cannot."""
        raise refusal(f"{_GREW} is used otherwise than as the rows of a tensor", self.at, try_=_TRY)

    __bool__ = __setitem__ = __contains__ = __add__ = __iadd__ = other

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.other()


def append(items: Any, value: Any) -> Any:
    """Run ``items.append(value)``, and return what the name is bound to afterwards."""
    if isinstance(items, Rows):
        items.other()
    items.append(value)
    return items


def _stacked(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return rows.movedim(0, dim)


def _concatenated(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    dim %= rows.ndim - 1
    return rows.movedim(0, dim).flatten(dim, dim + 1)


_JOINS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.stack: _stacked,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenated),
}


def of_rows(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function on a list that grew; NotImplemented where none is among its arguments, or it is the user's.

    Raises:
        CaptureError: it is one of torch that takes another list than that.
    """
    first = next((given for given in (*args, *kwargs.values()) if isinstance(given, Rows)), None)
    if first is None:
        return NotImplemented
    if function in (list, tuple) and len(args) == 1:
        return first
    if function is reversed:
        return first[::-1]
    if function in _JOINS:
        dims = [given for given in (*args, *kwargs.values()) if given is not first]
        return _JOINS[function](first.tensor, *dims)
    if getattr(function, "__module__", None) in ("torch", "builtins"):
        first.other()
    return NotImplemented


class Growth:
    """The lists to which one turn of a loop appends, and the tensors whose rows become their items.

    Attributes:
        buffers: A tensor [turns, ...] for each value that one turn appends.
    """

    def __init__(self, lists: dict[str, list[torch.Tensor]], turns: Any, state: State, at: Where) -> None:
        self.buffers: list[torch.Tensor] = []
        self._state, self._at = state, at
        self._lists = {name: _Growing(at) for name in lists}
        held = dict(zip(state.names, state.take(), strict=True))
        self._python: dict[str, list[Any]] = {name: held[name] for name in lists}
        for value in (value for added in lists.values() for value in added):
            self.buffers.append(torch.zeros((turns, *value.shape), dtype=value.dtype, device=value.device))
        self._bind(self._lists)

    @classmethod
    def of(cls, turn: Callable[[], None], turns: Callable[[], Any], state: State, at: Where) -> Growth | None:
        """Return the growth of a loop, found by a turn that is thrown away; None if no list of the function's grows."""
        held = dict(zip(state.names, state.take(), strict=True))
        lists = {name: value for name, value in held.items() if type(value) is list}
        if not lists:
            return None
        sizes = {name: len(value) for name, value in lists.items()}
        with trial(state, at):
            turn()
            added = {name: value[sizes[name] :] for name, value in lists.items() if len(value) > sizes[name]}
        others = [value for name, value in held.items() if name not in added] + state.seen()
        if not added or any(value is lists[name] for name in added for value in others):
            return None
        items = [item for name in added for item in (*added[name], *lists[name])]
        return cls(added, turns(), state, at) if all(isinstance(item, torch.Tensor) for item in items) else None

    @contextlib.contextmanager
    def turn(self, place: torch.Tensor) -> Iterator[None]:
        """Write what the block appends into the rows at ``place``, i64[1]."""
        for growing in self._lists.values():
            growing.added, growing.depth = [], session().depth
        yield
        added = [value for growing in self._lists.values() for value in growing.added]
        if len(added) != len(self.buffers):
            raise refusal(f"{_GREW} is appended to on some turns only", self._at, try_=_TRY)
        for number, (buffer, value) in enumerate(zip(self.buffers, added, strict=True)):
            self._check(buffer, value)
            self.buffers[number] = buffer.index_copy(0, place, value.unsqueeze(0))

    def _check(self, buffer: torch.Tensor, value: torch.Tensor) -> None:
        if buffer.dtype == value.dtype and same_sizes(buffer.shape[1:], value.shape):
            return
        raise refusal(
            f"{_GREW} gets tensors that differ from turn to turn",
            self._at,
            got=f"{shape_text(buffer[0])} and {shape_text(value)}",
            try_="tensors of one shape and type",
        )

    def finish(self) -> None:
        """Bind the names of the lists to their items, those from before the loop in front."""
        buffers, found = iter(self.buffers), {}
        for name, growing in self._lists.items():
            own = [next(buffers) for _ in growing.added]
            rows = own[0] if len(own) == 1 else torch.stack(own, 1).flatten(0, 1)
            before = list(self._python[name])
            found[name] = Rows(torch.cat([torch.stack(before), rows]) if before else rows, self._at)
            self._python[name][:] = [found[name]]  # whoever else holds the list is refused, and not given what it was
        self._bind(found)

    def _bind(self, values: dict[str, Any]) -> None:
        held = zip(self._state.names, self._state.take(), strict=True)
        self._state.put([values.get(name, value) for name, value in held])
