"""Passes that know nothing of fxopt, and the report that every pass gets."""

import json
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import fxopt
from fxopt.checks import fingerprint
from fxopt.report import Report

aten = torch.ops.aten


def net(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * 1.0 + 0.5


@pytest.fixture
def gm() -> fxopt.CapturedModule:
    return fxopt.capture(net, (torch.randn(4, 6),), dynamic_shapes={"x": {0: "batch"}})


def drop_mul(gm: torch.fx.GraphModule) -> bool:
    """Replace the product by its factor; right as long as the other factor is one."""
    for node in gm.graph.nodes:
        if node.target is aten.mul.Tensor:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            gm.recompile()
            return True
    return False


class TorchPass(PassBase):
    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        return PassResult(graph_module, drop_mul(graph_module))


class LyingPass(PassBase):
    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        drop_mul(graph_module)
        return PassResult(graph_module, False)


def returns_graph(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    drop_mul(gm)
    return gm


def returns_nothing(gm: torch.fx.GraphModule) -> None:
    drop_mul(gm)


def returns_new_module(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    drop_mul(gm)
    return torch.fx.GraphModule(gm, gm.graph)


@pytest.mark.parametrize("item", [TorchPass(), returns_graph, returns_nothing, returns_new_module])
def test_foreign_passes_are_taken_over(gm: fxopt.CapturedModule, item: Any) -> None:
    before = fingerprint(gm)
    out = fxopt.PassManager([item], strict=True).run(gm)
    (step,) = out.report.steps
    assert step.status == "changed"
    assert step.name == getattr(item, "__name__", "TorchPass")
    assert {(change.kind, change.node) for change in step.changes} >= {("erased", "mul")}
    assert [node for node in out.graph.nodes if node.target is aten.mul.Tensor] == []
    assert fingerprint(gm) == before
    assert all("val" in node.meta for node in out.graph.nodes if node.op != "output")
    for batch in (1, 3):
        x = torch.randn(batch, 6)
        assert torch.equal(out(x), gm(x))
    with pytest.raises(fxopt.InputError):
        out(torch.randn(3, 7))


def test_a_lying_pass_is_left_out(gm: fxopt.CapturedModule) -> None:
    out = fxopt.PassManager([LyingPass()]).run(gm)
    (step,) = out.report.steps
    assert step.status == "failed"
    assert "LyingPass reports no change and made" in step.rolled_back[0].why
    assert fxopt.graph_text(out) == fxopt.graph_text(gm)
    with pytest.raises(fxopt.PassError, match="LyingPass reports no change"):
        fxopt.PassManager([LyingPass()], strict=True).run(gm)


def no_change(gm: torch.fx.GraphModule) -> None:
    pass


def wrong_number(gm: torch.fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.target is aten.add.Tensor:
            node.args = (node.args[0], 0.6)
    gm.recompile()


def wider(gm: torch.fx.GraphModule) -> None:
    output = gm.graph.output_node()
    (node,) = output.args[0]
    with gm.graph.inserting_before(output):
        double = gm.graph.call_function(aten.to.dtype, (node, torch.float64))
    output.args = ((double,),)
    gm.recompile()


def returns_text(gm: torch.fx.GraphModule) -> str:
    return "done"


def calls_python(gm: torch.fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.target is aten.mul.Tensor:
            node.target = torch.mul
    gm.recompile()


def in_place(gm: torch.fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.target is aten.mul.Tensor:
            node.target = aten.mul_.Tensor
    gm.recompile()


def another_output(gm: torch.fx.GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = ((*output.args[0], *output.args[0]),)
    gm.recompile()


@pytest.mark.parametrize(
    ("item", "status", "message"),
    [
        (wrong_number, "rolled back", "exceeds the ROUNDING bound"),
        (wider, "rolled back", "dtype changed from torch.float32 to torch.float64"),
        (returns_text, "failed", "returns_text returned a str; wanted a GraphModule, a PassResult or None"),
        (in_place, "failed", "mul: writes in place (aten.mul_.Tensor)"),
        (another_output, "failed", "the graph returns 2 values, and returned 1"),
    ],
)
def test_bad_foreign_passes(gm: fxopt.CapturedModule, item: Any, status: str, message: str) -> None:
    out = fxopt.PassManager([item, returns_nothing]).run(gm)
    first, second = out.report.steps
    assert (first.status, second.status) == (status, "changed")
    assert message in first.rolled_back[0].why
    x = torch.randn(3, 6)
    assert torch.equal(out(x), gm(x))


def test_a_promise_of_the_function_counts(gm: fxopt.CapturedModule) -> None:
    def lossy(gm: torch.fx.GraphModule) -> None:
        wrong_number(gm)

    lossy.contract = fxopt.Contract.lossy("max_abs", 0.2)
    out = fxopt.PassManager([lossy], strict=True).run(gm)
    assert out.report.contract == "LOSSY(max_abs <= 0.2)"
    assert out.report.steps[0].errors[0].max_abs == pytest.approx(0.1, abs=1e-6)


def test_what_is_no_pass_is_refused() -> None:
    with pytest.raises(TypeError, match="3 is not a pass"):
        fxopt.PassManager([3])
    with pytest.raises(fxopt.PassError, match="no-such-pass"):
        fxopt.PassManager("no-such-pass")
    with pytest.raises(ValueError, match="check is 'some'"):
        fxopt.PassManager([], check="some")


def test_the_report_tells_everything(gm: fxopt.CapturedModule, tmp_path: pathlib.Path) -> None:
    told: list[tuple[int, int, str]] = []
    passes = [no_change, returns_nothing, wrong_number, returns_text]
    manager = fxopt.PassManager(passes, keep_texts=True, progress=lambda *now: told.append(now))
    report = manager.run(gm).report
    assert [step.status for step in report.steps] == ["unchanged", "changed", "rolled back", "failed"]
    assert [(index, count) for index, count, _ in told] == [(i, 4) for i in range(4)]
    unchanged, changed, undone, failed = report.steps
    assert unchanged.changes == () == unchanged.errors
    assert unchanged.nodes == (5, 5)
    assert changed.nodes == (5, 4)
    assert undone.nodes == failed.nodes == (4, 4)
    assert changed.checked == 4, "the sample, and batch = 1, 2, 3"
    assert [(e.output, e.max_abs) for e in changed.errors] == [("output", 0.0)]
    assert "mul" in unchanged.graph_text
    assert "mul" not in changed.graph_text
    assert report.contract == "ROUNDING"
    assert report.seconds >= 0
    table = str(report).splitlines()
    assert len([line for line in table if line.startswith(tuple(step.name for step in report.steps))]) == 4
    assert "erased" in report.details()


def test_the_report_is_plain_json(gm: fxopt.CapturedModule) -> None:
    report = fxopt.PassManager([returns_nothing, wrong_number, returns_text]).run(gm).report
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    back = Report.from_dict(plain)
    assert back == report
    assert json.loads(report.to_json()) == plain
    assert plain["steps"][0]["errors"][0]["sqnr_db"] == "inf"


def test_graphs_inside_have_no_value_to_be_found() -> None:
    def halved(x: Tensor) -> Tensor:
        while x.norm() > 1:
            x = x * 0.5
        return x * 1.0

    def forgets_values(gm: torch.fx.GraphModule) -> None:
        drop_mul(gm)
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                node.meta.pop("val", None)

    x = torch.randn(4, 6)
    looping = fxopt.capture(halved, (x,))
    new = fxopt.optimize(looping, passes=[forgets_values], strict=True)
    assert len(new.graph.nodes) < len(looping.graph.nodes)
    assert torch.equal(new(x), halved(x))
