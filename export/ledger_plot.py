"""One quantity over the steps of a pipeline, as SVG: a line with a mark for each step, labelled where it changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

__all__ = ["Point", "nice_ticks", "plot"]

_WIDTH, _HEIGHT = 400, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 384, 40, 160  # edges of what the axes enclose, in the SVG's own units
_LETTER, _LINE = 6.3, 13.0  # about the size of a letter of a label
_NOTHING = 1e-290  # numbers so small cannot be divided
_NUMBERS = 12  # step numbers below the axis before every second one is left out


@dataclasses.dataclass(frozen=True)
class Point:
    """The quantity after one step.

    Attributes:
        step: The step, for the text that a mark shows.
        value: In the unit of the axis; infinite values get a mark at the edge; None if there is no number.
        label: The value for people, without its unit.
        why: Why there is no number.
    """

    step: str
    value: float | None
    label: str = ""
    why: str = ""


@dataclasses.dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def plot(title: str, unit: str, points: Sequence[Point], *, low: float | None = 0.0, high: float | None = None) -> str:
    """Return the SVG element.

    Args:
        title: What the quantity is called.
        unit: Its unit, "" if it has none.
        points: One for each step, at least one with a finite value.
        low: Where the axis begins; chosen from the values if None.
        high: Where it ends; likewise.
    """
    finite = [point.value for point in points if point.value is not None and math.isfinite(point.value)]
    ticks = nice_ticks(min(finite) if low is None else low, max(finite) if high is None else high)
    spots = [(_across(index, len(points)), _up(point.value, ticks)) for index, point in enumerate(points)]
    told = "; ".join(f"{number} {point.step}: {_told(point, unit)}" for number, point in enumerate(points))
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title} by step. {told}")}">']
    parts += _axes(unit, ticks, len(points))
    parts += [f'<polyline class="line" points="{run}"/>' for run in _runs(points, spots)]
    parts += [_mark(number, point, *spots[number], unit) for number, point in enumerate(points)]
    parts += _labels(points, spots)
    return "\n".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float) -> list[float]:
    """Return 3 to 6 round numbers at equal distances, the first at most ``low`` and the last at least ``high``."""
    size = max(abs(low), abs(high))
    if not high - low > 1e-12 * size or size < _NOTHING:
        half = size / 2 if size >= _NOTHING else 0.5
        low, high = low - half, high + half
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 2) + 1)]


def _across(index: int, count: int) -> float:
    inset = 24  # so that the first label has room
    return _LEFT + inset + (_RIGHT - _LEFT - 2 * inset) * (index / (count - 1) if count > 1 else 0.5)


def _up(value: float | None, ticks: Sequence[float]) -> float:
    """Return the height of a value: on the axis for none and minus infinity, above all others for infinity."""
    if value is None or value == -math.inf:
        return _BOTTOM
    if value == math.inf:
        return _TOP - 9
    return _BOTTOM - (_BOTTOM - _TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _told(point: Point, unit: str) -> str:
    if point.value is None:
        return f"not measured: {point.why}" if point.why else "not measured"
    return f"{point.label} {unit}".strip() if math.isfinite(point.value) else point.label


def _axes(unit: str, ticks: Sequence[float], count: int) -> list[str]:
    parts = []
    for tick in ticks:
        y = _up(tick, ticks)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_plain(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>')
    if unit:
        parts.append(f'<text class="unit" x="{_LEFT - 7}" y="14" text-anchor="end">{escape(unit)}</text>')
    every = math.ceil(count / _NUMBERS)
    for number in range(0, count, every):
        x = _across(number, count)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{number}</text>')
    middle = (_LEFT + _RIGHT) / 2
    return [*parts, f'<text class="unit" x="{middle:g}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>']


def _runs(points: Sequence[Point], spots: Sequence[tuple[float, float]]) -> list[str]:
    """Return the points of each unbroken piece of the line: it ends where there is no number."""
    runs: list[list[str]] = [[]]
    for point, (x, y) in zip(points, spots, strict=True):
        if point.value is not None:
            runs[-1].append(f"{x:.1f},{y:.1f}")
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if len(run) > 1]


def _mark(number: int, point: Point, x: float, y: float, unit: str) -> str:
    title = f"<title>{escape(f'{number} {point.step}: {_told(point, unit)}')}</title>"
    if point.value is None:
        cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"
        return f'<path class="mark none" d="{cross}">{title}</path>'
    kind = "mark" if math.isfinite(point.value) else "mark edge"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{title}</circle>'


def _labels(points: Sequence[Point], spots: Sequence[tuple[float, float]]) -> list[str]:
    """Return labels where the value changes, the first and the last ones before others; none over another or a mark."""
    changed = [
        index
        for index, point in enumerate(points)
        if point.value is not None and (index == 0 or point.label != points[index - 1].label)
    ]
    known = [index for index, point in enumerate(points) if point.value is not None]
    order = dict.fromkeys([known[0], known[-1], *changed])
    taken = [_Box(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    parts = []
    for index in order:
        x, y = spots[index]
        half = _LETTER * len(points[index].label) / 2
        x = min(max(x, _LEFT + half), _WIDTH - 2 - half)
        beside = [spots[near][1] for near in (index - 1, index + 1) if 0 <= near < len(spots)]
        above, below = y - 7, y + 7 + _LINE
        for bottom in (below, above) if min(beside, default=y) < y - _LINE else (above, below):  # away from the line
            box = _Box(x - half, bottom - _LINE, x + half, bottom)
            if box.bottom < _BOTTOM and not any(box.meets(other) for other in taken):
                taken.append(box)
                label = escape(points[index].label)
                parts.append(
                    f'<text class="label" x="{x:.1f}" y="{bottom - 3:.1f}" text-anchor="middle">{label}</text>'
                )
                break
    return parts


def _plain(tick: float) -> str:
    return f"{tick:,.0f}" if abs(tick) >= 1000 else f"{tick:.6g}"
