"""What every step of a pipeline cost and brought: as a table, as JSON, and as a page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxopt.changes import Change, Skip
from fxopt.errors import describe
from fxopt.export.files import check_target
from fxopt.report import RolledBack, finite_values, text_table

__all__ = ["COLUMNS", "FORMATS", "Ledger", "LedgerEntry", "StageNumbers"]

FORMATS = (".html", ".json")
COLUMNS = (
    "step", "status", "pass s", "check s", "nodes", "parameter bytes", "file bytes", "max error", "SQNR dB", "score",
    "median ms", "speed", "integer MACs",
)  # fmt: skip
"""Titles of the table; :meth:`LedgerEntry.row` has the cells."""


@dataclasses.dataclass(frozen=True)
class StageNumbers:
    """What was measured of one graph; None for what was not asked for, or what ``missing`` has a reason for.

    Attributes:
        nodes: Nodes of the graph.
        parameter_bytes: Bytes of all distinct parameters and buffers.
        file_bytes: Bytes of the ONNX file, weights included.
        max_abs: Largest difference of any output from the first graph, both in PyTorch, in the output's own unit.
        sqnr_db: Signal to quantization noise of that output, in dB; inf if it is the same.
        score: The metric of the file, run in ORT.
        median_ms: Median latency in ORT, in milliseconds.
        speed: How many times as fast as the first graph: median over pairs of runs in turn.
        integer_share: Share of the multiply-accumulates that ORT runs in integer kernels, 0 to 1.
        missing: Why a number is missing, by what is missing.
    """

    nodes: int
    parameter_bytes: int
    file_bytes: int | None = None
    max_abs: float | None = None
    sqnr_db: float | None = None
    score: float | None = None
    median_ms: float | None = None
    speed: float | None = None
    integer_share: float | None = None
    missing: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """The captured graph, or one step.

    Attributes:
        step: ``"captured"``, or the pass with its options.
        status: ``"captured"``, or what became of the pass, as in :class:`fxopt.report.Step`.
        numbers: What was measured of the graph after it; the same object for a step that changed nothing.
        seconds: Time in the pass itself.
        check_seconds: Time spent checking it.
        changes, skips, rolled_back, notes: The record of the step.
    """

    step: str
    status: str
    numbers: StageNumbers
    seconds: float = 0.0
    check_seconds: float = 0.0
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    rolled_back: tuple[RolledBack, ...] = ()
    notes: tuple[str, ...] = ()

    def row(self) -> tuple[str, ...]:
        """Return the cells of a table; ``-`` for what was not measured."""
        n = self.numbers
        record: tuple[str, ...] = (self.status, f"{self.seconds:.3f}", f"{self.check_seconds:.3f}")
        if self.status == "captured":  # by no pass
            record = ("-",) * len(record)
        return (
            self.step, *record, f"{n.nodes:,}", f"{n.parameter_bytes:,}", _cell(n.file_bytes, "{:,}"),
            _cell(n.max_abs, "{:.2g}"), decibels(n.sqnr_db), _cell(n.score, "{:.4g}"), _cell(n.median_ms, "{:.3f}"),
            _cell(n.speed, "{:.2f}x"), _cell(n.integer_share, "{:.1%}"),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain values, its numbers among them."""
        plain = dataclasses.asdict(self)
        numbers: dict[str, Any] = plain.pop("numbers")
        return {"step": plain.pop("step"), "status": plain.pop("status")} | numbers | plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> LedgerEntry:
        """Return the entry that :meth:`to_dict` made these values of; infinities may be texts."""
        names = {field.name for field in dataclasses.fields(StageNumbers)}
        numbers: dict[str, Any] = {
            key: float(item) if isinstance(item, str) else item for key, item in plain.items() if key in names
        }
        lists: dict[str, Any] = {
            "changes": tuple(Change(**item) for item in plain["changes"]),
            "skips": tuple(Skip(**item) for item in plain["skips"]),
            "rolled_back": tuple(RolledBack(tuple(item["sites"]), item["why"]) for item in plain["rolled_back"]),
            "notes": tuple(plain["notes"]),
        }
        own = {key: item for key, item in plain.items() if key not in names}
        return cls(**(own | lists | {"numbers": StageNumbers(**numbers)}))


