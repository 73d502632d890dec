"""What each width of each layer costs and adds in noise, and the cheapest widths whose noise stays below a bound.

The noise that layers add to the outputs is taken to be uncorrelated: powers add up. Then the best widths under a bound
are a knapsack with several choices an item, which dynamic programming solves for all bounds at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxopt.errors import PassError, describe
from fxopt.passes.quantize.placement import Site
from fxopt.passes.quantize.target import ORT_CPU, Target

__all__ = [
    "FLOAT", "Costs", "Width", "WidthTable", "converted_numbers", "macs_of", "relative_cost", "weight_elements",
]  # fmt: skip

Width = int | str
"""Bits of a layer, or ``"float"``. Up to 8, the bits of its weight beside 8-bit activations; 16, of its activations."""
FLOAT = "float"
Costs = Mapping[str, Mapping[Width, float]]
"""Measured time by name of a layer and by width, in any one unit."""

_INTEGER_COST = 0.5  # of a float layer's; measured times say better
# To convert one number, and to turn it to another layout, takes as long as so many multiply-accumulates in float.
# (ORT 1.32, AVX-512, one thread: 0.3 ns a number between convolutions in integers, 0.017 ns a multiply-accumulate.)
_CONVERSION = 20.0
_SIZE_WEIGHT = 1e-3  # what all weights count beside all layers: it decides where the time is the same
_BUCKETS = 10_000
_CHOICES = 64
_SATURATED = 1e6  # noise power beyond which no more matters, NaN among it


def relative_cost(width: Width, target: Target) -> float:
    """Return the time of a layer at this width beside its time in float, where it was not measured.

    ONNX Runtime has no integer kernel on a CPU for 16-bit activations: they take the time of floats. A runtime that is
    not known is taken to need time in proportion to the bits of activations.
    """
    if width == FLOAT:
        return 1.0
    assert isinstance(width, int)
    if width <= 8:
        return _INTEGER_COST if target is ORT_CPU else 8 / 32
    return 1.0 if target is ORT_CPU else width / 32


@dataclasses.dataclass(frozen=True)
class WidthTable:
    """Cost and noise of each layer at each width.

    Attributes:
        layers: Names of the layers.
        widths: The widths to choose from.
        cost: f64[layers, widths], as a share of all layers in float.
        noise: f64[layers, widths], power at the outputs beside that of the signal.
    """

    layers: tuple[str, ...]
    widths: tuple[Width, ...]
    cost: np.ndarray[Any, np.dtype[np.float64]]
    noise: np.ndarray[Any, np.dtype[np.float64]]

    @classmethod
    def of(
        cls,
        layers: Sequence[str],
        widths: Sequence[Width],
        *,
        macs: Mapping[str, float],
        elements: Mapping[str, float],
        noise: Mapping[str, Mapping[Width, float]],
        target: Target,
        costs: Costs | None,
        converted: Mapping[str, float] | None = None,
    ) -> WidthTable:
        """Return the table.

        Args:
            layers: Names of the layers.
            widths: The widths to choose from.
            macs: Multiply-accumulates of each layer.
            elements: Elements of each layer's weight; a smaller one breaks ties of time.
            noise: Noise power of each layer at each width but ``"float"``.
            target: The runtime, which the cost depends on where it was not measured.
            costs: Measured times. A layer without any counts by its multiply-accumulates, at the mean time of one; a
                width without any counts as 8 bits if it has fewer, else as float.
            converted: How many numbers each layer reads and yields. Among layers in integers a float one needs them
                converted, which the times of kernels leave out.

        Raises:
            PassError: a time is not a finite number above 0, or no layer has any.
        """
        times, each = _times(layers, widths, macs, target, costs)
        extra = [_CONVERSION * each * (converted or {}).get(name, 0.0) for name in layers]
        times[:, [width == FLOAT for width in widths]] += np.array(extra)[:, None]
        bits = np.array([[elements[name] * _stored_bits(width) for width in widths] for name in layers])
        whole = float(_times(layers, (FLOAT,), macs, target, costs)[0].sum())
        size = 32 * sum(elements[name] for name in layers)
        powers = [[0.0 if width == FLOAT else _finite(noise[name][width]) for width in widths] for name in layers]
        cost = times / max(whole, 1e-30) + _SIZE_WEIGHT * bits / max(size, 1)
        return cls(tuple(layers), tuple(widths), cost, np.array(powers))

    def cheapest(self) -> tuple[int, ...]:
        """Return the cheapest width of each layer, as its number in ``widths``."""
        return tuple(int(index) for index in self.cost.argmin(1))

    def quietest(self) -> tuple[int, ...]:
        """Return the width of least noise of each layer, the cheapest of several, as its number in ``widths``."""
        return tuple(int(np.lexsort((cost, noise))[0]) for cost, noise in zip(self.cost, self.noise, strict=True))

    def named(self, choice: Sequence[int]) -> dict[str, Width]:
        """Return the width of each layer by name."""
        return {name: self.widths[index] for name, index in zip(self.layers, choice, strict=True)}

    def quantizes(self, choice: Sequence[int]) -> bool:
        """Return whether a choice leaves not all layers float."""
        return any(self.widths[index] != FLOAT for index in choice)

    def total(self, choice: Sequence[int]) -> tuple[float, float]:
        """Return cost and noise power of a choice."""
        rows = np.arange(len(self.layers))
        return float(self.cost[rows, list(choice)].sum()), float(self.noise[rows, list(choice)].sum())

    def frontier(self) -> list[tuple[int, ...]]:
        """Return the choices of least noise for their cost, the cheapest of all first, that of least noise last.

        At most 64. Layer by layer, of all partial choices within one ten-thousandth of the cost the least noisy one is
        kept: the cost of what is found is above the least for its noise by no more than that for each layer.
        """
        width = float(self.cost.max(1).sum()) / _BUCKETS
        cost, noise = np.zeros(1), np.zeros(1)
        steps: list[tuple[Any, Any]] = []
        for row in range(len(self.layers)):
            costs = (cost[:, None] + self.cost[row]).ravel()
            noises = (noise[:, None] + self.noise[row]).ravel()
            order = np.lexsort((noises, np.floor(costs / width)))
            order = order[_falling(noises[order])]
            cost, noise = costs[order], noises[order]
            steps.append(np.divmod(order, len(self.widths)))
        ends = np.linspace(cost[0], cost[-1], _CHOICES)  # evenly by cost, if there are more
        chosen = range(len(cost)) if len(cost) <= _CHOICES else np.unique(np.searchsorted(cost, ends))
        return [self._traced(steps, int(last)) for last in chosen]

    def _traced(self, steps: list[tuple[Any, Any]], last: int) -> tuple[int, ...]:
        """Return the widths by which a whole choice came about."""
        found = []
        for before, width in reversed(steps):
            found.append(int(width[last]))
            last = int(before[last])
        return tuple(reversed(found))


def _falling(noise: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which numbers are smaller than all before them."""
    least = np.minimum.accumulate(noise)
    return np.concatenate([[True], noise[1:] < least[:-1]])


