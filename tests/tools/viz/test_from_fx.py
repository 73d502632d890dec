"""A torch.fx graph becomes a description that says what the graph says."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt.tools.viz import fx_graph
from fxopt.tools.viz.weights import describe_tensor
from tests.models.vision import ConvBnRelu


@pytest.fixture(scope="module")
def gm():
    net = ConvBnRelu().eval()
    return fxopt.capture(net, (torch.randn(2, 4, 9, 7),))


def test_nodes_and_edges_are_those_of_the_graph_without_weights(gm):
    graph = fx_graph(gm)
    kept = [node for node in gm.graph.nodes if node.op != "get_attr"]
    assert [node.id for node in graph.nodes] == [node.name for node in kept]
    edges = [(s.name, node.name) for node in kept for s in node.all_input_nodes if s.op != "get_attr"]
    assert sorted(set(graph.edges())) == sorted(edges)


def test_weights_stand_with_their_readers(gm):
    shown = {(node.id, weight.name) for node in fx_graph(gm).nodes for weight in node.weights}
    assert shown == {
        (user.name, node.target) for node in gm.graph.nodes if node.op == "get_attr" for user in node.users
    }


def test_a_node_tells_operator_modules_line_arguments_and_type(gm):
    node = fx_graph(gm).by_id()["conv2d"]
    assert (node.op, node.kind) == ("aten.conv2d", "layer")
    assert node.path == ("body (Sequential)", "body.0 (Conv2d)")
    assert "return self.body(x)" in node.line
    assert node.attributes == (("stride", "[2, 2]"), ("padding", "[1, 1]"))
    assert node.outputs == ("f32[2, 6, 5, 4]",)
    assert node.values["MACs"] == 2 * 6 * 5 * 4 * 4 * 9


def test_a_module_called_twice_is_two_groups():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

        def forward(self, x):
            return self.part(self.part(x).neg())

    graph = fx_graph(fxopt.capture(Twice(), (torch.randn(2, 3),)))
    assert list(dict.fromkeys(node.path[0] for node in graph.nodes if node.path)) == [
        "part (Sequential)", "part@1 (Sequential)",
    ]  # fmt: skip


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        if x.sum() > 0:
            x = x * self.scale
        while x.sum() < 10:
            x = x + 1
        return x


def test_branches_and_loops_are_groups_between_their_operands_and_the_node():
    graph = fx_graph(fxopt.capture(Branching(), (torch.randn(3),)))
    nodes = graph.by_id()
    inside = {node.path for node in graph.nodes if node.path}
    assert inside == {
        ("cond: true_graph_0",), ("cond: false_graph_0",),
        ("while_loop: while_cond_graph_0",), ("while_loop: while_body_graph_0",),
    }  # fmt: skip
    assert [edge.source for edge in nodes["true_graph_0/x"].inputs] == ["x"]
    assert "true_graph_0/mul" in {edge.source for edge in nodes["cond"].inputs}
    assert all(source in nodes for source, _ in graph.edges())
    assert {weight.name for node in graph.nodes if node.path for weight in node.weights} == {"scale"}


def test_modules_that_are_graphs_of_their_own_are_opened():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
    whole = fxopt.capture(net, (torch.randn(2, 3),))
    parts = fxopt.split_by_module(whole, "0")
    shown = fx_graph(parts)
    assert [node.op for node in shown.nodes if node.id.startswith("0/")] == ["input", "aten.linear", "aten.relu"]
    assert [edge.source for edge in shown.by_id()["_0"].inputs] == ["input_1", "0/relu"]
    assert all(source in shown.by_id() for source, _ in shown.edges())


def test_a_pass_is_named_with_its_reason():
    small = fxopt.optimize(ConvBnRelu().eval(), "quantize{recipe=fast}", (torch.randn(2, 4, 9, 7),), check="samples")
    node = next(node for node in fx_graph(small).nodes if node.op == "fxopt.quantize")
    assert node.pass_name == "quantize"
    made = {node.name: node.meta["fxopt"].sources for node in small.graph.nodes if "fxopt" in node.meta}
    assert made
    assert all(one.origins == made.get(one.id, (one.id,)) for one in fx_graph(small).nodes if made.get(one.id) != ())
    assert "as uint8, scale" in node.why


def test_any_graph_module_is_described_without_metadata():
    graph = fx_graph(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
    assert [(node.op, node.outputs) for node in graph.nodes] == [
        ("input", ()), ("Linear", ()), ("ReLU", ()), ("output", ()),
    ]  # fmt: skip


def test_describing_leaves_the_graph_alone(gm):
    before = copy.deepcopy(gm)
    fx_graph(gm)
    assert fxopt.graph_text(gm) == fxopt.graph_text(before)


def test_statistics_of_a_weight_are_those_of_numpy():
    tensor = torch.randn(50, 7)
    tensor[:3] = 0
    held, values = describe_tensor("w", "weight", tensor), tensor.numpy().astype(np.float64)
    assert (held.zeros, held.elements, held.bytes, held.type) == (21, 350, 1400, "f32[50, 7]")
    assert held.counts == tuple(np.histogram(values, 32, (values.min(), values.max()))[0])
    assert (held.low, held.high) == (values.min(), values.max())
    assert held.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
    assert held.deviation == pytest.approx(values.std(), rel=1e-5)


@pytest.mark.parametrize(
    ("tensor", "counted", "not_finite"),
    [
        (torch.tensor([1.0, torch.nan, torch.inf, 2.0]), 2, 2),
        (torch.full((3,), torch.nan), 0, 3),
        (torch.empty(0, 3), 0, 0),
        (torch.tensor(7), 1, 0),
        (torch.tensor([True, False]), 2, 0),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 2, 0),
        (torch.tensor([-3.4e38, 3.4e38]), 2, 0),
    ],
    ids=["nan and inf", "all nan", "empty", "scalar", "bool", "bfloat16", "whole range"],
)
def test_odd_weights_are_counted(tensor, counted, not_finite):
    held = describe_tensor("w", "weight", tensor)
    assert (sum(held.counts), held.not_finite) == (counted, not_finite)


def test_equal_values_have_one_digest():
    a, b = torch.randn(4), torch.randn(4)
    digest = [describe_tensor(name, "weight", held).digest for name, held in (("a", a), ("b", b), ("c", a.clone()))]
    assert digest[0] == digest[2] != digest[1]
