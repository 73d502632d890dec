"""The measured graphs are real ones: valid, runnable in both modes, and with work for every pass."""

from __future__ import annotations

import collections
import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fxopt
from fxopt.attributes import read_attributes
from fxopt.checks import verify
from fxopt.functionalize import fake_call
from fxopt.passes import DEFAULT
from fxopt.passes.cleanup import PASSES
from tests.bench import pass_scaling
from tests.bench.__main__ import main
from tests.bench.synthetic_graph import build

SMALL, LARGE = 320, 960  # nodes
OURS = tuple(str(Path(module.__file__).parent) for module in (fxopt, fxopt.passes))


@pytest.fixture(scope="module")
def small():
    return build(SMALL)


@pytest.fixture(scope="module")
def large():
    return build(LARGE)


def lines_run(work, argument):
    """Return how many lines of fxopt it takes: what time would tell, without the noise."""
    count = 0

    def inside(frame, event, _):
        nonlocal count
        count += event == "line"
        return inside

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: inside if frame.f_code.co_filename.startswith(OURS) else None)
    try:
        work(argument)
    finally:
        sys.settrace(before)
    return count


def changes(gm, kind):
    result = kind()(gm)
    verify(result.gm, after=kind.name)
    return len(result.changes)


def test_graph_is_valid_and_of_the_wanted_size(small, large):
    for gm, nodes in ((small, SMALL), (large, LARGE)):
        verify(gm)
        assert nodes <= len(gm.graph.nodes) <= nodes + 60
        gm.graph.lint()


def test_graph_runs_in_both_modes_and_at_other_sizes(small):
    gm = small.clone()
    x = torch.rand(3, 2, 4, 4)
    before = gm(x)
    assert before.shape == x.shape
    assert bool(before.isfinite().all())
    gm.train()
    gm(x)
    assert gm.get_buffer("stage0.block0.norm.num_batches_tracked") == 1
    assert not torch.equal(gm.eval()(x), before)


def test_copied_fake_values_are_those_that_the_calls_have(small):
    """Values are shared between calls that look alike, so one of them could be given the value of another."""
    for node in small.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and node.target is not torch.ops.aten.sum:
            seen = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
            again = fake_call(node.target, node.args, node.kwargs)
            assert (value.shape, value.dtype, value.stride()) == (again.shape, again.dtype, again.stride()), node
            assert all(v.fake_mode is value.fake_mode for v in seen)


# The graph has no attention: what fuse-attention costs there is the search for it.
WORKING = [kind for kind in PASSES if kind.name != "fuse-attention"]


@pytest.mark.parametrize("kind", WORKING, ids=lambda kind: kind.name)
def test_every_pass_has_work_at_a_constant_share_of_nodes(kind, small, large):
    few, many = changes(small, kind), changes(large, kind)
    assert few > 0
    assert many / few == pytest.approx(len(large.graph.nodes) / len(small.graph.nodes), rel=0.25)


@pytest.mark.parametrize(
    "timed",
    [timed for timed in pass_scaling.steps() if "run" not in timed.name.split() and "default" not in timed.name],
    ids=lambda timed: timed.name,
)
def test_every_step_takes_a_constant_number_of_lines_per_node(timed, small, large):
    lines = [lines_run(timed.work, timed.prepare(gm)) for gm in (small, large)]
    nodes = [len(gm.graph.nodes) for gm in (small, large)]
    assert pass_scaling.exponent(nodes, lines) < 1.1


def test_lines_tell_a_quadratic_step(small, large):
    def quadratic(gm):
        for module in gm.modules():
            read_attributes(gm) if "conv" in module._modules else None

    lines = [lines_run(quadratic, gm) for gm in (small, large)]
    assert pass_scaling.exponent([len(gm.graph.nodes) for gm in (small, large)], lines) > 1.5


def test_default_list_is_checked_on_the_graph_and_keeps_every_pass(small):
    done = fxopt.PassManager(DEFAULT, strict=True, check="all").run(small)
    assert [step.status for step in done.report.steps] == ["changed"] * len(DEFAULT)
    assert min(step.checked for step in done.report.steps) >= 3  # the sample, a corner, the other mode
    left = collections.Counter(str(node.target) for node in done.graph.nodes)
    assert left["aten.batch_norm.default"] == 0
    assert left["aten.cos.default"] == 0


def test_each_pass_is_timed():
    assert {kind.name for kind in PASSES} <= {timed.name for timed in pass_scaling.steps()}


def test_table_has_a_row_for_each_step_and_a_column_for_each_size(monkeypatch):
    chosen = [timed for timed in pass_scaling.steps() if timed.name in ("clone", "verify")]
    monkeypatch.setattr(pass_scaling, "steps", lambda: chosen)
    monkeypatch.setattr(pass_scaling, "SIZES", {60: 1, 120: 1, 10**9: 1})
    console = Console(width=120, record=True, file=io.StringIO())
    pass_scaling.main(console, quick=True)
    rows = [line.split("|")[1:-1] for line in console.export_text().splitlines() if "|" in line]
    assert [row[0].strip() for row in rows if "---" not in row[0]] == ["step", "clone", "verify"]
    assert all(float(cell) > 0 for row in rows[-2:] for cell in row[1:3])
    assert {len(row) for row in rows} == {4}


def test_exponent_is_the_power_of_the_size():
    assert pass_scaling.exponent([10, 100, 1000], [3.0, 300.0, 30_000.0]) == pytest.approx(2)


def test_unknown_benchmark_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["pass_scalling"])
    assert "unknown: pass_scalling; there is pass_scaling" in capsys.readouterr().err


def test_listing_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(pass_scaling, "main", lambda *_, **__: pytest.fail("it ran"))
    main(["--list"])
    assert "pass_scaling: time per node" in capsys.readouterr().out
