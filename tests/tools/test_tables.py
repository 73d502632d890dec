"""Tables: whole words at any width of a terminal, plain lines in a pipe."""

import io

import pytest
from rich.console import Console

from fxopt.report import Change, OutputError, Report, RolledBack, Skip, Step
from fxopt.tools import tables

CHANGES = (Change("replaced", "conv", "folded", "conv"),) * 12


def report() -> Report:
    return Report(
        [
            Step(
                "merge-common-subexpressions{size=7}",
                "ROUNDING",
                "partly rolled back",
                CHANGES,
                (Skip("relu", "[bold] is no markup"),),
                (RolledBack(("conv", "conv_1"), "it breaks\nits contract"),),
                seconds=0.0125,
                check_seconds=0.5,
                nodes=(1056, 24),
                parameter_bytes=(40_072, 39_080),
                errors=(OutputError("a", 1e-9, 160.0), OutputError("b", 3.3e-6, 132.0)),
            ),
            Step("remove-dead-code", "EXACT", nodes=(24, 24), parameter_bytes=(39_080, 39_080)),
        ],
        notes=["not checked on [batch] = 1"],
    )


def shown(monkeypatch, capsys, width: int | None, function, *arguments) -> list[str]:
    import sys

    def console() -> Console:
        return Console(file=sys.stdout, width=width, force_terminal=width is not None, color_system=None)

    monkeypatch.setattr(tables, "stdout", console)
    function(*arguments)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (150, ["pass", "status", "changes", "skips", "nodes", "bytes", "ms", "check ms", "contract", "worst error"]),
        (132, ["pass", "status", "changes", "skips", "nodes", "bytes", "ms", "contract", "worst error"]),
        (100, ["pass", "status", "changes", "skips", "nodes", "worst error"]),
    ],
)
def test_report_leaves_out_columns_that_do_not_fit(monkeypatch, capsys, width, columns):
    header, first, second, *rest = shown(monkeypatch, capsys, width, tables.print_report, report())
    assert "  ".join(header.split()) == "  ".join(" ".join(columns).split())
    assert max(map(len, (header, first, second))) <= width
    assert first.startswith("merge-common-subexpressions{size=7}  partly rolled back  12")
    assert first.endswith("3.3e-06")
    assert "1,056 > 24" in first
    assert second.startswith("remove-dead-code")
    assert second.endswith("-")
    assert "passes 12 ms, checks 500 ms" in rest[0] or "passes 13 ms, checks 500 ms" in rest[0]
    assert rest[1:] == [
        "merge-common-subexpressions{size=7}: undone at conv, conv_1",
        "  it breaks",
        "  its contract",
        "note: not checked on [batch] = 1",
    ]


def test_report_in_a_pipe_is_the_text_of_the_report(monkeypatch, capsys):
    assert shown(monkeypatch, capsys, None, tables.print_report, report()) == str(report()).splitlines()


ROWS = [
    {"name": "a-pass", "contract": "EXACT", "default": True, "options": {}, "summary": "Does a thing. " * 10},
    {"name": "b", "contract": "ROUNDING", "default": False, "options": {"keep": "[x]", "n": 3}, "summary": "Does b."},
]


def test_passes_take_one_line_each_in_a_pipe(monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, None, tables.print_passes, ROWS)
    assert len(lines) == 1 + len(ROWS) + 1
    assert lines[1].startswith("* a-pass  EXACT     Does a thing.")
    assert lines[2] == "  b       ROUNDING  Does b. Options: keep=[x], n=3."
    assert all(line == line.rstrip() for line in lines)


def test_passes_wrap_in_a_terminal(monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, 60, tables.print_passes, ROWS)
    assert max(map(len, lines)) <= 60
    assert lines[2].startswith(" " * 20 + "thing.")


def test_consoles_follow_redirected_streams(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr("sys.stdout", file)
    tables.print_passes(ROWS[1:])
    assert "Does b." in file.getvalue()