@dataclasses.dataclass(frozen=True)
class Ledger:
    """One entry for the captured graph and one for each step, in order.

    Attributes:
        entries: Never empty.
        measured_on: The inputs of latency and coverage, as ``"image: f32[8, 3, 32, 32]"``.
        runs: Runs of each file, in turn; 0 if latency was not asked for.
        threads: Threads within one operator; None for ORT's own choice.
        notes: What else a reader should know.
    """

    entries: tuple[LedgerEntry, ...]
    measured_on: tuple[str, ...]
    runs: int
    threads: int | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the ledger as plain values, fit for JSON; infinities become text."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return finite_values(plain | {"entries": [entry.to_dict() for entry in self.entries]})  # type: ignore[no-any-return]  # a dict in, a dict out

    def to_json(self) -> str:
        """Return the ledger as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Ledger:
        """Return the ledger that :meth:`to_dict` made these values of."""
        lists = {key: tuple(plain[key]) for key in ("measured_on", "notes")}
        entries = tuple(LedgerEntry.from_dict(entry) for entry in plain["entries"])
        return cls(**(plain | lists | {"entries": entries}))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ledger and return the path: one page that needs no network, or JSON.

        Raises:
            ValueError: the name ends neither in .html nor in .json.
            ExportError: the file cannot be written.
        """
        from fxopt.export.ledger_page import ledger_page

        target = check_ledger_path(path)
        target.write_text(ledger_page(self) if target.suffix == ".html" else self.to_json(), encoding="utf-8")
        return target

    def missing(self) -> list[tuple[int, str, str, str]]:
        """Return what could not be measured: number and step of the entry, what, and why; once for each graph."""
        found, seen = [], set()
        for number, entry in enumerate(self.entries):
            if id(entry.numbers) not in seen:
                found += [(number, entry.step, what, why) for what, why in entry.numbers.missing.items()]
            seen.add(id(entry.numbers))
        return found

    def how(self) -> str:
        """Return in words how the numbers came about."""
        timed = f"{self.runs} runs in turn, threads: {self.threads or 'as ORT chooses'}; " if self.runs else ""
        return f"{timed}measured on {', '.join(self.measured_on)}; errors are against the captured graph"

    def __str__(self) -> str:
        shown = shown_columns(self.entries)
        rows = [COLUMNS, *(entry.row() for entry in self.entries)]
        lines = [self.how(), *text_table([tuple(row[column] for column in shown) for row in rows])]
        for _, step, what, why in self.missing():
            lines.append(f"  {step}: no {what}: " + why.replace("\n", "\n    "))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def check_ledger_path(path: str | os.PathLike[str]) -> Path:
    """Return the path that a ledger can be written to.

    Raises:
        ValueError: the name ends neither in .html nor in .json.
        ExportError: the file cannot be written.
    """
    target = check_target(path)
    if target.suffix not in FORMATS:
        raise ValueError(
            describe(f"cannot tell the format of {target}", wanted=f"a name that ends in {' or '.join(FORMATS)}")
        )
    return target


def shown_columns(entries: Sequence[LedgerEntry]) -> list[int]:
    """Return the columns that hold a number for some entry."""
    rows = [entry.row() for entry in entries]
    return [column for column in range(len(COLUMNS)) if any(row[column] != "-" for row in rows)]


def decibels(value: float | None) -> str:
    """Return a signal to noise ratio for people: ``exact`` where there is no noise."""
    return "exact" if value == math.inf else _cell(value, "{:.1f}")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


__all__ += ["check_ledger_path", "decibels", "shown_columns"]
