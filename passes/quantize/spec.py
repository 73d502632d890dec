"""What is quantized, and how: values of a graph and their integers, as a plan that can be printed, edited and saved."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from fxopt.errors import PassError
from fxopt.name_patterns import names_fitting

__all__ = ["WIDTHS", "QuantPlan", "QuantSpec"]

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
"""Bits that an integer may have. What is not 8 or 16 is stored in 8, with fewer of its levels in use."""

Role = Literal["activation", "weight"]


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one value of a graph becomes integers: ``q = saturate(round(x / scale) + zero_point)``.

    Attributes:
        role: ``"activation"`` is quantized when the graph runs, ``"weight"`` once and for all.
        bits: Width of the integers.
        signed: Whether they are signed.
        symmetric: Whether the zero point is 0 (or the middle, if unsigned), and for signed integers the most negative
            level is left out, so that the levels lie even around 0.
        axis: Axis along which each slice has a scale of its own; None for one scale.
        scale: Tensor units per integer step, exact float32 numbers: one, or one a slice; empty until calibration.
        zero_point: The integer that stands for 0, like ``scale``.
        group: Values with the same name here share scale and zero point; empty if the value shares with none.
    """

    role: Role = "activation"
    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: one has a value that no integer can have.
        """
        if self.bits not in WIDTHS:
            raise ValueError(f"bits is {self.bits!r}; wanted one of {', '.join(map(str, WIDTHS))}")
        if self.role not in ("activation", "weight"):
            raise ValueError(f"role is {self.role!r}; wanted 'activation' or 'weight'")
        if self.axis is None and len(self.scale) > 1:
            raise ValueError(f"{len(self.scale)} scales and no axis that they belong to")
        if len(self.scale) != len(self.zero_point):
            raise ValueError(f"{len(self.scale)} scales and {len(self.zero_point)} zero points")
        if any(not 0 < scale < float("inf") for scale in self.scale):
            raise ValueError(f"scale is {next(s for s in self.scale if not 0 < s < float('inf'))}; wanted above 0")
        low, high = self.limits
        if any(not low <= offset <= high for offset in self.zero_point):
            raise ValueError(f"a zero point of {self.integer} lies outside [{low}, {high}]")

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer in use."""
        if not self.signed:
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)) + self.symmetric, 2 ** (self.bits - 1) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds the integers."""
        if self.bits > 8:
            return torch.int16 if self.signed else torch.uint16
        return torch.int8 if self.signed else torch.uint8

    @property
    def integer(self) -> str:
        """The integers in words, such as ``uint8``."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def resolved(self) -> bool:
        """Whether scale and zero point are known."""
        return bool(self.scale)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number that the integers stand for, over all slices."""
        low, high = self.limits
        pairs = list(zip(self.scale, self.zero_point, strict=True))
        return min((low - z) * s for s, z in pairs), max((high - z) * s for s, z in pairs)

    def __str__(self) -> str:
        words = [self.integer]
        if self.axis is not None:
            words.append(f"per channel of axis {self.axis}")
        if not self.resolved:
            words.append("not calibrated")
        elif len(self.scale) == 1:
            low, high = self.range
            words.append(f"scale {self.scale[0]:.6g} zero {self.zero_point[0]} [{low:.4g}, {high:.4g}]")
        else:
            words.append(f"{len(self.scale)} scales {min(self.scale):.3g} to {max(self.scale):.3g}")
        if self.group:
            words.append(f"shared as {self.group}")
        return ", ".join(words)


class QuantPlan(Mapping[str, QuantSpec]):
    """Which values of a graph are quantized: ``{node: QuantSpec}``, which is never changed but copied.

    A weight goes by the name of the node that reads it, an activation by the name of the node that computes it; in
    the side of a branch with the path of its graph in front, ``"true_graph_0/conv2d"``.

    Attributes:
        notes: What could not be planned, ``{node: reason}``.
    """

    def __init__(self, specs: Mapping[str, QuantSpec], notes: Mapping[str, str] | None = None) -> None:
        self._specs = dict(specs)
        self.notes = dict(notes or {})

    def __getitem__(self, node: str) -> QuantSpec:
        return self._specs[node]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantPlan) and self._specs == other._specs

    def __hash__(self) -> int:
        return hash(tuple(self._specs.items()))

    def matching(self, *patterns: str) -> tuple[str, ...]:
        """Return the nodes whose name fits one of the patterns, ``"features_0*"``.

        Raises:
            PassError: a pattern fits none.
        """
        return names_fitting(self._specs, patterns, of="node of the plan")

    def without(self, *patterns: str) -> QuantPlan:
        """Return the plan that leaves these values floats."""
        gone = set(self.matching(*patterns))
        return QuantPlan({name: spec for name, spec in self._specs.items() if name not in gone}, self.notes)

    def changed(self, *patterns: str, **fields: Any) -> QuantPlan:
        """Return the plan with other fields for these values, ``plan.changed("conv2d_3*", bits=4)``.

        Another width, sign or symmetry makes scale and zero point unknown: calibrate again, or pass them too.
        """
        chosen = set(self.matching(*patterns))
        if set(fields) & {"bits", "signed", "symmetric", "axis"} and "scale" not in fields:
            fields |= {"scale": (), "zero_point": ()}
        specs = {
            name: dataclasses.replace(spec, **fields) if name in chosen else spec for name, spec in self._specs.items()
        }
        return QuantPlan(specs, self.notes)

    def with_specs(self, specs: Mapping[str, QuantSpec]) -> QuantPlan:
        """Return the plan with these entries in place of those of the same name, or behind them."""
        return QuantPlan({**self._specs, **specs}, self.notes)

    def __str__(self) -> str:
        width = max(map(len, self._specs), default=0)
        lines = [f"{name:<{width}}  {spec.role:<10}  {spec}" for name, spec in self._specs.items()]
        lines += [f"not planned: {name}: {reason}" for name, reason in self.notes.items()]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; numbers come back bit for bit."""
        rows = {name: dataclasses.asdict(spec) for name, spec in self._specs.items()}
        Path(path).write_text(json.dumps({"specs": rows, "notes": self.notes}, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PassError: the file is not such a plan.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            specs = {name: QuantSpec(**_tuples(row)) for name, row in held["specs"].items()}
            return cls(specs, held.get("notes", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PassError(f"{os.fspath(path)} holds no quantization plan: {type(error).__name__}: {error}") from error


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in row.items()}
