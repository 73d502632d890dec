"""The shape of the file: names, provenance, shared weights, dimension names, errors, other people's operators."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import Emitter, NotTranslated, Value, to_onnx, translate, translates
from tests.export.proof import captured, op_types, prove

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """A small net with two modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, *, scale=2.0):
        hidden = torch.relu(self.first(x))
        return self.second(hidden) * scale


def graph_of(model, *inputs, **options):
    return to_onnx(captured(model, *inputs), **options).model.graph


def test_names_come_from_pytorch():
    graph = graph_of(Net(), torch.randn(3, 4))
    assert set(graph.initializers) == {"first.weight", "first.bias", "second.weight", "second.bias", "float32(2.0)"}
    assert [node.name for node in graph] == ["linear", "relu", "linear_1", "mul"]
    assert [value.name for value in graph.inputs] == ["x"]


def test_every_node_says_where_it_comes_from():
    graph = graph_of(Net(), torch.randn(3, 4))
    linear = next(iter(graph))
    assert linear.metadata_props["fxopt.node"] == "linear"
    assert linear.metadata_props["fxopt.module"] == "first"
    relu = list(graph)[1]
    assert relu.metadata_props["fxopt.source"].startswith("test_translate.py:")
    assert relu.metadata_props["fxopt.source"].endswith("hidden = torch.relu(self.first(x))")
    assert all("fxopt.node" in node.metadata_props for node in graph)


def test_nodes_made_by_a_pass_name_it():
    gm = captured(Net(), torch.randn(3, 4))
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.meta["fxopt"] = fxopt.Provenance("my-pass", ("relu",))
    nodes = {node.name: node for node in to_onnx(gm).model.graph}
    assert nodes["relu"].metadata_props["fxopt.pass"] == "my-pass"
    assert "fxopt.pass" not in nodes["linear"].metadata_props


def test_helper_nodes_are_named_after_the_node_they_serve():
    graph = graph_of(lambda x: nn.functional.silu(x), torch.randn(3, 4))
    assert [node.name for node in graph] == ["silu/Sigmoid", "silu"]
    assert {node.metadata_props["fxopt.node"] for node in graph} == {"silu"}


def test_shapes_carry_the_users_dimension_names():
    gm = fxopt.capture(Net().eval(), (torch.randn(3, 4),), dynamic_shapes={"x": {0: "batch"}})
    graph = to_onnx(gm).model.graph
    assert str(graph.inputs[0].shape) == "[batch,4]"
    assert str(graph.outputs[0].shape) == "[batch,3]"
    assert str(next(iter(graph)).outputs[0].shape) == "[batch,8]"


def test_expressions_of_dimensions_are_readable():
    gm = fxopt.capture(lambda x: x.reshape(-1, 2), (torch.randn(3, 4),), dynamic_shapes={"x": {0: "batch"}})
    assert str(to_onnx(gm).model.graph.outputs[0].shape) == "[2*batch,2]"


def test_input_and_output_names():
    file = to_onnx(captured(Net(), torch.randn(3, 4)), input_names=["image"], output_names=["logits"])
    assert (file.input_names, file.output_names) == (("image",), ("logits",))


@pytest.mark.parametrize(("options", "message"), [
    ({"input_names": ["a", "b"]}, "input_names has 2 names for 1 inputs: x"),
    ({"output_names": ["a", "b"]}, "output_names has 2 names for 1 outputs"),
    ({"input_names": ["same"], "output_names": ["same"]}, "the name 'same' is given to two inputs or outputs"),
    ({"output_names": [""]}, "an input or output name is empty"),
])  # fmt: skip
def test_bad_names_are_refused(options, message):
    with pytest.raises(fxopt.ExportError, match=message):
        to_onnx(captured(Net(), torch.randn(3, 4)), **options)


