"""What the passes did: one entry for each step, as text, as a dictionary, and for the graph page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fxopt.changes import Change, Skip

if TYPE_CHECKING:
    from fxopt.graph_module import CapturedModule

__all__ = ["OutputError", "Report", "RolledBack", "Step"]

Status = Literal["changed", "unchanged", "partly rolled back", "rolled back", "failed"]


@dataclasses.dataclass(frozen=True)
class RolledBack:
    """Changes that were undone, and why.

    Attributes:
        sites: The nodes at which the pass was wrong; empty if the whole pass was undone.
        why: What was wrong, in full.
    """

    sites: tuple[str, ...]
    why: str


@dataclasses.dataclass(frozen=True)
class OutputError:
    """Error of one output after a step against the graph that went into the pipeline; worst over all samples."""

    output: str
    max_abs: float
    sqnr_db: float


@dataclasses.dataclass
class Step:
    """One pass of a pipeline.

    Attributes:
        name: The pass with its options.
        contract: What it promises.
        status: What became of it.
        changes, skips: Its record, after rollback.
        notes: What else the pass reported, after rollback; if all of it was undone, each note says so.
        rolled_back: What was undone.
        seconds: Time in the pass itself.
        check_seconds: Time spent checking it.
        nodes: Number of nodes before and after.
        parameter_bytes: Bytes of all distinct parameters and buffers before and after.
        errors: Error of each output against the first graph; empty if the step changed nothing or was not checked.
        checked: Number of runs on real inputs that the step was judged by.
        graph_text: Text of the graph after the step, if asked for.
    """

    name: str
    contract: str
    status: Status = "unchanged"
    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    rolled_back: tuple[RolledBack, ...] = ()
    seconds: float = 0.0
    check_seconds: float = 0.0
    nodes: tuple[int, int] = (0, 0)
    parameter_bytes: tuple[int, int] = (0, 0)
    errors: tuple[OutputError, ...] = ()
    checked: int = 0
    graph_text: str | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class Report:
    """The record of a pipeline.

    Attributes:
        steps: One entry for each pass, in order.
        contract: What all passes together promise.
        notes: What else a reader should know, such as sizes that the model itself refuses.
        graphs: The graph before the first step and after each, if asked for; weights that are the same are shared.
            Not saved with the report.
    """

    steps: list[Step] = dataclasses.field(default_factory=list)
    contract: str = "EXACT"
    notes: list[str] = dataclasses.field(default_factory=list)
    graphs: list[CapturedModule] = dataclasses.field(default_factory=list, compare=False, repr=False)

    @property
    def seconds(self) -> float:
        """Time in the passes themselves."""
        return sum(step.seconds for step in self.steps)

    @property
    def check_seconds(self) -> float:
        """Time spent checking."""
        return sum(step.check_seconds for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON; infinities become text."""
        plain = dataclasses.asdict(dataclasses.replace(self, graphs=[]))
        del plain["graphs"]
        return finite_values(plain)  # type: ignore[no-any-return]  # a dict in, a dict out

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Report:
        """Return the report that :meth:`to_dict` wrote."""
        return cls([_step(entry) for entry in plain["steps"]], plain["contract"], list(plain["notes"]))

    def __str__(self) -> str:
        if not self.steps:
            return "no pass was run"
        header = ("pass", "status", "changes", "skips", "nodes", "bytes", "ms", "check ms", "contract", "worst error")
        lines = text_table([header, *(_row(step) for step in self.steps)])
        for step in self.steps:
            lines += [
                f"  {step.name}: undone {_sites(undone)}\n    " + undone.why.replace("\n", "\n    ")
                for undone in step.rolled_back
            ]
            lines += [f"  {step.name}: {note}" for note in step.notes]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def details(self) -> str:
        """Return every change and every refusal with its reason and source line."""
        lines = []
        for step in self.steps:
            lines.append(f"{step.name}: {step.status}")
            lines += [
                f"  {c.kind:<9} {c.node}: {c.why}" + (f"   [{c.source}]" if c.source else "") for c in step.changes
            ]
            lines += [f"  {'left':<9} {s.node}: {s.why}" + (f"   [{s.source}]" if s.source else "") for s in step.skips]
        return "\n".join(lines)


def _step(entry: dict[str, Any]) -> Step:
    pairs = {key: tuple(entry[key]) for key in ("nodes", "parameter_bytes")}
    undone = tuple(RolledBack(tuple(item["sites"]), item["why"]) for item in entry["rolled_back"])
    errors = tuple(
        OutputError(item["output"], float(item["max_abs"]), float(item["sqnr_db"])) for item in entry["errors"]
    )
    changes = tuple(Change(**item) for item in entry["changes"])
    skips = tuple(Skip(**item) for item in entry["skips"])
    lists = {"rolled_back": undone, "errors": errors, "changes": changes, "skips": skips}
    return Step(**(entry | pairs | lists | {"notes": tuple(entry.get("notes", ()))}))


def _row(step: Step) -> tuple[str, ...]:
    worst = max(step.errors, key=lambda error: error.max_abs, default=None)
    error = "-" if worst is None else "0" if worst.max_abs == 0 else f"{worst.max_abs:.2g} ({worst.sqnr_db:.0f} dB)"
    return (
        step.name, step.status, str(len(step.changes)), str(len(step.skips)), _arrow(*step.nodes),
        _arrow(*step.parameter_bytes), f"{step.seconds * 1e3:.1f}", f"{step.check_seconds * 1e3:.1f}", step.contract,
        error,
    )  # fmt: skip


def _arrow(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} > {after:,}"


def _sites(undone: RolledBack) -> str:
    return "at " + ", ".join(undone.sites) if undone.sites else "as a whole"


def text_table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows of equal length as lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def finite_values(value: Any) -> Any:
    """Return plain values as JSON can hold them: infinities and NaN become text, tuples lists."""
    if isinstance(value, dict):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


__all__ += ["finite_values", "text_table"]
