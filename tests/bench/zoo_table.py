"""Every model of the zoo from capture to proof: time of each step, nodes, and ORT's error against eager.

Models and inputs are as small as ``tests/zoo/architectures.py`` has them. The error is the worst over the example,
other values, and every free size at 1, 2 and 5, with ORT's optimizer off and on. PyTorch has one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console

import fxopt
from tests.zoo import journeys, real
from tests.zoo.architectures import Built

SLOWEST = ("maxvit_t", "swin_v2_t", "efficientnet_v2_s", "crepe_full")  # more than half a minute each
HEADER = ("model", "capture s", "optimize s", "export s", "nodes", "ONNX nodes", "max error", "SQNR dB", "ROUNDING")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    build: Callable[[], Built]


def entries() -> list[Entry]:
    """Return the models with random weights, then those with trained ones, which run on real inputs."""
    random = [Entry(name, lambda name=name: journeys.build(name)) for name in journeys.NAMES]  # type: ignore[misc]
    trained = [Entry(name, lambda model=model: _real(model)) for name, model in real.REAL.items()]  # type: ignore[misc]
    return random + trained


def _real(model: real.RealModel) -> Built:
    return Built(model.load(), model.inputs(2), {}, model.dynamic_shapes)


def row(entry: Entry) -> tuple[str, ...]:
    """Send one model all the way, and return its row; a model that fails has the error in the last column."""
    torch.manual_seed(0)
    started = time.perf_counter()
    try:
        journey = journeys.travel(entry.build())
    except Exception as error:
        if not isinstance(error, fxopt.FxoptError):
            traceback.print_exc()
        seconds = time.perf_counter() - started
        return (entry.name, *("-",) * 7, f"FAILS after {seconds:.0f} s: {type(error).__name__}: {_first_line(error)}")
    report, (before, after, exported) = journey.validation, journey.nodes
    worst = min(metrics["sqnr_db"] for _, _, metrics in report.worst())
    notes = f", {len(report.notes)} size refused by the model" if report.notes else ""
    return (
        entry.name,
        *(f"{journey.seconds[step]:.1f}" for step in ("capture", "optimize")),
        f"{journey.seconds['export']:.2f}",
        f"{before:,} > {after:,}",
        f"{exported:,}",
        f"{report.max_abs:.1e}",
        f"{worst:.0f}",
        f"kept in {report.runs} runs{notes}",
    )


def _first_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2])[:200].replace("|", "/")


def main(console: Console | None = None, *, quick: bool = False, names: Sequence[str] = ()) -> None:
    """Print the table row by row, as Markdown.

    Args:
        console: Where to print.
        quick: Leave out the models that take more than half a minute.
        names: The models; all if none is given.
    """
    console = console or Console()
    known = {entry.name: entry for entry in entries()}
    chosen = [known[name] for name in names or known if not (quick and name in SLOWEST)]
    write_row(console, HEADER)
    write_row(console, ("---", *("---:",) * (len(HEADER) - 2), "---"))
    with one_thread():
        for entry in chosen:
            write_row(console, row(entry))
            gc.collect()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Give PyTorch one thread: on a busy machine several wait for each other, and times say little."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_row(console: Console, cells: Sequence[str]) -> None:
    """Print one row of a Markdown table, on one line however wide the terminal is."""
    console.print(f"| {' | '.join(cells)} |", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    import sys

    main(names=sys.argv[1:])
