"""The table of ``tests/bench/quantization.py`` hides nothing: failures, missing packages, other conditions."""

import dataclasses
import io

import pytest
from rich.console import Console

from tests.bench import quantization, quantization_cell, quantization_peers, quantization_subjects
from tests.bench.__main__ import main as run_benchmarks

CELL = quantization_cell.Cell(
    seconds=1.25,
    peak_mib=900.0,
    rise_mib=20.0,
    score=0.5,
    sqnr_db=12.0,
    ms=2.0,
    speed=1.5,
    integer=3,
    kernels=4,
    mib=1.0,
)
ERROR = {"error": "KeyError", "reason": "no such node"}


def table(monkeypatch: pytest.MonkeyPatch, answers: dict, tools: tuple[str, ...], model: str = "mnist_cnn") -> str:
    """Return the printed table, with ``answers`` by (tool, options) in place of measurements."""
    monkeypatch.setattr(quantization, "cell", lambda model, tool, folder, threads, *options: answers[tool, *options])
    out = io.StringIO()
    quantization.main(Console(file=out), models=(model,), tools=tools)
    return out.getvalue()


def test_a_cell_shows_all_that_was_measured(monkeypatch):
    answers = {("fp32",): dataclasses.asdict(CELL), ("ort_static",): dataclasses.asdict(CELL)}
    said = table(monkeypatch, answers, ("fp32", "ort_static"))
    assert "| 0.500 · 2.00 ms · 3/4 · 1.0 MiB · 1.2 s · 900 (+20) MiB |" in said
    assert "| 0.500 · 12.0 dB · 1.50× · 3/4 · 1.0 MiB · 1.2 s · 900 (+20) MiB |" in said


def test_a_tool_that_fails_is_in_the_table_and_its_reason_below(monkeypatch):
    answers = {("fp32",): dataclasses.asdict(CELL), ("ort_static",): ERROR, ("ort_static", "fixed"): ERROR}
    said = table(monkeypatch, answers, ("ort_static",))
    assert "| fails: KeyError |" in said
    assert "- mnist_cnn, ORT quantize_static: KeyError: no such node" in said


def test_a_tool_that_needs_a_fixed_batch_says_so_and_why(monkeypatch):
    fixed = dataclasses.asdict(CELL)
    answers = {("fp32",): fixed, ("ort_static",): ERROR, ("ort_static", "fixed"): fixed}
    said = table(monkeypatch, answers, ("ort_static",))
    assert "MiB · fixed batch |" in said
    assert "KeyError: no such node" in said


def test_without_an_f32_file_nothing_can_be_compared(monkeypatch):
    said = table(monkeypatch, {("fp32",): ERROR}, ("ort_static",))
    assert "| fails: KeyError |" in said


def test_a_package_that_is_missing_is_named_as_such(monkeypatch):
    tool = quantization_peers.Tool("peer", quantization_peers.fp32, needs=("no_such_package",))
    monkeypatch.setitem(quantization.TOOLS, "peer", tool)
    said = table(monkeypatch, {("fp32",): dataclasses.asdict(CELL)}, ("peer",))
    assert "| mnist_cnn | not installed |" in said


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown: resnet9000; there is mobilenetv2"):
        quantization.main(models=("resnet9000",))
    with pytest.raises(ValueError, match="unknown: magic; there is fp32"):
        quantization.main(tools=("magic",))
    with pytest.raises(SystemExit):
        run_benchmarks(["zoo_table", "--tools", "fp32"])


def test_a_process_that_dies_is_a_failure_with_its_last_words(monkeypatch, tmp_path):
    monkeypatch.setattr(quantization.sys, "executable", "false")
    assert quantization.cell("mnist_cnn", "fp32", tmp_path, 0) == {"error": "exit status 1", "reason": "no message"}


def test_the_reason_tells_the_step_and_the_first_cause():
    try:
        try:
            raise KeyError("axis")
        except KeyError as cause:
            raise RuntimeError("no file") from cause
    except RuntimeError as error:
        outer = quantization_cell.StepError("ORT on the result")
        outer.__cause__ = error
    assert quantization_cell.reason(outer) == ("RuntimeError", "ORT on the result: no file ← KeyError: 'axis'")


def test_calibration_sentences_are_many_and_not_those_scored():
    sentences = quantization_subjects.help_sentences(64)
    assert len(set(sentences)) == 64
    assert not set(sentences) & set(quantization_subjects.data.SENTENCES)


@pytest.mark.ort
@pytest.mark.zoo
def test_the_f32_file_scores_as_the_net_does(monkeypatch, tmp_path):
    monkeypatch.setattr(quantization_cell, "SECONDS", 0.0)
    found = quantization_cell.measure("mnist_cnn", "fp32", tmp_path)
    assert found.score == pytest.approx(0.997, abs=5e-4)
    assert (found.integer, found.kernels, found.sqnr_db) == (0, 5, float("inf"))
    assert found.peak_mib >= found.rise_mib >= 0
