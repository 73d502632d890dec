"""How the command line speaks: results on stdout, errors and progress on stderr, one JSON document if asked for."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = [
    "BadInputError",
    "Counted",
    "Stages",
    "as_bad_input",
    "describe_bytes",
    "error_text",
    "print_json",
    "stages",
    "stderr",
    "stdout",
    "users_code",
]


class BadInputError(Exception):
    """What the user asked for cannot be done as written: exit status 2."""


@contextlib.contextmanager
def as_bad_input(label: str = "") -> Iterator[None]:
    """Turn the errors that wrong input raises into :class:`BadInputError`, with ``label`` in front of the message."""
    from fxopt.errors import FxoptError

    try:
        yield
    except (FxoptError, ValueError, TypeError, OSError) as error:
        raise BadInputError(f"{label}: {error}" if label else str(error)) from error


@contextlib.contextmanager
def users_code(*, debug: bool) -> Iterator[None]:
    """Run what may be the user's code: what it prints goes to stderr, and it cannot end the program.

    Raises:
        BadInputError: it calls ``sys.exit``, which would look like success.
    """
    logging.getLogger("fxopt").addHandler(logging.NullHandler())  # the report tells what the log would
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    except SystemExit as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}, in {frame.name}: {frame.line}"
        raise BadInputError(f"the model ends the program: SystemExit: {error}\n  source  {where}") from error


def stdout() -> Console:
    """Return the console for results. Made for each use, so that it follows a redirected ``sys.stdout``."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def stderr() -> Console:
    """Return the console for errors and progress."""
    return Console(file=sys.stderr, highlight=False)


def error_text(message: str) -> Text:
    """Return an error as it is shown: ``error:`` before the headline, which stands out; the rows below as they are."""
    headline, _, rows = message.partition("\n")
    shown = Text.assemble(("error: ", "bold red"), (headline, "bold"))
    if rows:
        shown.append("\n" + rows)
    return shown


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout. Infinities and NaN, which JSON does not have, become text."""
    print(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def describe_bytes(count: int) -> str:
    """Return a size for people: ``1.2 MB`` (1 MB = 1,000,000 bytes)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{1 if count < 100 * size else 0}f} {unit}"
    return f"{count} B"


class Stages:
    """The progress of one command: a known number of stages, of which one runs."""

    def __init__(
        self,
        begin: Callable[[str], None],
        extend: Callable[[int], None],
        count: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.begin = begin
        self.extend = extend
        self.count = count

    def __call__(self, index: int, count: int, name: str) -> None:
        """Take the progress of a list of passes: called before each with its index, their number, and its name."""
        self.begin(name)


@contextlib.contextmanager
def stages(total: int, *, quiet: bool) -> Iterator[Stages]:
    """Show a progress bar over ``total`` stages on stderr; nothing if ``quiet`` or where stderr is no terminal."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield Stages(lambda name: None, lambda more: None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        started: list[str] = []

        def begin(name: str) -> None:
            progress.update(task, description=name, completed=len(started))
            started.append(name)

        def extend(more: int) -> None:
            progress.update(task, total=total + more)

        def count(done: int, of: int) -> None:
            progress.update(task, description=f"{started[-1] if started else ''} ({done}/{of} inputs)")

        yield Stages(begin, extend, count)


class Counted(Sequence[Any]):
    """Items that tell how far a pass has come with them."""

    def __init__(self, items: Sequence[Any], count: Callable[[int, int], None]) -> None:
        self._items, self._count = items, count

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: Any) -> Any:
        return self._items[place]

    def __iter__(self) -> Iterator[Any]:
        for done, item in enumerate(self._items):
            self._count(done, len(self._items))
            yield item
