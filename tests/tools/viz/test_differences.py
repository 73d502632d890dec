"""What two graphs have that the other has not: matched by origin, whatever nodes are called."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.tools.viz.differences import compare
from fxopt.tools.viz.from_fx import fx_graph
from fxopt.tools.viz.model import Edge, Graph, Node


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.conv2(self.norm1(self.conv1(x)).relu())


@pytest.fixture(scope="module")
def report():
    net = Net().eval()
    example = (torch.randn(2, 3, 8, 8),)
    return fxopt.optimize(net, ["fold-batch-norm", "quantize"], example, keep_graphs=True, check="samples").report


def step(report, index):
    before, after = (fx_graph(report.graphs[at]) for at in (index, index + 1))
    return compare(before, after, {change.node: change.why for change in report.steps[index].changes})


def by_status(found, status):
    return {node: found.differences[node] for node in found.differences if found.differences[node].status == status}


def test_a_folded_batch_norm_is_gone_and_its_convolution_changed(report):
    found = step(report, 0)
    removed = by_status(found, "removed")
    assert removed["batch_norm (before)"].why == "folded into conv2d"
    changed = by_status(found, "changed")
    assert set(changed) == {"conv2d"}
    assert changed["conv2d"].why == "took in batch_norm"
    assert changed["conv2d"].details == ("weight weight: other values", "weight bias: - > f32[4]")
    assert set(by_status(found, "rewired")) == {"relu"}
    assert by_status(found, "added") == {}


def test_inserted_quantizers_are_new_with_their_reason(report):
    found = step(report, 1)
    added = by_status(found, "added")
    nodes = found.graph.by_id()
    counts = {op: sum(node.op == op for node in report_nodes(report)) for op in ("fxopt.quantize", "fxopt.dequantize")}
    assert {op: sum(nodes[node].op == op for node in added) for op in counts} == counts
    assert all(counts.values())
    assert any("as uint8, scale" in difference.why for difference in added.values())


def report_nodes(report):
    return fx_graph(report.graphs[-1]).nodes


def test_the_first_and_the_last_graph_differ_by_all_steps(report):
    first, last = fx_graph(report.graphs[0]), fx_graph(report.graphs[-1])
    found = compare(first, last)
    kept = {node.id for node in found.graph.nodes if not node.id.endswith(" (before)")}
    gone = {node.id.removesuffix(" (before)") for node in found.graph.nodes} - kept
    assert kept == {node.id for node in last.nodes}
    assert {"batch_norm", "update_buffer_default"} <= gone


def test_a_graph_does_not_differ_from_itself(report):
    for gm in report.graphs:
        assert compare(fx_graph(gm), fx_graph(gm)).differences == {}


def node(name, op="op", reads=(), origins=None, **fields):
    edges = tuple(Edge(source, "x") for source in reads)
    return Node(name, op, inputs=edges, origins=(name,) if origins is None else origins, **fields)


def differences(before, after, reasons=None):
    return compare(Graph(tuple(before)), Graph(tuple(after)), reasons).differences


def test_a_new_node_that_took_over_a_name_is_matched_by_its_origin():
    before = [node("a", "conv"), node("b", "norm", ["a"])]
    found = differences(before, [node("b", "conv", origins=("b", "a"), attributes=(("groups", "2"),))])
    assert (found["b"].status, found["b"].was) == ("changed", ("a",))
    assert found["b (before)"].status == "removed"


def test_renaming_alone_is_no_difference():
    before = [node("a", "conv"), node("b", "relu", ["a"])]
    after = [node("a7", "conv", origins=("a",)), node("b", "relu", ["a7"])]
    assert differences(before, after) == {}


def test_another_operator_of_the_same_name_and_origin_is_a_change():
    (found,) = differences([node("a", "hardswish")], [node("a", "mul")]).values()
    assert (found.status, found.details) == ("changed", ("operator: hardswish > mul",))


def test_nodes_without_a_common_origin_are_not_matched_though_their_names_are_equal():
    found = differences([node("a", "add", origins=("p",))], [node("a", "mul", origins=("q",))])
    assert {key: held.status for key, held in found.items()} == {"a": "added", "a (before)": "removed"}


def test_a_node_split_in_two_keeps_one_and_the_other_is_new():
    found = differences([node("a", "conv")], [node("a", "conv"), node("a_1", "conv", origins=("a",))])
    assert {key: held.status for key, held in found.items()} == {"a_1": "added"}


def test_changed_arguments_and_types_are_told():
    before = [node("a", attributes=(("dim", "0"), ("keep", "True")), outputs=("f32[2]",))]
    after = [node("a", attributes=(("dim", "1"),), outputs=("f16[2]",))]
    assert differences(before, after, {"a": "because"})["a"].details == (
        "type: f32[2] > f16[2]", "dim: 0 > 1", "keep: True > -",
    )  # fmt: skip


def test_what_is_gone_reads_what_is_left_of_what_it_read():
    before = [node("x"), node("a", "conv", ["x"]), node("n", "norm", ["a"]), node("y", "relu", ["n"])]
    after = [node("x"), node("a2", "conv", ["x"], origins=("a",)), node("y", "relu", ["a2"])]
    found = compare(Graph(tuple(before)), Graph(tuple(after)))
    assert [one.id for one in found.graph.nodes] == ["x", "a2", "n (before)", "y"]
    assert found.graph.by_id()["n (before)"].inputs[0].source == "a2"
    assert found.differences["y"].status == "rewired"


def test_changes_inside_a_branch_get_their_reason():
    found = differences([node("yes/a", "add")], [node("yes/a", "mul", origins=("yes/a",))], {"a": "cheaper"})
    assert found["yes/a"].why == "cheaper"
