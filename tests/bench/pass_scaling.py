"""Time per node of each cleanup pass and of the pass manager, from 1,000 to 100,000 nodes.

A step that is linear in the graph's size has the exponent 1: the slope of log(time) over log(nodes). What is timed is
CPU time, so that other work on the machine counts little, on one thread. The graphs are those of
``tests/bench/synthetic_graph.py``.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fxopt.checks import fingerprint, verify
from fxopt.graph_module import CapturedModule
from fxopt.manager import PassManager
from fxopt.passes import DEFAULT
from fxopt.passes.cleanup import PASSES
from fxopt.rewriter import Rewriter
from tests.bench.synthetic_graph import build

SIZES = {1_000: 9, 10_000: 3, 100_000: 1}  # nodes, and how often each step is timed


@dataclasses.dataclass(frozen=True)
class Timed:
    """One thing to time: ``prepare`` makes the argument of ``work``, off the clock."""

    name: str
    prepare: Callable[[CapturedModule], Any]
    work: Callable[[Any], Any]


def steps() -> Iterator[Timed]:
    """Yield what is timed: the passes, each step of the manager, and whole runs of the default list."""
    for kind in PASSES:
        yield Timed(kind.name, lambda gm: Rewriter(gm.clone(), "bench"), kind().run)
    yield Timed("clone", lambda gm: gm, CapturedModule.clone)
    yield Timed("fingerprint", lambda gm: gm, fingerprint)
    yield Timed("verify", lambda gm: gm, verify)
    yield Timed("start of a rewriter", lambda gm: gm.clone(), lambda gm: Rewriter(gm, "bench"))
    yield Timed("finish, with new code", _changed, Rewriter.finish)
    yield Timed("one run of the graph", lambda gm: gm, lambda gm: gm(*gm.samples[0].args))
    for check in ("off", "all"):
        manager = PassManager(DEFAULT, strict=True, check=check)
        yield Timed(f'default list, check="{check}"', lambda gm: gm, manager.run)


def _changed(gm: CapturedModule) -> Rewriter:
    rw = Rewriter(gm.clone(), "bench")
    for kind in PASSES:
        kind().run(rw)
    return rw


def seconds(timed: Timed, gm: CapturedModule) -> float:
    """Return the CPU time of one execution."""
    argument = timed.prepare(gm)
    gc.collect()
    started = time.process_time()
    result = timed.work(argument)
    spent = time.process_time() - started
    del result  # only now: taking apart what the step made is no part of it
    return spent


def exponent(nodes: list[int], spent: list[float]) -> float:
    """Return the slope of log(time) over log(nodes), by least squares."""
    return statistics.linear_regression([math.log(n) for n in nodes], [math.log(s) for s in spent]).slope


def measure(sizes: dict[int, int], say: Callable[[str], None]) -> tuple[list[int], dict[str, list[float]]]:
    """Return the actual numbers of nodes, and the seconds that each step takes at each."""
    spent: dict[str, list[float]] = {timed.name: [] for timed in steps()}
    nodes: list[int] = []
    warm = build(300)
    for timed in steps():
        seconds(timed, warm)
    for size, repeats in sizes.items():
        gm = build(size)
        nodes.append(len(gm.graph.nodes))
        for timed in steps():
            say(f"{size:,} nodes: {timed.name}")
            spent[timed.name].append(statistics.median(seconds(timed, gm) for _ in range(repeats)))
    return nodes, spent


def main(console: Console, *, quick: bool = False) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    sizes = {size: repeats for size, repeats in SIZES.items() if not quick or size < max(SIZES)}
    with console.status("") as status:
        nodes, spent = measure(sizes, status.update)
    table = Table("step", box=box.MARKDOWN, title="CPU microseconds per node, by number of nodes")
    for count in nodes:
        table.add_column(f"{count:,}", justify="right")
    table.add_column("exponent", justify="right")
    for name, row in spent.items():
        per_node = [f"{1e6 * s / count:.1f}" for count, s in zip(nodes, row, strict=True)]
        table.add_row(name, *per_node, f"{exponent(nodes, row):.2f}")
    console.print(table)
