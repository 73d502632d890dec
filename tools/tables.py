"""What the commands print as tables: in colours and fitted to a terminal, as plain lines into a file or a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxopt.report import Report, Step
from fxopt.tools.console import stdout

__all__ = ["print_passes", "print_report"]

_COLOURS = {
    "changed": "green",
    "unchanged": "dim",
    "partly rolled back": "yellow",
    "rolled back": "red",
    "failed": "red",
}


def print_report(report: Report) -> None:
    """Print what the passes did, a line each; on a terminal, columns are left out rather than broken."""
    console = stdout()
    if not console.is_terminal or not report.steps:
        print(report)
        return
    columns = ["pass", "status", "changes", "skips", "nodes", "bytes", "ms", "check ms", "contract", "worst error"]
    rows = [_row(step) for step in report.steps]
    for dropped in ("check ms", "ms", "bytes", "contract", "skips", "nodes"):
        widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
        if sum(widths) + 2 * len(columns) <= console.width:
            break
        columns.remove(dropped)
    _print(console, columns, [[Text(row[column], _style(column, row)) for column in columns] for row in rows])
    console.print(f"passes {report.seconds * 1e3:.0f} ms, checks {report.check_seconds * 1e3:.0f} ms", style="dim")
    for step in report.steps:
        for undone in step.rolled_back:
            where = f"at {', '.join(undone.sites)}" if undone.sites else "as a whole"
            console.print(Text(f"{step.name}: undone {where}", "bold"))
            console.print(Text("  " + undone.why.replace("\n", "\n  ")), soft_wrap=True)
    for note in report.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _row(step: Step) -> dict[str, str]:
    worst = max((error.max_abs for error in step.errors), default=None)
    return {
        "pass": step.name,
        "status": step.status,
        "changes": str(len(step.changes)),
        "skips": str(len(step.skips)),
        "nodes": _arrow(step.nodes),
        "bytes": _arrow(step.parameter_bytes),
        "ms": f"{step.seconds * 1e3:.1f}",
        "check ms": f"{step.check_seconds * 1e3:.1f}",
        "contract": step.contract,
        "worst error": "-" if worst is None else f"{worst:.2g}",
    }


def _arrow(sizes: tuple[int, int]) -> str:
    before, after = sizes
    return f"{before:,}" if before == after else f"{before:,} > {after:,}"


def _style(column: str, row: dict[str, str]) -> str:
    if column == "status":
        return _COLOURS[row["status"]]
    return "bold" if column == "pass" and row["status"] != "unchanged" else ""


def print_passes(rows: Sequence[dict[str, Any]]) -> None:
    """Print the passes: name, contract, what each does, its options; a star marks those run where none are named."""
    console = stdout()
    if not console.is_terminal:
        console.width = 250  # a pipe has no width, and what reads it expects one line for each pass
    cells = []
    for row in rows:
        name = Text.assemble("* " if row["default"] else "  ", (row["name"], "bold"))
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        does = Text.assemble(row["summary"], (f" Options: {options}." if options else "", "cyan"))
        cells.append([name, Text(row["contract"]), does])
    _print(console, ["  pass", "contract", "what it does"], cells, wrap=("what it does",))
    print("* run where no passes are named")


def _print(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Text]], wrap: Sequence[str] = ()) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold underline")
    for column in columns:
        table.add_column(column, no_wrap=column not in wrap)
    for row in rows:
        table.add_row(*row)
    with console.capture() as shown:
        console.print(table)
    for line in shown.get().splitlines():
        print(line.rstrip())
