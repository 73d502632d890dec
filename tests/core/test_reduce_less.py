"""Where less of a graph can be cut away, as much as it takes is kept, and a note says why."""

import dataclasses
from typing import ClassVar
from unittest.mock import ANY

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
import fxopt.reduce as fxopt_reduce
from fxopt.contracts import Contract
from fxopt.reduce import difference, reduce, size_in_nodes
from fxopt.repro import compare
from fxopt.subgraph import extract
from tests.core.planted import Spoil, bisected, check_is_minimal, graph_of, residual_net

aten = torch.ops.aten


@pytest.fixture(scope="module")
def resnet():
    return residual_net()


def test_at_an_output_alone():
    @dataclasses.dataclass(frozen=True)
    class Divert(fxopt.Pass):
        name: ClassVar[str] = "divert"

        def run(self, rw):
            for node in rw.calls(aten.cos.default):
                new = rw.insert_call(aten.sin.default, node.args, before=node, why="planted")
                rw.replace_value(node, new, why="planted")

    gm = graph_of(lambda x: torch.cos(torch.tanh(torch.exp(x))), torch.rand(3))
    cut = fxopt.bisect(gm, [Divert()]).reduced
    assert cut.note == "the difference shows only at an output"
    assert cut.nodes == 1


def test_in_training_alone():
    class Noisy(nn.Module):
        def forward(self, x):
            x = torch.tanh(F.dropout(torch.sigmoid(x), 0.5, self.training))
            return torch.sin(torch.exp(x) if self.training else x)

    gm = graph_of(Noisy, torch.rand(3, 4))
    exp = next(node.name for node in gm.graph.nodes if node.target is aten.exp.default)
    cut = bisected(gm, exp).reduced
    assert cut.note.startswith("the difference shows on sample 0 in train mode")
    assert cut.nodes < 4
    assert cut.after.modes == "train"


def test_both_graphs_draw_the_same_random_numbers():
    class Noisy(nn.Module):
        def forward(self, x):
            signs = (torch.sigmoid(x) > 0).float()
            return torch.exp(F.dropout(signs, 0.5, self.training))

    gm = graph_of(Noisy, torch.rand(3, 40)).train()
    cut = reduce(gm, Spoil(wrong=("sigmoid", "exp"))(gm).gm)
    assert (cut.value, [spec.name for spec in cut.after.inputs]) == ("exp", ["dropout"])


