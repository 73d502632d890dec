"""Bad passes are caught, each with its own message, and undone; the graph that comes out is right."""

import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.checks import fingerprint
from fxopt.manager import guilty_sites

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.lin(x))
        z = torch.sigmoid(y) + 0.5
        return torch.relu(z - 0.75) * 2.0


@pytest.fixture
def gm() -> fxopt.CapturedModule:
    return fxopt.capture(Net().eval(), (torch.randn(4, 6),), dynamic_shapes={"x": {0: "batch"}})


@dataclasses.dataclass(frozen=True)
class WrongConstant(fxopt.Pass):
    name: ClassVar[str] = "wrong-constant"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.add.Tensor):
            rw.replace_call(node, aten.add.Tensor, (node.args[0], 0.5001), why="nearly a half")


@dataclasses.dataclass(frozen=True)
class DropsNode(fxopt.Pass):
    name: ClassVar[str] = "drops-node"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.sigmoid.default):
            rw.replace_value(node, node.args[0], why="looks idle")


@dataclasses.dataclass(frozen=True)
class ChangesDtype(fxopt.Pass):
    name: ClassVar[str] = "changes-dtype"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.sigmoid.default):
            half = rw.insert_call(aten.to.dtype, (node.args[0], torch.float16), before=node, why="smaller")
            rw.replace_call(node, aten.sigmoid.default, (half,), why="smaller")


@dataclasses.dataclass(frozen=True)
class Unreported(fxopt.Pass):
    name: ClassVar[str] = "unreported"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.add.Tensor):
            node.args = (node.args[0], 0.7)
        rw.gm.recompile()


@dataclasses.dataclass(frozen=True)
class WrongOnBatchOne(fxopt.Pass):
    """Adds zero times the variance over the rows, which is not defined for a single row."""

    name: ClassVar[str] = "wrong-on-batch-one"
    contract: ClassVar[fxopt.Contract] = fxopt.Contract.ROUNDING

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.sigmoid.default):
            var = rw.insert_call(aten.var.correction, (node.args[0], [0]), before=node, why="one", sources=[node])
            zero = rw.insert_call(aten.mul.Tensor, (var, 0.0), before=node, why="one", sources=[node])
            total = rw.insert_call(aten.add.Tensor, (node.args[0], zero), before=node, why="one", sources=[node])
            rw.replace_call(node, aten.sigmoid.default, (total,), why="one")


@dataclasses.dataclass(frozen=True)
class MakesNan(fxopt.Pass):
    name: ClassVar[str] = "makes-nan"
    contract: ClassVar[fxopt.Contract] = fxopt.Contract.lossy("sqnr_db", -1000)

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.add.Tensor):
            rw.replace_call(node, aten.mul.Tensor, (node.args[0], math.nan), why="not a number")


@dataclasses.dataclass(frozen=True)
class Raises(fxopt.Pass):
    name: ClassVar[str] = "raises"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.sigmoid.default):
            rw.replace_value(node, node.args[0], why="half way")
            raise ZeroDivisionError("the pass itself is broken")


@dataclasses.dataclass(frozen=True)
class DropsSomeRelu(fxopt.Pass):
    """Right where nothing negative comes in, wrong elsewhere."""

    name: ClassVar[str] = "drops-relu"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.relu.default):
            rw.replace_value(node, node.args[0], why="idle")


BAD: list[tuple[type[fxopt.Pass], str, str]] = [
    (WrongConstant, "rolled back", "elements differ, by up to 0.0002"),
    (DropsNode, "rolled back", "(looks idle) at test_manager.py:"),
    (ChangesDtype, "failed", "changes-dtype replaces sigmoid by a value of another type"),
    (Unreported, "failed", "unreported changed the graph without a record of it"),
    (WrongOnBatchOne, "rolled back", "on batch = 1: output 'output': 6 of 6 elements became NaN"),
    (MakesNan, "rolled back", "24 of 24 elements became NaN"),
    (Raises, "failed", "ZeroDivisionError: the pass itself is broken"),
]
quiet = pytest.mark.filterwarnings("ignore:var.*degrees of freedom is <= 0:UserWarning")


