"""The page of a ledger: it holds all numbers, asks for nothing, shows what users wrote as text, and can be read."""

import dataclasses
import html.parser
import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.changes import Change, Skip
from fxopt.export.ledger_page import STYLE, ledger_page
from fxopt.export.ledger_plot import Point, nice_ticks, plot
from fxopt.export.ledger_report import Ledger, LedgerEntry, StageNumbers
from fxopt.report import RolledBack
from tests.tools.viz.browser import Browser, needs_browser
from tests.tools.viz.test_document import contrast

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
FIRST = StageNumbers(40, 9_000_000, 9_120_345, 0.0, math.inf, 0.987654, 12.5, 1.0, 0.0)
LAST = StageNumbers(80, 2_300_000, 2_400_000, 0.031, 35.25, 0.98, 7.25, 1.724, 0.97)


def ledger_of(*entries: LedgerEntry) -> Ledger:
    return Ledger((LedgerEntry("captured", "captured", FIRST), *entries), ("image: f32[8, 3, 32, 32]",), 50, None)


class Reader(html.parser.HTMLParser):
    """Collects the elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.fixture(scope="module")
def many() -> Ledger:
    """A long pipeline of passes with long names."""
    numbers = [FIRST] * 3 + [
        dataclasses.replace(LAST, sqnr_db=60.0 - i, file_bytes=5_000_000 - 99_999 * i) for i in range(9)
    ]
    numbers[7] = StageNumbers(90, 9_000_000, missing={"file": "no kernel\n  node  conv2d", "error": "no output"})
    names = [f"quantize{{recipe=accurate,weights=int4,keep=head.{i}.projection.weight}}" for i in range(12)]
    change = Change("replaced", "conv2d_1", "folded into conv2d", "conv2d_1", "net.py:12, in forward: x = self.norm(x)")
    skip = Skip("conv2d_2", "it has 2 users", "net.py:14, in forward: y = self.conv(x)")
    return ledger_of(
        *(
            LedgerEntry(name, "changed", n, 1.25, 2.5, (change,) * 3, (skip,))
            for name, n in zip(names, numbers, strict=True)
        )
    )


def test_page_asks_for_nothing_and_runs_nothing(many):
    page = ledger_page(many)
    reader = Reader(page)
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "use", "image", "a"}
    assert not re.search(r"https?:|//|url\(|@import|javascript:", page)
    assert not any(name.startswith("on") for _, attributes in reader.elements for name in attributes)
    (policy,) = (each["content"] for each in reader.of("meta") if "http-equiv" in each)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_users_wrote_stays_text():
    numbers = dataclasses.replace(LAST, file_bytes=None, score=None, missing={EVIL: EVIL})
    record = ((Change(EVIL, EVIL, EVIL, EVIL, EVIL),), (Skip(EVIL, EVIL, EVIL),), (RolledBack((EVIL,), EVIL),), (EVIL,))
    evil = Ledger((LedgerEntry(EVIL, EVIL, numbers, 0, 0, *record),) * 2, (EVIL,), 1, None, (EVIL,))
    reader, plain = (Reader(ledger_page(each)) for each in (evil, ledger_of(LedgerEntry("a", "b", LAST))))
    assert {tag for tag, _ in reader.elements} <= {tag for tag, _ in plain.elements} | {"strong", "pre", "path"}
    assert "".join(reader.words).count("<script>alert(1)") > 10
    assert all(
        "alert" not in str(value) for _, each in reader.elements for name, value in each.items() if name != "aria-label"
    )


def test_table_holds_every_number(many):
    words = [word.strip() for word in Reader(ledger_page(many)).words]
    for entry in many.entries:
        assert [cell for cell in entry.row() if cell not in words] == []
    assert "no kernel\n  node  conv2d" in words
    assert "net.py:12, in forward: x = self.norm(x)" in words
    assert words.count("it has 2 users") == 12


def test_each_quantity_has_a_plot_with_a_mark_for_each_step(many):
    page = ledger_page(many)
    plots = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "File size", "Signal to noise", "Score", "Latency", "MACs in integer kernels", "Nodes",
    ]  # fmt: skip
    assert [len(re.findall(r'class="mark', each)) for each in plots] == [13] * 6
    assert [len(re.findall("<title>", each)) for each in plots] == [13] * 6
    assert "not measured: no kernel" in plots[0]
    assert "not measured: no output" in plots[1]
    for each in Reader("".join(plots)).of("svg"):
        assert each["role"] == "img"
        assert all(entry.step in each["aria-label"] for entry in many.entries)


def test_quantities_without_numbers_have_no_plot():
    numbers = StageNumbers(40, 10, 20, 0.0, math.inf)
    page = ledger_page(Ledger((LedgerEntry("captured", "captured", numbers),) * 2, ("x: f32[1]",), 0, None))
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == ["File size", "Nodes"]


@pytest.mark.parametrize(
    ("file_bytes", "told"),
    [(999, "999 B"), (24_625, "24.6 kB"), (9_120_345, "9.12 MB"), (2_500_000_000, "2.5 GB"), (0, "0 B")],
)
def test_bytes_are_told_in_a_unit_that_suits_them(file_bytes, told):
    numbers = dataclasses.replace(LAST, file_bytes=file_bytes)
    page = ledger_page(Ledger((LedgerEntry("captured", "captured", numbers),), ("x: f32[1]",), 0, None))
    assert f"0 captured: {told}</title>" in page


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9), st.sampled_from([math.inf, -math.inf])), max_size=15),
    st.floats(-1e6, 1e6),
)
def test_marks_stand_inside_the_picture_at_heights_in_the_order_of_the_values(values, last):
    points = [Point(f"step {i}", value, str(value)) for i, value in enumerate([*values, last])]
    reader = Reader(plot("Things", "m", points, low=None))
    circles = [(float(each["cx"]), float(each["cy"])) for each in reader.of("circle")]
    assert len(circles) == sum(point.value is not None for point in points)
    assert len(reader.of("path")) == sum(point.value is None for point in points)
    assert all(0 <= x <= 400 and 0 <= y <= 200 for x, y in circles)
    ranked = sorted(
        (point.value, -y) for (_, y), point in zip(circles, (p for p in points if p.value is not None), strict=True)
    )
    heights = [height for _, height in ranked]
    assert all(a <= b + 0.11 for a, b in itertools.pairwise(heights))  # a tenth is what the SVG holds


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_are_few_round_and_hold_the_values(one, other):
    low, high = sorted([one, other])
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * max(abs(low), abs(high), step)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 3 <= len(ticks) <= 6
    assert all(b - a == pytest.approx(step, abs=slack) for a, b in itertools.pairwise(ticks))


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_text_and_marks_stand_out(which):
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[which]))
    for text in ("text", "muted", "wrong"):
        assert min(contrast(colours[text], colours[ground]) for ground in ("background", "surface")) >= 4.5
    assert contrast(colours["accent"], colours["background"]) >= 4.5
    assert contrast(colours["border"], colours["background"]) >= 3


@pytest.mark.browser
@needs_browser
def test_page_in_a_browser_fits_logs_nothing_and_no_label_covers_another(many, tmp_path):
    browser, path = Browser(width=900), many.save(tmp_path / "ledger.html")
    overlaps = """
        const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
        return [...document.querySelectorAll('svg')].flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].map(one => [one.textContent, one.getBoundingClientRect()]);
            return boxes.flatMap(([name, box], i) =>
                boxes.slice(i + 1).filter(([, other]) => meet(box, other)).map(([other]) => name + ' ' + other));
        });
    """
    try:
        for dark in (False, True):
            browser.requests()
            browser.open(path, dark=dark)
            assert browser.run("return [document.documentElement.scrollWidth <= window.innerWidth]") == [True]
            assert browser.run(overlaps) == []
            assert [url for url in browser.requests() if re.match("file|http|ws", url)] == [path.as_uri()]
            assert browser.errors() == []
    finally:
        browser.close()
