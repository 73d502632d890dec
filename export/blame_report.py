"""What :func:`fxopt.export.blame` found, value by value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fxopt.numerics import Errors
from fxopt.report import finite_values

__all__ = ["BlameReport", "NodeError"]

_SHOWN = 12  # lines of a printed report
_OVERFLOW = "can overflow there on CPUs without VNNI; try weights of 7 bits"


@dataclasses.dataclass(frozen=True)
class NodeError:
    """One value of the model against the right one.

    Attributes:
        node: Name of the node that yields it in the graph, or in the file that was compared with.
        target: Its operator.
        module: Path of the module that called it.
        source: The user's line.
        pass_name: The pass that made the node; empty if capture did.
        operators: The ONNX operators, or the kernel, that compute it from the values before it.
        local: Error where the model starts from right values; None where the shapes differ.
        total: Error where it starts from its own values; None where the shapes differ.
        problem: Why the local error is more than rounding; None if it is not.
        value: Name of the value in the model.
        overflowing: Of how many channels of these operators 16-bit sums can overflow on CPUs without VNNI.
    """

    node: str
    target: str
    module: str
    source: str
    pass_name: str
    operators: tuple[str, ...]
    local: Errors | None
    total: Errors | None
    problem: str | None
    value: str = ""
    overflowing: int = 0

    @property
    def inherited_share(self) -> float:
        """Share of the noise power of the total error that was there before this node, 0 to 1."""
        if self.local is None or self.total is None or math.isinf(self.total.sqnr_db):
            return 0.0
        if math.isinf(self.local.sqnr_db):
            return 1.0 if self.local.sqnr_db > 0 else 0.0
        return max(0.0, 1 - 10 ** ((self.total.sqnr_db - self.local.sqnr_db) / 10))

    def __str__(self) -> str:
        made = f", made by {self.pass_name}" if self.pass_name else ""
        return f"{self.node} ({self.target}{made}) at {self.source or 'an unknown line'}"


@dataclasses.dataclass(frozen=True)
class BlameReport:
    """All values that the model shares with what it was compared with, in the order in which they are computed.

    Attributes:
        values: One entry for each.
        optimization: The level of ORT's optimizer that was looked at.
        contract: What each value had to keep; empty if it was not judged, as the model is quantized and what it was
            compared with is not.
    """

    values: tuple[NodeError, ...]
    optimization: str
    contract: str = "ROUNDING"

    @property
    def guilty(self) -> tuple[NodeError, ...]:
        """The values that are wrong although what they are computed from is right, in order."""
        return tuple(value for value in self.values if value.problem is not None)

    @property
    def first(self) -> NodeError | None:
        """Where the model first leaves the path, or None."""
        return next(iter(self.guilty), None)

    def of(self, node: str) -> NodeError:
        """Return the entry of a node.

        Raises:
            KeyError: the model has no value of its own for it.
        """
        for value in self.values:
            if value.node == node:
                return value
        raise KeyError(f"no value of the model is that of {node!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, fit for JSON; infinities become text."""
        rows = [dataclasses.asdict(value) | {"inherited_share": value.inherited_share} for value in self.values]
        return {"optimization": self.optimization, "contract": self.contract, "values": finite_values(rows)}

    def __str__(self) -> str:
        lines = [f"{len(self.values)} values compared, ORT optimizer {self.optimization!r}"]
        if self.guilty:
            verb = "node computes" if len(self.guilty) == 1 else "nodes compute"
            wanted = "they should" if len(self.guilty) > 1 else "it should"
            lines.append(f"{len(self.guilty)} {verb} something else than {wanted}, on inputs that are right:")
            for value in self.guilty[:_SHOWN]:
                lines += [f"  {value}", f"    {value.problem}; computed by {', '.join(value.operators)}"]
                if value.overflowing:
                    channels = "1 channel" if value.overflowing == 1 else f"{value.overflowing:,} channels"
                    lines.append(f"    16-bit sums of {channels} {_OVERFLOW}")
            if len(self.guilty) > _SHOWN:
                lines.append(f"  and {len(self.guilty) - _SHOWN} more")
            return "\n".join(lines)
        judged = (
            "every node computes what it should"
            if self.contract
            else "nothing is judged without a contract: the model is quantized, what it is compared with is not"
        )
        lines.append(f"{judged}; the most of the noise comes from")
        ranked = sorted(self.values, key=lambda value: math.inf if value.local is None else value.local.sqnr_db)
        for value in ranked[: _SHOWN // 2]:
            if value.local is not None and value.total is not None and math.isfinite(value.local.sqnr_db):
                lines.append(f"  local {value.local.sqnr_db:.0f} dB, total {value.total.sqnr_db:.0f} dB: {value}")
        return "\n".join(lines)