@quiet
@pytest.mark.parametrize(("bad", "status", "message"), BAD, ids=lambda item: getattr(item, "name", None))
def test_a_bad_pass_is_undone_and_says_why(
    gm: fxopt.CapturedModule, bad: type[fxopt.Pass], status: str, message: str
) -> None:
    before = fingerprint(gm)
    out = fxopt.PassManager([bad()]).run(gm)
    (step,) = out.report.steps
    assert step.status == status
    (undone,) = step.rolled_back
    assert message in undone.why
    assert message in str(out.report)
    assert step.changes == ()
    assert fingerprint(gm) == before, "the graph that went in is left alone"
    assert fxopt.graph_text(out) == fxopt.graph_text(gm)
    x = torch.randn(3, 6)
    assert torch.equal(out(x), gm(x))


@quiet
@pytest.mark.parametrize(("bad", "status", "message"), BAD, ids=lambda item: getattr(item, "name", None))
def test_strict_raises(gm: fxopt.CapturedModule, bad: type[fxopt.Pass], status: str, message: str) -> None:
    wanted = fxopt.ContractError if status == "rolled back" else ZeroDivisionError if bad is Raises else fxopt.PassError
    with pytest.raises(wanted) as caught:
        fxopt.PassManager([bad()], strict=True).run(gm)
    assert message.removeprefix("ZeroDivisionError: ") in str(caught.value)
    assert caught.value.__notes__ == [f"in pass {bad.name}, step 1 of 1"]


def three_relu(x: Tensor) -> Tensor:
    return torch.relu(torch.sigmoid(torch.relu(x))) + torch.relu(x - 0.5)


def test_only_the_guilty_sites_are_undone() -> None:
    gm = fxopt.capture(three_relu, (torch.randn(4, 6),))
    out = fxopt.PassManager([DropsSomeRelu()]).run(gm)
    (step,) = out.report.steps
    assert step.status == "partly rolled back"
    (undone,) = step.rolled_back
    assert sorted(undone.sites) == ["relu", "relu_2"]
    assert [change.site for change in step.changes] == ["relu_1"]
    assert [node.name for node in out.graph.nodes if node.target is aten.relu.default] == ["relu", "relu_2"]
    assert "undone at relu" in str(out.report)
    x = torch.randn(4, 6)
    assert torch.equal(out(x), gm(x))


@dataclasses.dataclass(frozen=True)
class DropsSomeOperands(fxopt.Pass):
    """Takes relu away from each operand of a concatenation, each a part of its site."""

    name: ClassVar[str] = "drops-operands"
    remedy: ClassVar[str] = "operands that are never negative"

    def run(self, rw: fxopt.Rewriter) -> None:
        done = 0
        for node in rw.calls(aten.cat.default):
            for place, operand in enumerate(node.args[0]):
                with rw.part(place) as chosen:
                    if chosen:
                        rw.replace_argument(node, operand, operand.args[0], why="idle")
                        done += 1
        rw.notes.append(f"{done} are idle")


def test_only_the_guilty_parts_of_a_site_are_undone() -> None:
    gm = fxopt.capture(lambda x: torch.cat([x.sigmoid().relu(), x.relu(), x.exp().relu()]), (torch.randn(4, 6),))
    out = fxopt.PassManager([DropsSomeOperands()]).run(gm)
    (step,) = out.report.steps
    assert step.status == "partly rolled back"
    assert step.rolled_back[0].sites == ("cat[1]",)
    assert [change.site for change in step.changes] == ["cat[0]", "cat[2]"]
    assert [node.target for node in out.graph.nodes].count(aten.relu.default) == 1
    x = torch.randn(4, 6)
    assert torch.equal(out(x), gm(x))
    assert DropsSomeOperands()(gm, only=["cat"]).notes == ("3 are idle",)
    assert DropsSomeOperands()(gm, only=["cat[2]"]).notes == ("1 are idle",)


def test_a_note_claims_nothing_that_was_undone() -> None:
    def optimized(function: Any) -> Any:
        return fxopt.optimize(function, [DropsSomeOperands()], (torch.randn(4, 6),)).report.steps[0]

    assert optimized(lambda x: torch.cat([x.exp().relu(), x.sigmoid().relu()])).notes == ("2 are idle",)
    assert optimized(lambda x: torch.cat([x.exp().relu(), x.relu()])).notes == ("1 are idle",)
    undone = optimized(lambda x: torch.cat([x.sin().relu(), x.relu()]))
    assert undone.status == "rolled back"
    assert undone.notes == ("before it was undone: 2 are idle",)


