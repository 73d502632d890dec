"""A graph for networkx: its nodes, edges and counts against the graph, eager PyTorch and formulas."""

import math

import networkx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.node_costs import NodeCosts


class Branched(nn.Module):
    """A wide way and a narrow one between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.narrow, self.last = (
            nn.Linear(6, 8), nn.Linear(8, 64), nn.Linear(8, 2), nn.Linear(66, 3),
        )  # fmt: skip

    def forward(self, x):
        y = self.first(x)
        return self.last(torch.cat([self.wide(y).relu(), self.narrow(y).sigmoid()], 1))


@pytest.fixture(scope="module")
def gm():
    return fxopt.capture(Branched().eval(), (torch.randn(5, 6),), dynamic_shapes={"x": {0: "batch"}})


@pytest.fixture(scope="module")
def graph(gm):
    return fxopt.to_networkx(gm)


def test_nodes_and_edges_are_those_of_the_graph(gm, graph):
    assert list(graph) == [node.name for node in gm.graph.nodes]
    edges = {(source.name, node.name) for node in gm.graph.nodes for source in node.all_input_nodes}
    assert set(graph.edges) == edges


def test_attributes_tell_type_module_and_line(graph):
    held = graph.nodes["linear_1"]
    assert held["target"] == "aten.linear.default"
    assert (held["type"], held["shape"], held["dtype"]) == ("f32[batch, 64]", ("batch", 64), torch.float32)
    assert held["module"] == "wide"
    assert "self.wide(y).relu()" in held["source"]
    assert held["pass_name"] is None


def test_edges_name_the_arguments(graph):
    assert graph.edges["relu", "cat"]["arguments"] == ("tensors[0]",)
    assert graph.edges["sigmoid", "cat"]["arguments"] == ("tensors[1]",)
    assert graph.edges["wide_weight", "linear_1"]["arguments"] == ("weight",)
    squared = fxopt.to_networkx(fxopt.capture(lambda x: x * x, (torch.randn(2),)))
    assert next(held["arguments"] for _, _, held in squared.edges(data=True)) == ("self", "other")


def test_bytes_are_those_that_the_run_yields(gm, graph):
    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                assert graph.nodes[n.name]["bytes"] == result.numel() * result.element_size(), n
            return result

    Recorder(gm).run(*gm.samples[0].args)


def test_the_critical_path_goes_through_the_wide_layer(graph):
    assert networkx.dag_longest_path(graph, weight="macs") == ["x", "linear", "linear_1", "relu", "cat", "linear_3"]
    assert networkx.dag_longest_path_length(graph, weight="macs") == 5 * (6 * 8 + 8 * 64 + 66 * 3)


def test_dominators_are_what_every_way_goes_through(graph):
    dominators = networkx.immediate_dominators(graph, "x")
    assert dominators["cat"] == "linear"
    assert dominators["output"] == "linear_3"


def test_the_smallest_cut_is_where_the_least_data_crosses(graph):
    size, (before, _) = networkx.minimum_cut(graph, "x", "output", capacity="bytes")
    assert size == 5 * 3 * 4
    assert "linear_3" in before


def test_a_node_made_by_a_pass_names_it(gm):
    folded = fxopt.optimize(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval(),
        "fold-batch-norm",
        (torch.randn(1, 3, 6, 6),),
    )
    assert fxopt.to_networkx(folded).nodes["_0_bias"]["pass_name"] == "fold-batch-norm"


def test_any_graph_module_is_taken_and_what_is_unknown_is_none():
    graph = fxopt.to_networkx(torch.fx.symbolic_trace(Branched()))
    assert graph.nodes["first"] | {"target": "first"} == graph.nodes["first"]
    assert (graph.nodes["first"]["bytes"], graph.nodes["first"]["macs"]) == (None, None)
    assert "bytes" not in graph.edges["first", "wide"]


def attention(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(
    ("net", "shapes", "wanted"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), [(2, 4, 9, 7)], 2 * 6 * 4 * 3 * (2 * 9)),
        (nn.Conv1d(4, 6, 3), [(2, 4, 9)], 2 * 6 * 7 * (4 * 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), [(2, 4, 5, 5)], 2 * 4 * 5 * 5 * 6 * 9),
        (lambda a, b: torch.matmul(a, b), [(3, 1, 4, 5), (2, 5, 6)], 3 * 2 * 4 * 6 * 5),
        (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [(2, 3, 4), (2, 5, 4)], 2 * 3 * 4 * 5),
        (lambda a, b: torch.mv(a, b), [(3, 7), (7,)], 21),
        (lambda a, b: torch.dot(a, b), [(7,), (7,)], 7),
        (attention, [(2, 4, 8, 16), (2, 4, 10, 16), (2, 4, 10, 16)], 2 * 4 * 8 * 10 * 32),
        (nn.LSTM(4, 5), [(7, 2, 4)], 7 * 2 * 20 * (4 + 5)),
    ],
    ids=["conv2d", "conv1d", "transposed", "matmul", "einsum", "mv", "dot", "attention", "lstm"],
)  # fmt: skip
def test_macs_are_those_of_the_formula(net, shapes, wanted):
    gm = fxopt.capture(net, tuple(torch.randn(*shape) for shape in shapes))
    costs = NodeCosts(gm)
    assert sum(costs.macs(node) or 0 for node in gm.graph.nodes) == wanted


def test_sizes_that_depend_on_values_give_no_count():
    gm = fxopt.capture(lambda x: x[x > 0] @ x[x > 0], (torch.tensor([1.0, -1.0, 2.0]),))
    graph = fxopt.to_networkx(gm)
    assert all(held["bytes"] is None for name, held in graph.nodes(data=True) if name.startswith("index"))
    assert math.prod(graph.nodes["x"]["shape"]) == 3
