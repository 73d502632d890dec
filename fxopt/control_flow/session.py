"""What one trace knows while it runs: how deep in branches it is, which sites it met, which modules it may touch."""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import types
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import torch

from fxopt.errors import CaptureError, describe

__all__ = [
    "CaptureWarning",
    "Raised",
    "Session",
    "Site",
    "Where",
    "in_branch",
    "is_running",
    "place",
    "refusal",
    "running",
    "session",
]

Where = tuple[str, int, str]


class CaptureWarning(UserWarning):
    """Something that the model does has no place in a graph, and is left out of it."""


class Raised(BaseException):  # not an Exception: a model's own `except Exception` must not catch it
    """One side of a traced branch raises ``error`` when it runs."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error

    def text(self, at: Where) -> str:
        """Return the message of the assertion that stands for the error in the graph."""
        return f"{type(self.error).__name__}: {self.error} ({place(at)})"


@dataclasses.dataclass(frozen=True)
class Site:
    """One branch or loop of the model's code.

    Attributes:
        where: File, line and function.
        is_shortcut: Whether it is an ``and`` or ``or``.
    """

    where: Where
    is_shortcut: bool = False


class Session:
    """The state of one trace.

    Attributes:
        modules: The model and all modules in it.
        unrolled: Code that goes through the rows of tensors where no loop can stand, so that torch fixes their number.
        size_one_branches: Whether what the model does apart for size 1 is a branch, where else it is left out.
        sites: Each branch and loop by the number of its region.
        depth: How many traced branches and loops the code that runs now is inside of.
        in_trial: Whether what is traced now is thrown away.
    """

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        unrolled: Set[types.CodeType] = frozenset(),
        *,
        size_one_branches: bool = False,
    ) -> None:
        self.modules = modules
        self.unrolled = unrolled
        self.size_one_branches = size_one_branches
        self.sites: dict[int, Site] = {}
        self.depth = 0
        self.in_trial = False

    def new_region(self, at: Where, *, is_shortcut: bool = False) -> int:
        """Return a number for another branch or loop."""
        self.sites[len(self.sites)] = Site(at, is_shortcut)
        return len(self.sites) - 1

    @contextlib.contextmanager
    def inside(self, *, trial: bool = False) -> Iterator[None]:
        """Count what runs in the block as part of a traced branch or loop."""
        was = self.in_trial
        self.depth, self.in_trial = self.depth + 1, was or trial
        try:
            yield
        finally:
            self.depth, self.in_trial = self.depth - 1, was


_CURRENT: list[Session] = []


def session() -> Session:
    """Return the trace that is running.

    Raises:
        RuntimeError: none is; a rewritten function is called outside a capture.
    """
    if not _CURRENT:
        raise RuntimeError("a function rewritten for capture is called outside a capture")
    return _CURRENT[-1]


def is_running() -> bool:
    """Return whether a trace that can hold branches and loops is running."""
    return bool(_CURRENT)


def in_branch() -> bool:
    """Return whether a tensor decides whether what runs now is run at all."""
    return bool(_CURRENT) and _CURRENT[-1].depth > 0


@contextlib.contextmanager
def running(current: Session) -> Iterator[Session]:
    """Make ``current`` what :func:`session` returns."""
    _CURRENT.append(current)
    try:
        yield current
    finally:
        _CURRENT.pop()


def place(at: Where) -> str:
    """Return where something is, as ``net.py:23, in forward``."""
    return f"{Path(at[0]).name}:{at[1]}, in {at[2]}"


def refusal(headline: str, at: Where, **rows: str | None) -> CaptureError:
    """Return the error that says what cannot be captured, where, and what to try."""
    line = linecache.getline(at[0], at[1]).strip()
    return CaptureError(describe(headline, source=place(at) + (f": {line}" if line else ""), **rows))
