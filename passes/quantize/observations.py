"""What one run of a float graph tells the passes that transform it, so that not each of them runs it again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from fxopt.pass_base import Pass
from fxopt.passes.quantize.sketch import ValueSketch

__all__ = ["DrawnRows", "Observations", "ObservingPass", "evenly_spread"]

_EACH, _MOST = 64, 2048  # rows of each row of an input, and of a value altogether


@dataclasses.dataclass(frozen=True)
class Observations:
    """What is known of values of a graph, by name.

    Attributes:
        sketches: Their ranges, some with extremes by channel.
        rows: Some of their rows along the last axis, f32[rows, channels].
    """

    sketches: Mapping[str, ValueSketch] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def by_channel(self, names: Iterable[str]) -> dict[str, ValueSketch]:
        """Return the sketches of these values that tell extremes along the last axis."""
        found = {name: self.sketches[name] for name in names if name in self.sketches}
        return {name: sketch for name, sketch in found.items() if sketch.axis == -1}


@dataclasses.dataclass(frozen=True)
class ObservingPass(Pass):
    """A pass that looks at values of the graph on its calibration inputs.

    Attributes:
        seen: What is known of them from an earlier run; it runs the graph for the others.
    """

    seen: Observations = dataclasses.field(default=Observations(), repr=False, compare=False, kw_only=True)


class DrawnRows:
    """Rows along the last axis of some values, drawn while a graph runs: a few of each row of each input."""

    def __init__(self, names: Iterable[str]) -> None:
        self._drawn: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._draw = torch.Generator().manual_seed(0)

    def add(self, node: torch.fx.Node, value: Any) -> None:
        """Take in what a node of the graph, or of a copy, yields for one input."""
        drawn = self._drawn.get(node.name)
        if drawn is not None and sum(map(len, drawn)) < _MOST:
            rows = value.reshape(-1, value.shape[-1])
            drawn.append(rows[torch.randperm(len(rows), generator=self._draw)[: _EACH * len(value)]])

    def found(self) -> dict[str, torch.Tensor]:
        """Return what was drawn, f32[rows, channels] by name."""
        return {name: torch.cat(rows) for name, rows in self._drawn.items() if rows}


def evenly_spread(value: torch.Tensor, axes: Collection[int], each: int) -> torch.Tensor:
    """Return a view of a value with ``each`` or a few more of the positions along some axes, evenly spread."""
    positions = math.prod(value.shape[axis] for axis in axes)
    every = max(1, math.floor((positions / each) ** (1 / max(len(axes), 1))))
    return value[tuple(slice(None, None, every if axis in axes else 1) for axis in range(value.ndim))]
