"""Any ONNX model becomes the right description: every node once, every edge, bodies as groups, weights not loaded."""

import onnx
import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import to_onnx
from fxopt.tools.viz import onnx_graph
from fxopt.tools.viz.document import Stage, document
from tests.tools.viz.foreign_files import NAMES, foreign, proto_of

pytestmark = pytest.mark.ort


def described(name, folder):
    model = foreign(name, folder)
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return proto_of(model), onnx_graph(given)


def operators(proto):
    """Count the operators that run, functions at every call: written apart from what is tested."""
    functions = {(f.domain, f.name): f for f in proto.functions}

    def walk(nodes):
        for node in nodes:
            yield node.op_type
            for attribute in node.attribute:
                bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
                for body in bodies:
                    yield from walk(body.node)
            if (node.domain, node.op_type) in functions:
                yield from walk(functions[node.domain, node.op_type].node)

    return sorted(walk(proto.graph.node))


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_model_opens_with_every_operator_and_every_edge_resolved(name, tmp_path):
    proto, graph = described(name, tmp_path)
    shown = [node.op.rpartition(".")[2] for node in graph.nodes if node.kind not in ("input", "output")]
    assert sorted(shown) == operators(proto)
    seen = set()
    for node in graph.nodes:
        assert {edge.source for edge in node.inputs} <= seen  # in an order in which they can be computed
        assert node.id not in seen
        seen.add(node.id)
    assert document([Stage(graph, name)], name)["records"]


def test_at_least_twenty_foreign_models_are_tried():
    assert len(NAMES) >= 20


@pytest.mark.parametrize("name", ["add", "weights", "quantized QDQ", "dead output"])
def test_edges_are_those_of_the_file(name, tmp_path):
    proto, graph = described(name, tmp_path)
    producers = {value: "/".join(node.output) for node in proto.graph.node for value in node.output}
    wanted = sorted(
        (producers[value], "/".join(node.output))
        for node in proto.graph.node
        for value in node.input
        if value in producers
    )
    by_id = {(node.name or node.output[0]): "/".join(node.output) for node in proto.graph.node}
    assert sorted((by_id[s], by_id[r]) for s, r in graph.edges() if s in by_id and r in by_id) == wanted


def test_bodies_of_if_are_groups_and_their_results_reach_the_if(tmp_path):
    _, graph = described("if", tmp_path)
    groups = {node.path for node in graph.nodes}
    assert groups == {(), ("y: then_branch",), ("y: else_branch",)}
    branch = graph.by_id()["y"]
    assert [(edge.source, edge.argument) for edge in branch.inputs] == [
        ("c", "cond"), ("y/then_branch/a", "then_branch[0]"), ("y/else_branch/b", "else_branch[0]"),
    ]  # fmt: skip
    assert [edge.source for edge in graph.by_id()["y/else_branch/b"].inputs] == ["x"]  # read from around it


def test_a_loop_hands_its_inputs_to_those_of_its_body(tmp_path):
    _, graph = described("loop", tmp_path)
    sources = {node.id: [edge.source for edge in node.inputs] for node in graph.nodes}
    assert sources["y/body/s"] == ["x"]
    assert sources["y/body/i"] == ["n"]
    assert sources["y/body/t"] == ["y/body/s", "x"]


def test_a_function_is_opened_at_each_call(tmp_path):
    _, graph = described("function in function", tmp_path)
    relus = [node for node in graph.nodes if node.op == "Relu"]
    assert [len(node.path) for node in relus] == [2, 2, 2, 2]
    assert len({node.path for node in relus}) == 4


def test_weights_are_described_and_those_that_are_lost_are_told_of(tmp_path):
    _, held = described("external data", tmp_path)
    _, lost = described("lost data", tmp_path)
    weight = next(node for node in held.nodes if node.op == "Conv").weights[0]
    assert (weight.type, weight.elements, weight.argument) == ("f32[4, 3, 3, 3]", 108, "W")
    assert sum(weight.counts) == 108
    gone = next(node for node in lost.nodes if node.op == "Conv").weights[0]
    assert (gone.type, gone.bytes, gone.counts, gone.zeros) == (weight.type, weight.bytes, (), None)
    assert held.notes == ()
    (note,) = lost.notes
    assert note.startswith("the values of 3 weights cannot be read; w: ")


def test_weights_whose_file_is_cut_short_are_told_of(tmp_path):
    path = foreign("external data", tmp_path)
    (tmp_path / "external.onnx.data").write_bytes(b"1234")
    assert "the values of 3 weights cannot be read" in onnx_graph(path).notes[0]


def test_a_proto_without_its_weights_opens(tmp_path):
    proto = proto_of(foreign("external data", tmp_path))
    content = fxopt.view(proto, tmp_path / "graph.json").read_text()
    assert "the values of 3 weights cannot be read" in content


def test_large_weights_in_other_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fxopt.tools.viz.from_onnx._LARGEST_EXTERNAL", 100)
    _, graph = described("external data", tmp_path)
    counted = {weight.name: bool(weight.counts) for node in graph.nodes for weight in node.weights}
    assert counted == {"w": False, "b": True, "m": True}


def test_macs_and_types_of_inner_values_are_inferred(tmp_path):
    _, graph = described("weights", tmp_path)
    convolution = next(node for node in graph.nodes if node.op == "Conv")
    assert convolution.outputs == ("f32[1, 4, 6, 6]",)
    assert convolution.values["MACs"] == 4 * 6 * 6 * 27
    assert graph.notes == ()


def test_a_model_whose_types_cannot_be_inferred_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr("onnx.shape_inference.infer_shapes", refuse)
    graph = onnx_graph(foreign("add", None).SerializeToString())
    assert graph.notes == ("the types of inner values are not known: ONNX's shape inference refuses the model",)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("quantized QDQ", {"Conv": "quantized", "MatMul": "quantized"}),
        ("quantized QOperator", {"QLinearConv": "quantized", "QLinearMatMul": "quantized"}),
        ("weights", {"Conv": "float", "MatMul": "float"}),
    ],
)
def test_layers_in_integers_are_told_from_layers_in_floats(name, wanted, tmp_path):
    _, graph = described(name, tmp_path)
    assert {
        node.op.rpartition(".")[2]: node.values["quantized"] for node in graph.nodes if node.kind == "layer"
    } == wanted


def test_modules_of_torch_and_slashes_in_names_are_groups(tmp_path):
    _, graph = described("exported by torch", tmp_path)
    assert {node.path[0] for node in graph.nodes if node.path} == {"first", "second"}
    assert any("return self.second(self.first(x))" in node.line for node in graph.nodes)
    _, graph = described("names with slashes", tmp_path)
    assert next(node for node in graph.nodes if node.op == "Conv").path == ("layer1", "conv0")


def test_what_fxopt_wrote_is_read_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    file = to_onnx(fxopt.optimize(net, "fold-batch-norm", (torch.randn(1, 3, 6, 6),)))
    node = next(node for node in onnx_graph(file).nodes if node.op == "Conv")
    assert (node.path, node.origins) == (("0",), ("conv2d",))
    assert "conv.py" in node.line


def test_calls_of_functions_stay_closed_in_a_model_of_too_many_nodes(monkeypatch):
    monkeypatch.setattr("fxopt.tools.viz.from_onnx._MOST_NODES", 3)
    graph = onnx_graph(foreign("function in function", None).SerializeToString())
    assert any("calls of functions are not opened" in note for note in graph.notes)