def test_names_of_outputs_do_not_collide_with_nodes():
    graph = graph_of(lambda x: torch.relu(x) + 1, torch.randn(3, 4), output_names=["relu"])
    assert [value.name for value in graph.outputs] == ["relu"]


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too."""

    def __init__(self, rank):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.rank = rank

    def forward(self, index):
        hidden = self.embedding(index)
        return self.head(hidden.mean(1) if self.rank == 2 else hidden)


@pytest.mark.parametrize("rank", [2, 3])
def test_shared_weights_are_stored_once(rank):
    file = prove(Tied(rank), torch.randint(0, 10, (3, 5)))
    assert file.parameter_bytes < 2 * 10 * 4 * 4
    (name,) = [name for name, value in file.model.graph.initializers.items() if value.const_value.nbytes == 160]
    assert tuple(file.model.graph.initializers[name].shape) == (10, 4)


def test_a_weight_used_transposed_twice_is_stored_transposed_once():
    layer = nn.Linear(4, 4, bias=False)
    file = prove(lambda x: layer(layer(x)), torch.randn(3, 2, 4))
    assert op_types(file) == ["MatMul", "MatMul"]
    assert len(file.model.graph.initializers) == 1


def test_dead_code_and_unused_parameters_are_left_out():
    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    assert set(graph_of(Wasteful(), torch.randn(3, 4)).initializers) == {"used.weight", "used.bias"}


def test_structured_inputs_and_outputs():
    def forward(pair, extra):
        return {"sum": pair[0] + pair[1], "same": pair[0], "twice": (extra, extra), "none": None, "number": 3}

    gm = fxopt.capture(forward, ((torch.randn(3), torch.randn(3)), torch.randn(2)))
    file = to_onnx(gm)
    assert len(file.input_names) == 3
    assert len(file.output_names) == len(set(file.output_names)) == 5


def test_an_unknown_operator_is_named_with_its_line():
    with pytest.raises(fxopt.ExportError) as caught:
        to_onnx(captured(lambda x: torch.linalg.svdvals(x) + 1, torch.randn(3, 3), dynamic=False))
    message = str(caught.value)
    assert "has no ONNX translation" in message
    assert (
        "tried   no translation is registered; torchlib has no function for it; PyTorch has no decomposition of it"
        in message
    )
    assert "try     register one with @fxopt.export.translates(torch.ops.aten." in message
    assert "node    " in message
    assert "source  " in message


def test_other_peoples_operators():
    with torch.library._scoped_library("fxopt_test", "DEF") as library:
        library.define("scaled_relu(Tensor x, float scale) -> Tensor")
        library.impl("scaled_relu", lambda x, scale: x.relu() * scale, "CompositeExplicitAutograd")
        library.impl("scaled_relu", lambda x, scale: torch.empty_like(x), "Meta")
        operator = torch.ops.fxopt_test.scaled_relu.default

        with pytest.raises(fxopt.ExportError, match=r"fxopt_test\.scaled_relu\.default has no ONNX translation"):
            to_onnx(captured(lambda x: operator(x, 3.0), torch.randn(3, 4)))

        @translates(operator)
        def scaled_relu(emit: Emitter, x: Value, scale: float) -> Value:
            return emit("Mul", emit("Relu", x), scale)

        file = prove(lambda x: operator(x, 3.0), torch.randn(3, 4))
        assert op_types(file) == ["Relu", "Mul"]

        with pytest.raises(ValueError, match=r"is translated by .*scaled_relu already; pass replace=True"):
            translates(operator)(scaled_relu)
        with pytest.raises(TypeError, match="cannot translate fxopt_test::scaled_relu"):
            translates(operator, replace=True)(lambda emit, x: x)

        @translates(operator, replace=True)
        def never(emit: Emitter, x: Value, scale: float) -> Value:
            raise NotTranslated("only on Sundays")

        with pytest.raises(fxopt.ExportError, match="only on Sundays"):
            to_onnx(captured(lambda x: operator(x, 3.0), torch.randn(3, 4)))


def test_a_translation_that_yields_another_type_is_found_out():
    with torch.library._scoped_library("fxopt_test2", "DEF") as library:
        library.define("same(Tensor x) -> Tensor")
        library.impl("same", lambda x: x.clone(), "CompositeExplicitAutograd")
        library.impl("same", lambda x: torch.empty_like(x), "Meta")
        operator = torch.ops.fxopt_test2.same.default
        translates(operator)(lambda emit, x: emit.cast(x, torch.float16))
        with pytest.raises(TypeError, match=r"yields FLOAT16 instead of torch\.float32") as caught:
            to_onnx(captured(lambda x: operator(x), torch.randn(3, 4)))
        assert any("while exporting" in note for note in caught.value.__notes__)


def test_translate_gives_a_model_without_a_runtime():
    gm = captured(Net(), torch.randn(3, 4))
    model = translate(gm, opset=18, output_names=["y"])
    assert model.opset_imports == {"": 18}
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_the_graph_is_left_alone():
    gm = captured(Net(), torch.randn(3, 4))
    before = fxopt.graph_text(gm)
    weight = gm.get_parameter("first.weight").clone()
    to_onnx(gm)
    assert fxopt.graph_text(gm) == before
    assert torch.equal(gm.get_parameter("first.weight"), weight)


def test_a_tensor_and_a_value_of_one_name_have_two_in_the_file():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("relu", torch.randn(3))

        def forward(self, x):
            return (x.relu() + self.relu).sin()

    gm = captured(Net(), torch.randn(2, 3))
    (read,) = gm.graph.find_nodes(op="get_attr")
    (reader,) = read.users
    reader.prepend(read)  # behind the call of the same name, as where a pass has put it
    assert "relu" in {node.name for node in gm.graph.nodes if node.op == "call_function"}
    graph = to_onnx(gm).model.graph
    assert not {value.name for node in graph for value in node.outputs} & set(graph.initializers)
