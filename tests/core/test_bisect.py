"""A planted bad rewrite is found, whichever it is, in few runs of the check."""

import dataclasses
import math
import random
import runpy
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt.contracts import Contract
from fxopt.errors import PassError

aten = torch.ops.aten
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) + 1


class Chain(nn.Module):
    """Many ReLUs and sums, so that every one of them matters."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.length):
            x = torch.relu(x) + 0.25
        return x


@dataclasses.dataclass(frozen=True)
class Clamp(fxopt.Pass):
    """Replace ReLU by a clamp at 0, and at one place by another one."""

    name: ClassVar[str] = "clamp"
    wrong: str = ""

    def run(self, rw):
        for node in rw.calls(aten.relu.default):
            low = 1000.0 if node.name == self.wrong else 0.0
            rw.replace_call(node, aten.clamp_min.default, (node.args[0], low), why="a clamp")


@dataclasses.dataclass(frozen=True)
class Subtract(fxopt.Pass):
    """Replace a sum by a difference with the negative number, and at one place forget the sign."""

    name: ClassVar[str] = "subtract"
    wrong: str = ""

    def run(self, rw):
        for node in rw.calls(aten.add.Tensor):
            sign = 1 if node.name == self.wrong else -1
            rw.replace_call(node, aten.sub.Tensor, (node.args[0], sign * node.args[1]), why="a difference")


@dataclasses.dataclass(frozen=True)
class Together(fxopt.Pass):
    """Add 0.001 at every place, which is too much from the tenth place on."""

    name: ClassVar[str] = "together"

    def run(self, rw):
        for node in rw.calls(aten.relu.default):
            new = rw.insert_call(aten.add.Tensor, (node.args[0], 0.001), before=node, why="a little")
            rw.replace_argument(node, node.args[0], new, why="a little")


@dataclasses.dataclass(frozen=True)
class Whole(Clamp):
    name: ClassVar[str] = "whole"
    divisible: ClassVar[bool] = False


def captured(length: int) -> fxopt.CapturedModule:
    return fxopt.capture(Chain(length).eval(), (X,))


def names(gm, target):
    return [node.name for node in gm.graph.nodes if node.target is target]


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_each_of_many_planted_rewrites_is_found_in_few_runs(count):
    gm = captured(40)
    relus, sums = names(gm, aten.relu.default), names(gm, aten.add.Tensor)
    draw = random.Random(0)
    most = math.ceil(math.log2(80)) + 3
    for _ in range(count):
        wrong = draw.choice(relus + sums)
        found = fxopt.bisect(gm, [Clamp(wrong=wrong), Subtract(wrong=wrong)])
        assert (found.item.name, found.site) == ("clamp" if wrong in relus else "subtract", wrong)
        assert found.alone is not False
        assert found.runs <= most


def test_before_is_good_and_after_is_bad():
    gm = captured(8)
    wrong = names(gm, aten.relu.default)[5]
    found = fxopt.bisect(gm, [Subtract(), Clamp(wrong=wrong)])
    want = gm(X)
    assert torch.allclose(found.before(X), want)
    assert not torch.allclose(found.after(X), want)
    assert len(names(found.after, aten.clamp_min.default)) == 6
    assert [(change.kind, change.why) for change in found.changes] == [("replaced", "a clamp")]
    assert "test_bisect.py" in str(found)
    assert "found among 16 rewrites" in str(found)


def test_a_users_check_may_return_false_or_raise():
    gm = captured(8)
    wrong = names(gm, aten.relu.default)[3]
    want = gm(X)

    def raises(candidate):
        torch.testing.assert_close(candidate(X), want)

    for check in (raises, lambda candidate: torch.allclose(candidate(X), want)):
        assert fxopt.bisect(gm, [Clamp(wrong=wrong)], check).site == wrong


def test_a_contract_says_how_much_is_too_much():
    gm = captured(16)
    found = fxopt.bisect(gm, [Together()], Contract.lossy("max_abs", 0.0095))
    assert found.site == names(gm, aten.relu.default)[9]
    assert found.alone is False
    assert "only together" in str(found)


def test_a_pass_that_cannot_be_divided_is_named_as_a_whole():
    gm = captured(4)
    found = fxopt.bisect(gm, [Subtract(), Whole(wrong=names(gm, aten.relu.default)[0])])
    assert (found.item.name, found.site, found.step) == ("whole", "", 1)


def test_what_reproduces_it_runs_by_itself(tmp_path, capsys):
    gm = captured(4)
    script = fxopt.bisect(gm, [Clamp(wrong=names(gm, aten.relu.default)[1])]).save(tmp_path / "repro")
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(str(script))
    assert "max_abs=999.75" in capsys.readouterr().out
    assert "clamp{wrong=" in script.read_text()
    made = {"before.fxopt", "after.fxopt", "before.pt2", "after.pt2", "inputs.pt", "repro.py"}
    assert {path.name for path in script.parent.iterdir()} == made


def test_nothing_to_find_is_refused():
    with pytest.raises(PassError, match="the check is good after the last pass"):
        fxopt.bisect(captured(4), [Clamp()])


def test_a_check_that_is_bad_from_the_start_is_refused():
    with pytest.raises(PassError, match="bad before the first pass"):
        fxopt.bisect(captured(4), [Clamp()], lambda gm: False)