def test_a_pass_that_is_undone_says_what_to_try() -> None:
    undone = fxopt.optimize(lambda x: torch.cat([x.relu()]), [DropsSomeOperands()], (torch.randn(4, 6),))
    assert "try      operands that are never negative" in str(undone.report)
    assert "try " not in str(fxopt.optimize(three_relu, [DropsSomeRelu()], (torch.randn(4, 6),)).report)


def test_a_bad_pass_between_good_ones(gm: fxopt.CapturedModule) -> None:
    out = fxopt.PassManager([TimesOne(), WrongConstant(), TimesOne()]).run(gm)
    assert [step.status for step in out.report.steps] == ["changed", "rolled back", "changed"]
    x = torch.randn(3, 6)
    assert torch.equal(out(x), gm(x))
    assert out.report.contract == "EXACT"


@dataclasses.dataclass(frozen=True)
class TimesOne(fxopt.Pass):
    """Multiplies by one: exact, and a change each time."""

    name: ClassVar[str] = "times-one"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(aten.sigmoid.default):
            one = rw.insert_call(aten.mul.Tensor, (node.args[0], 1.0), before=node, why="by one", sources=[node])
            rw.replace_call(node, aten.sigmoid.default, (one,), why="by one")


@pytest.mark.parametrize("guilty", [[0], [6], [0, 6], [2, 3], [1, 4, 5], []])
def test_guilty_sites_are_found_whichever_they_are(guilty: list[int]) -> None:
    sites = [f"s{i}" for i in range(7)]
    wrong = {f"s{i}" for i in guilty}
    assert set(guilty_sites(sites, lambda chosen: wrong.isdisjoint(chosen))) == wrong


def make(label: str, **facts: Any) -> fxopt.Pass:
    body = {"name": label, "run": lambda self, rw: None} | {key: frozenset(value) for key, value in facts.items()}
    return dataclasses.dataclass(frozen=True)(type(label, (fxopt.Pass,), body))()


def test_the_order_is_checked_before_anything_runs() -> None:
    quantize, fuse, give = (
        make("quantize", ends={"no-qdq"}),
        make("fuse", needs={"no-qdq"}),
        make("give", gives={"plan"}),
    )
    use = make("use", needs={"plan"})
    with pytest.raises(fxopt.PassOrderError) as caught:
        fxopt.PassManager([quantize, fuse])
    wanted = "fuse (step 2) needs 'no-qdq', but quantize (step 1) ended it; move fuse before step 1"
    assert str(caught.value) == wanted
    with pytest.raises(fxopt.PassOrderError, match=r"use \(step 1\) needs 'plan', .*; move it behind give \(step 2\)"):
        fxopt.PassManager([use, give])
    with pytest.raises(fxopt.PassOrderError, match="no pass of the list gives it"):
        fxopt.PassManager([use])
    fxopt.PassManager([fuse, quantize])
    fxopt.PassManager([give, use])
    fxopt.PassManager([quantize, make("dequantize", gives={"no-qdq"}), fuse])


@dataclasses.dataclass(frozen=True)
class Swap(fxopt.Pass):
    old: Any = None
    new: Any = None

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(self.old):
            rw.replace_call(node, self.new, node.args, why=f"better as {self.new}")


class SwapA(Swap):
    name: ClassVar[str] = "to-sigmoid"


class SwapB(Swap):
    name: ClassVar[str] = "to-expit"


def test_rules_that_undo_each_other_are_both_named(gm: fxopt.CapturedModule) -> None:
    expit, sigmoid = aten.special_expit.default, aten.sigmoid.default
    loop = fxopt.FixedPoint(passes=(SwapB(sigmoid, expit), SwapA(expit, sigmoid)), cap=3)
    with pytest.raises(fxopt.FixedPointError) as caught:
        loop(gm)
    text = str(caught.value)
    assert text.startswith("to-expit and to-sigmoid still change the graph after 3 rounds")
    assert "to-expit at sigmoid" in text
    out = fxopt.PassManager([loop]).run(gm)
    assert out.report.steps[0].status == "failed"
    assert fxopt.graph_text(out) == fxopt.graph_text(gm)


def test_a_fixed_point_that_settles(gm: fxopt.CapturedModule) -> None:
    loop = fxopt.FixedPoint(passes=(SwapB(aten.sigmoid.default, aten.special_expit.default),))
    out = fxopt.PassManager([loop], strict=True).run(gm)
    assert [change.pass_name for change in out.report.steps[0].changes] == ["to-expit"]
