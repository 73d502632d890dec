"""What the comparison of eager PyTorch with ORT found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fxopt.numerics import Errors
from fxopt.report import finite_values, text_table

__all__ = ["OutputResult", "ValidationReport"]


@dataclasses.dataclass(frozen=True)
class OutputResult:
    """One output in one run.

    Attributes:
        output: Name of the output.
        case: Inputs of the run.
        optimization: How far ORT could rewrite the graph.
        errors: How far ORT's values are from PyTorch's.
    """

    output: str
    case: str
    optimization: str
    errors: Errors


@dataclasses.dataclass
class ValidationReport:
    """All runs of one model. It exists only for a model that kept its contract; others raise NumericsError.

    Attributes:
        contract: What was demanded.
        results: One entry for each output, case and level of optimization.
        notes: Cases that could not be compared, and why.
    """

    contract: str
    results: list[OutputResult] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def max_abs(self) -> float:
        """Largest absolute error of all outputs."""
        return max((result.errors.max_abs for result in self.results), default=0.0)

    @property
    def runs(self) -> int:
        """Number of cases compared, on every level of optimization."""
        return len({(result.case, result.optimization) for result in self.results})

    def worst(self) -> list[tuple[str, str, dict[str, float]]]:
        """Return (output, level of optimization, worst value of each metric over all cases)."""
        groups: dict[tuple[str, str], list[Errors]] = {}
        for result in self.results:
            groups.setdefault((result.output, result.optimization), []).append(result.errors)
        return [(output, level, _worst(errors)) for (output, level), errors in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON; infinities become text."""
        rows = [
            {"output": r.output, "case": r.case, "optimization": r.optimization} | dataclasses.asdict(r.errors)
            for r in self.results
        ]
        plain = {"contract": self.contract, "max_abs": self.max_abs, "results": rows, "notes": list(self.notes)}
        return finite_values(plain)  # type: ignore[no-any-return]  # a dict in, a dict out

    def __str__(self) -> str:
        header = ("output", "ORT optimizer", "max abs", "max rel", "SQNR dB", "cosine", "top-1")
        lines = [f"contract {self.contract}, {self.runs} runs, worst of all:"]
        lines += [f"  {line}" for line in text_table([header, *(_row(*entry) for entry in self.worst())])]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _worst(errors: Iterable[Errors]) -> dict[str, float]:
    held = list(errors)
    return {
        "max_abs": max(e.max_abs for e in held),
        "max_rel": max(e.max_rel for e in held),
        "sqnr_db": min(e.sqnr_db for e in held),
        "cosine": min(e.cosine for e in held),
        "top1_agreement": min(e.top1_agreement for e in held),
    }


def _row(output: str, level: str, worst: dict[str, float]) -> tuple[str, ...]:
    return (
        output,
        level,
        f"{worst['max_abs']:.2e}",
        f"{worst['max_rel']:.2e}",
        f"{worst['sqnr_db']:.1f}",
        f"{worst['cosine']:.6f}",
        f"{worst['top1_agreement']:.4f}",
    )