class Counting(nn.Module):
    """Keeps a running mean, and what it returns does not depend on it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        x = torch.sin(torch.exp(x))
        if self.training:
            self.mean.copy_(torch.tanh(self.mean * 0.9 + torch.cos(x).mean(0) * 0.1))
        return torch.sigmoid(x)


def state_after_a_step(gm):
    copy = gm.clone(copy_tensors=True).train()
    copy(*copy.samples[0].args)
    return copy.mean


def test_through_a_buffer_alone():
    gm = graph_of(Counting, torch.rand(3, 4))
    want = state_after_a_step(gm)
    cos = next(node.name for node in gm.graph.nodes if node.target is aten.cos.default)
    cut = bisected(gm, cos, lambda each: torch.allclose(state_after_a_step(each), want)).reduced
    assert cut.note.startswith(
        "the outputs agree on sample 0 in train mode, and what is written into a buffer does not"
    )
    assert cut.nodes < 8
    assert not any(node.target is aten.sigmoid.default for node in cut.after.graph.nodes)
    whole = cut.uncut()
    assert (whole.nodes, whole.contract, whole.note) == (cut.whole_nodes, None, cut.note)


def test_at_another_size_alone():
    @dataclasses.dataclass(frozen=True)
    class Guess(fxopt.Pass):
        name: ClassVar[str] = "guess"

        def run(self, rw):
            for node in rw.calls(aten.exp.default):  # right for 4 rows
                total = rw.insert_call(aten.sum.default, (node.args[0],), before=node, why="planted")
                mean = rw.insert_call(aten.mean.default, (node.args[0],), before=node, why="planted")
                less = rw.insert_call(aten.sub.Tensor, (total, mean), {"alpha": 20}, before=node, why="planted")
                new = rw.insert_call(aten.exp.default, node.args, before=node, why="planted")
                rw.replace_call(node, aten.add.Tensor, (new, less), why="planted")

    gm = graph_of(lambda x: torch.sin(torch.exp(torch.tanh(x))), torch.ones(4, 5), dynamic=({0: "n"},))
    cut = fxopt.bisect(gm, [Guess()]).reduced
    assert cut.note == "the difference shows on n = 1"
    assert cut.before.samples[0].args[0].shape[0] == 1
    assert cut.value == "exp"


def test_a_check_that_counts_nodes_gets_the_whole_graphs(resnet, tmp_path):
    before = size_in_nodes(resnet)
    found = bisected(resnet, "relu_4", lambda gm: size_in_nodes(gm) <= before, factor=1.0)
    assert found.reduced.nodes == found.reduced.whole_nodes == before + 1
    assert "only the check that was given tells them apart" in found.reduced.note
    assert "only the check that was given" in found.save(tmp_path).read_text()
    assert compare(found.before, found.after, Contract.ROUNDING) == (ANY, False)


def test_a_check_that_looks_at_the_numbers_is_cut(resnet):
    want = resnet(*resnet.samples[0].args)
    check_is_minimal(bisected(resnet, "relu_4", lambda gm: torch.allclose(gm(*gm.samples[0].args), want)))


def test_a_contract_decides_where_it_ends():
    gm = graph_of(lambda x: torch.exp(torch.exp(torch.relu(torch.cos(x)) * 8.0) * 0.001), torch.linspace(0, 0.1, 9))
    found = bisected(gm, "relu", Contract.lossy("max_abs", 1.0))
    assert found.reduced.value == "exp"  # the relu itself is 0.01 off
    assert found.reduced.contract == Contract.lossy("max_abs", 1.0)


def test_the_last_of_many_small_errors_is_shown_by_rounding():
    def forward(x):
        for _ in range(12):
            x = torch.relu(x) + 0.5
        return x

    gm = graph_of(forward, torch.ones(3))
    relus = tuple(node.name for node in gm.graph.nodes if node.target is aten.relu.default)
    found = fxopt.bisect(gm, [Spoil(wrong=relus, factor=1.0001)], Contract.lossy("max_abs", 0.001))
    assert "alone, this rewrite keeps LOSSY(max_abs <= 0.001)" in found.reduced.note
    assert found.reduced.value == found.site
    assert found.reduced.nodes == 2


def test_a_pass_that_changes_many_places_is_shown_at_the_first(resnet):
    @dataclasses.dataclass(frozen=True)
    class Everywhere(Spoil):
        name: ClassVar[str] = "everywhere"
        divisible: ClassVar[bool] = False

    cut = fxopt.bisect(resnet, [Everywhere(wrong=("relu_2", "relu_5", "relu_8"))]).reduced
    assert (cut.value, cut.nodes) == ("relu_2", 2)
    assert "more is rewritten outside this part: " in cut.note


def test_a_graph_that_cannot_run_is_cut_before_the_failure():
    @dataclasses.dataclass(frozen=True)
    class Guarded(fxopt.Pass):
        name: ClassVar[str] = "guarded"

        def run(self, rw):
            for node in rw.calls(aten.cos.default):
                index = rw.insert_call(aten.full.default, ([1], 7), {"dtype": torch.int64}, before=node, why="planted")
                args = (node.args[0], 0, index)
                rw.replace_call(node, aten.index_select.default, args, why="planted")

    gm = graph_of(lambda x: torch.sin(torch.cos(torch.tanh(torch.exp(x)))), torch.rand(1, 3))
    found = fxopt.bisect(gm, [Guarded()])
    assert found.reduced.note == "the graph after the rewrite cannot run"
    assert (found.reduced.value, found.reduced.nodes) == ("cos", 2)
    text, differs = compare(found.reduced.before, found.reduced.after, Contract.ROUNDING)
    assert differs
    assert "the rewritten graph cannot run" in text


def test_other_inputs_leave_the_graphs_whole():
    @dataclasses.dataclass(frozen=True)
    class Widen(fxopt.Pass):
        name: ClassVar[str] = "widen"

        def run(self, rw):
            for node in rw.calls(aten.cos.default):
                new = rw.add_argument("more", node.meta["val"], [torch.ones(3)], why="planted")
                rw.replace_call(node, aten.add.Tensor, (node.args[0], new), why="planted")

    found = fxopt.bisect(graph_of(lambda x: torch.cos(torch.exp(x)), torch.rand(3)), [Widen()])
    assert "the graphs have other inputs, and are whole" in found.reduced.note
    assert found.reduced.nodes == found.reduced.whole_nodes


def test_a_malformed_graph_stays_whole():
    @dataclasses.dataclass(frozen=True)
    class Tangle(fxopt.Pass):
        name: ClassVar[str] = "tangle"

        def run(self, rw):
            for node in rw.calls(aten.cos.default):
                new = rw.insert_call(aten.sin.default, node.args, before=node.next, why="planted")
                rw.replace_argument(node, node.args[0], new, why="planted")

    cut = fxopt.bisect(graph_of(lambda x: torch.cos(torch.exp(x)), torch.rand(3)), [Tangle()]).reduced
    assert cut.note == "the graph after it is malformed"
    assert "cos: reads sin" in cut.problem


def test_a_program_that_the_model_refuses_is_no_difference_of_state():
    class Normed(Counting):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return super().forward(self.norm(x))

    gm = graph_of(Normed, torch.rand(3, 4), dynamic=({0: "n"},))  # batch norm trains on no single row
    cut = bisected(gm, "exp", lambda each: size_in_nodes(each) <= size_in_nodes(gm), factor=1.0).reduced
    assert "only the check that was given tells them apart" in cut.note


@pytest.mark.parametrize("fault", ["no difference", "another failure"])
def test_a_part_that_does_not_show_it_is_never_taken(monkeypatch, fault):
    gm = graph_of(lambda x: torch.tanh(torch.cos(torch.exp(x))), torch.rand(3))
    after = Spoil(wrong=("cos",))(gm).gm
    assert reduce(gm, after).nodes == 2

    def spoiled(whole, values, members, end):
        part = extract(whole, values, members, end)
        for node in part.graph.nodes:
            if node.target is aten.mul.Tensor:
                node.args = (node.args[0], 1.0) if fault == "no difference" else (node.args[0], "text")
        part.recompile()
        return part

    monkeypatch.setattr(fxopt_reduce, "extract", spoiled)
    cut = reduce(gm, after)
    assert (cut.nodes, cut.note) == (cut.whole_nodes, "no part shows the difference, the graphs are whole")
    assert difference(cut.before, cut.after, Contract.ROUNDING) == cut.problem


def test_equal_graphs_stay_whole(resnet):
    cut = reduce(resnet, resnet.clone())
    assert (cut.contract, cut.problem, cut.nodes) == (None, "", cut.whole_nodes)
