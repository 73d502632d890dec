"""The ledger as one HTML page that needs nothing else: a table, a plot for each quantity, the record of each step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from fxopt.export.ledger_plot import Point, plot
from fxopt.export.ledger_report import COLUMNS, Ledger, LedgerEntry, StageNumbers, decibels, shown_columns

__all__ = ["STYLE", "ledger_page"]

STYLE = """
:root {
  color-scheme: light dark;
  --background: #ffffff; --surface: #f4f6f9; --text: #14181f; --muted: #4c5562; --border: #7b8696; --grid: #d9dee6;
  --accent: #0b5cad; --wrong: #a40e26;
}
@media (prefers-color-scheme: dark) {
  :root {
    --background: #12161c; --surface: #1b212a; --text: #eef1f5; --muted: #aeb8c6; --border: #77839a; --grid: #2c3440;
    --accent: #7fbcff; --wrong: #ff9aa8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 28px 24px 48px; max-width: 1320px; background: var(--background); color: var(--text);
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
h1 { font-size: 22px; margin: 0; }
h2 { font-size: 16px; margin: 34px 0 10px; }
p { margin: 2px 0 0; color: var(--muted); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tiles div { padding: 12px 16px; background: var(--surface); border-radius: 10px; }
.tiles dt { color: var(--muted); }
.tiles dd { margin: 0; font-size: 22px; font-weight: 600; line-height: 1.3; }
.tiles dd + dd { font-size: 13px; font-weight: 400; color: var(--muted); }
.scroll { overflow-x: auto; border: 1px solid var(--grid); border-radius: 10px; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td.word, th.word { text-align: left; }
thead th {
  color: var(--muted); font-weight: 600; background: var(--surface); vertical-align: bottom; white-space: normal;
}
tbody tr { border-top: 1px solid var(--grid); }
tbody th { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 32ch; }
tbody th div { display: flex; }
.number { flex: 0 0 3ch; color: var(--muted); font-weight: 400; }
.wrong { color: var(--wrong); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); gap: 18px; }
figure { margin: 0; padding: 12px 12px 6px; border: 1px solid var(--grid); border-radius: 10px; }
figcaption { font-weight: 600; padding-left: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--muted); }
svg .label {
  fill: var(--text); font-weight: 600; stroke: var(--background); stroke-width: 3px; paint-order: stroke;
  stroke-linejoin: round;
}
.grid { stroke: var(--grid); }
.axis { stroke: var(--border); }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.mark { fill: var(--accent); stroke: var(--background); stroke-width: 1.5; }
.mark.edge { fill: var(--background); stroke: var(--accent); stroke-width: 2; }
.mark.none { fill: none; stroke: var(--wrong); stroke-width: 2; }
details { border-top: 1px solid var(--grid); padding: 8px 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
summary span { color: var(--muted); }
details .scroll { margin: 8px 0 4px; }
details td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 22ch; }
details td:first-child { white-space: nowrap; overflow-wrap: normal; min-width: 0; }
pre {
  margin: 6px 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace;
}
"""
_WORDS = ("step", "status")  # columns that are not numbers


@dataclasses.dataclass(frozen=True)
class _Quantity:
    """What gets a plot, and a place in the head of the page.

    Attributes:
        title: What it is called.
        unit: Its unit; bytes are told in a larger one.
        of: The number of a graph.
        label: The number for people.
        missing: What :attr:`StageNumbers.missing` calls it where it alone is missing.
        low, high: Ends of the axis; None to choose them from the values.
    """

    title: str
    unit: str
    of: Callable[[StageNumbers], float | None]
    label: Callable[[float], str]
    missing: str
    low: float | None = 0.0
    high: float | None = None


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_QUANTITIES = (
    _Quantity("File size", "bytes", lambda numbers: numbers.file_bytes, _short, "file"),
    _Quantity("Signal to noise", "dB", lambda numbers: numbers.sqnr_db, decibels, "error"),
    _Quantity("Score", "", lambda numbers: numbers.score, "{:.4g}".format, "score", low=None),
    _Quantity("Latency", "ms", lambda numbers: numbers.median_ms, _short, "latency"),
    _Quantity("MACs in integer kernels", "%", lambda n: _percent(n.integer_share), _short, "coverage", high=100.0),
    _Quantity("Nodes", "nodes", lambda numbers: float(numbers.nodes), _short, ""),
)


def ledger_page(ledger: Ledger) -> str:
    """Return the page: no script, no request, and every number of the plots in its table."""
    quantities = [_fitted(quantity, ledger) for quantity in _QUANTITIES]
    plotted = [(each, points) for each, points in quantities if any(_is_finite(point.value) for point in points)]
    steps = len(ledger.entries) - 1
    title = f"Ledger of {steps} step{'' if steps == 1 else 's'}"
    figures = (
        f"<figure><figcaption>{escape(each.title)}</figcaption>\n"
        f"{plot(each.title, each.unit, points, low=each.low, high=each.high)}\n</figure>"
        for each, points in plotted
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header><h1>{title}</h1>\n<p>{escape(ledger.how())}.</p></header>\n<main>",
            _tiles(plotted),
            '<h2 id="numbers">Numbers</h2>',
            _numbers(ledger),
            _gaps(ledger),
            '<h2>Step by step</h2>\n<div class="plots">',
            *figures,
            "</div>\n<h2>What the steps did</h2>",
            *(_record(number, entry) for number, entry in enumerate(ledger.entries) if number),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _fitted(quantity: _Quantity, ledger: Ledger) -> tuple[_Quantity, list[Point]]:
    """Return a quantity with its points; bytes in the unit that suits the largest."""
    values = [quantity.of(entry.numbers) for entry in ledger.entries]
    divisor = 1.0
    if quantity.unit == "bytes":
        largest = max((value for value in values if value is not None), default=0.0)
        divisor, unit = next(
            (size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if largest >= size
        )
        divisor, quantity = divisor or 1.0, dataclasses.replace(quantity, unit=unit)
    points = []
    for entry, value in zip(ledger.entries, values, strict=True):
        if value is None:
            told = entry.numbers.missing
            reasons = (told[what] for what in (quantity.missing, "file", "run in ONNX Runtime") if what in told)
            points.append(Point(entry.step, None, why=next(reasons, "").partition("\n")[0]))
        else:
            points.append(Point(entry.step, value / divisor, quantity.label(value / divisor)))
    return quantity, points


def _tiles(plotted: Iterable[tuple[_Quantity, Sequence[Point]]]) -> str:
    """Return what the whole pipeline made of each quantity."""
    tiles = []
    for quantity, points in plotted:
        before, after = (_with_unit(point, quantity.unit) for point in (points[0], points[-1]))
        since = "unchanged" if before == after else f"captured: {before}"
        tiles.append(f"<div><dt>{escape(quantity.title)}</dt><dd>{escape(after)}</dd><dd>{escape(since)}</dd></div>")
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _with_unit(point: Point, unit: str) -> str:
    if point.value is None:
        return "not measured"
    shown = unit if math.isfinite(point.value) and unit != "nodes" else ""
    return f"{point.label} {shown}".strip()


def _numbers(ledger: Ledger) -> str:
    shown = shown_columns(ledger.entries)
    head = "".join(f'<th scope="col"{_word(COLUMNS[column])}>{COLUMNS[column]}</th>' for column in shown)
    rows = []
    for number, entry in enumerate(ledger.entries):
        cells = entry.row()
        told = escape(entry.step).replace(",", ",<wbr>")  # a long list of options breaks between two of them
        name = f'<th scope="row"><div><span class="number">{number}</span><span>{told}</span></div></th>'
        rest = "".join(f"<td{_word(COLUMNS[column])}>{escape(cells[column])}</td>" for column in shown if column)
        rows.append(f"<tr>{name}{rest}</tr>")
    return _table(f"<thead><tr>{head}</tr></thead>", rows, "The numbers of each step")


def _word(column: str) -> str:
    return ' class="word"' if column in _WORDS else ""


def _gaps(ledger: Ledger) -> str:
    """Return what could not be measured, with the reason, and the notes of the pipeline."""
    parts = [
        f'<pre><strong class="wrong">{number} {escape(step)}: no {escape(what)}</strong>\n{escape(why)}</pre>'
        for number, step, what, why in ledger.missing()
    ]
    return "\n".join(parts + [f"<pre>note: {escape(note)}</pre>" for note in ledger.notes])


def _record(number: int, entry: LedgerEntry) -> str:
    """Return what a step changed and what it left alone, closed until it is asked for."""
    counts = f"{entry.status}; {_count(len(entry.changes), 'change')}, {len(entry.skips)} left alone"
    parts = [
        f"<details>\n<summary>{number} <strong>{escape(entry.step)}</strong> <span>{escape(counts)}</span></summary>"
    ]
    for undone in entry.rolled_back:
        where = f"at {', '.join(undone.sites)}" if undone.sites else "as a whole"
        parts.append(f'<pre><strong class="wrong">undone {escape(where)}</strong>\n{escape(undone.why)}</pre>')
    parts += [f"<pre>{escape(note)}</pre>" for note in entry.notes]
    lines = [(change.kind, change.node, change.why, change.source) for change in entry.changes]
    lines += [("left alone", skip.node, skip.why, skip.source) for skip in entry.skips]
    if lines:
        titles = "".join(f'<th scope="col" class="word">{title}</th>' for title in ("what", "node", "why", "source"))
        rows = ["<tr>" + "".join(f"<td>{escape(cell or '')}</td>" for cell in line) + "</tr>" for line in lines]
        parts.append(_table(f"<thead><tr>{titles}</tr></thead>", rows, f"What {entry.step} did"))
    elif not entry.rolled_back and not entry.notes:
        parts.append("<p>It found nothing to do.</p>")
    return "\n".join([*parts, "</details>"])


def _table(head: str, rows: Sequence[str], label: str) -> str:
    """Return a table that scrolls by itself, also by keys."""
    body = "\n".join(rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n'
        f"<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