def macs_of(site: Site, shapes: Mapping[torch.fx.Node, torch.Size]) -> float:
    """Return the multiply-accumulates of a layer, on the shapes of a run; dynamic sizes count 1 if it did not run."""
    if site.is_convolution and site.weight is not None:
        each = math.prod(_shape(site.weight, shapes)[1:])
    else:
        each = _shape(site.operands[0], shapes)[-1]
    return float(math.prod(_shape(site.node, shapes)) * each)


def converted_numbers(site: Site, shapes: Mapping[torch.fx.Node, torch.Size]) -> float:
    """Return how many numbers a layer reads, its weight aside, and yields; sizes as in :func:`macs_of`."""
    values = [operand for operand in site.operands if operand is not site.weight] + [site.node]
    return float(sum(math.prod(_shape(value, shapes)) for value in values))


def _shape(node: torch.fx.Node, shapes: Mapping[torch.fx.Node, torch.Size]) -> list[int]:
    sizes = shapes.get(node, node.meta["val"].shape)
    return [size if isinstance(size, int) else 1 for size in sizes]


def weight_elements(site: Site) -> float:
    """Return the number of elements of a layer's weight; 0 if it multiplies activations."""
    return 0.0 if site.weight is None else float(site.weight.meta["val"].numel())


def _times(
    layers: Sequence[str], widths: Sequence[Width], macs: Mapping[str, float], target: Target, costs: Costs | None
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float]:
    """Return the time of each layer at each width, and that of one multiply-accumulate in float."""
    held = {} if costs is None else {name: costs[name] for name in layers if name in costs}
    for name, row in held.items():
        for width, time in row.items():
            if not (isinstance(time, int | float) and math.isfinite(time) and time > 0):
                raise PassError(f"the cost of {name} at {width} is {time!r}; wanted a finite number above 0")
    if costs is not None and not any(FLOAT in row for row in held.values()):
        raise PassError(
            describe(
                "costs names no layer of the graph with a time in float",
                got=", ".join(list(costs)[:8]) or "nothing",
                wanted=", ".join(list(layers)[:8]),
            )
        )
    timed = [name for name, row in held.items() if FLOAT in row]
    per_mac = sum(held[name][FLOAT] for name in timed) / max(sum(macs[name] for name in timed), 1) if timed else 1.0

    def seconds(name: str, width: Width) -> float:
        row = held.get(name, {})
        same = width if width in row else 8 if isinstance(width, int) and width <= 8 else FLOAT
        return row[same] if same in row else macs[name] * per_mac * relative_cost(width, target)

    return np.array([[seconds(name, width) for width in widths] for name in layers], dtype=np.float64), per_mac


def _stored_bits(width: Width) -> int:
    return 32 if width == FLOAT else min(int(width), 8)


def _finite(power: float) -> float:
    return min(power, _SATURATED) if not math.isnan(power) else _SATURATED
