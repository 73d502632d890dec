"""Half precision as a device computes it, shown on a CPU whose ORT computes in float32 instead."""

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import fxopt
from fxopt.errors import ExportError, NumericsError
from fxopt.export import Session, to_onnx, validate
from fxopt.export.half_emulation import emulated
from tests.models.randomized import randomized

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("float16", "bfloat16"))


class RootMeanSquare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x * x).sum(-1, keepdim=True).sqrt()


class Spread(nn.Module):
    """torch adds up the squares in float32 even if the tensor is half; an operator of ONNX for each step does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.std(-1)


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.last(self.norm(self.conv(x)).relu().mean((2, 3))), -1)


def bytes_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def saved(model: onnx.ModelProto | ir.Model) -> Session:
    return Session(model.SerializeToString() if isinstance(model, onnx.ModelProto) else bytes_of(model))


def one_graph(nodes: list[onnx.NodeProto], functions: tuple[onnx.FunctionProto, ...] = ()) -> onnx.ModelProto:
    """Return a model from x to y, both float32 of 4 elements."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    graph = helper.make_graph(nodes, "net", [x], [y])
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=list(functions))


def cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], to=to)


@HALVES
def test_each_result_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    net = randomized(Vision()).eval().to(dtype)
    x = torch.randn(2, 3, 16, 16).to(dtype)
    file = to_onnx(fxopt.capture(net, (x,)), runtime="onnx", opset=22)
    (got,) = saved(emulated(file)).run([x])
    assert torch.equal(got, net(x))


def test_an_overflow_that_ort_hides_is_seen() -> None:
    net, x = RootMeanSquare().half(), torch.full((2, 16), 400.0).half()
    file = to_onnx(fxopt.capture(net, (x,)), validate=False)
    (hidden,) = saved(file.model).run([x])
    (seen,) = saved(emulated(file)).run([x])
    assert torch.allclose(hidden.float(), torch.tensor(0.25))
    assert torch.equal(seen, torch.zeros_like(seen))
    assert torch.equal(seen, net(x))


def test_the_export_refuses_a_file_that_overflows_where_torch_does_not() -> None:
    x = (1000 * torch.randn(4, 32)).half()
    assert bool(Spread()(x).isfinite().all())
    with pytest.raises(NumericsError, match="ORT optimizer 'half'"):
        to_onnx(fxopt.capture(Spread(), (x,)))


def test_a_file_in_half_precision_is_validated_in_emulation_too() -> None:
    net = randomized(Vision()).eval().half()
    file = to_onnx(fxopt.capture(net, (torch.randn(2, 3, 16, 16).half(),)))
    assert file.validation is not None
    assert {result.optimization for result in file.validation.results} == {"none", "all", "half"}


def test_no_emulation_without_half_precision() -> None:
    file = to_onnx(fxopt.capture(Vision().eval(), (torch.randn(2, 3, 16, 16),)))
    assert file.validation is not None
    assert {result.optimization for result in file.validation.results} == {"none", "all"}


def test_bfloat16_for_the_cpu_runs_there() -> None:
    net, x = randomized(Vision()).eval().bfloat16(), torch.randn(2, 3, 16, 16).bfloat16()
    file = to_onnx(fxopt.capture(net, (x,)))
    (got,) = file.session().run([x])
    assert got.dtype is torch.bfloat16
    assert torch.allclose(got.float(), net(x).float(), atol=2e-2)


def test_bfloat16_for_other_devices_holds_no_casts_and_is_proved_in_emulation() -> None:
    net, x = randomized(Vision()).eval().bfloat16(), torch.randn(2, 3, 16, 16).bfloat16()
    file = to_onnx(fxopt.capture(net, (x,)), runtime="onnx", opset=22)
    assert not [node for node in file.model.graph if node.op_type == "Cast"]
    with pytest.raises(ExportError, match="NOT_IMPLEMENTED"):
        file.session()
    assert file.validation is not None
    assert {result.optimization for result in file.validation.results} == {"half"}
    assert any("emulation only" in note for note in file.validation.notes)


def test_an_operator_that_onnx_has_not_in_bfloat16_yet_is_computed_in_float32() -> None:
    net, x = randomized(Vision()).eval().bfloat16(), torch.randn(2, 3, 16, 16).bfloat16()
    file = to_onnx(fxopt.capture(net, (x,)), runtime="onnx", opset=20)
    (conv,) = [node for node in file.model.graph if node.op_type == "Conv"]
    assert conv.outputs[0].dtype is ir.DataType.FLOAT
    assert file.validation is not None


@HALVES
def test_statistics_in_float32_stay_so(dtype: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = randomized(nn.BatchNorm2d(4)).eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    x = torch.randn(2, 4, 5, 5).to(dtype)
    file = to_onnx(fxopt.capture(Mixed().eval(), (x,)), runtime="onnx", opset=22)
    assert [node.op_type for node in file.model.graph] == ["BatchNormalization"]
    (got,) = saved(emulated(file)).run([x])
    assert torch.equal(got, Mixed().eval()(x))


class Deep(nn.Module):
    """Layers in half between an input and an output in float32, with a step that ONNX computes in two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.bfloat16()
        for layer in self.layers:
            y = y + nn.functional.hardswish(nn.functional.linear(y, layer.weight.bfloat16(), layer.bias.bfloat16()))
        return y.float()


def test_a_graph_that_rounds_inside_may_differ_by_what_it_rounds_to() -> None:
    torch.manual_seed(0)
    file = to_onnx(fxopt.capture(Deep(), (torch.randn(64, 32),)))
    assert file.validation is not None
    assert file.validation.max_abs > 1e-3  # far more than float32 rounds by


def test_a_graph_that_rounds_inside_may_not_differ_by_more() -> None:
    torch.manual_seed(0)
    gm = fxopt.capture(Deep(), (torch.randn(64, 32),))
    written = to_onnx(gm, validate=False).to_bytes()
    with torch.no_grad():
        gm.get_parameter("layers.3.weight").mul_(-2)
    with pytest.raises(NumericsError, match="exceeds the ROUNDING bound"):
        validate(written, gm)


def test_a_runtime_that_is_not_known_is_refused() -> None:
    with pytest.raises(ExportError, match="runtime is 'cuda'; wanted one of ort-cpu, onnx"):
        to_onnx(fxopt.capture(Vision().eval(), (torch.randn(2, 3, 16, 16),)), runtime="cuda")  # type: ignore[arg-type]


def test_functions_of_a_foreign_model_are_looked_into() -> None:
    square = helper.make_function(
        "own", "Square", ["a"], ["b"], [helper.make_node("Mul", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    nodes = [
        cast("x", "h", TensorProto.FLOAT16),
        helper.make_node("Square", ["h"], ["s"], domain="own"),
        helper.make_node("Sqrt", ["s"], ["r"]),
        cast("r", "y", TensorProto.FLOAT),
    ]
    x = torch.tensor([1.0, 255.0, 256.0, 1e-4])
    (got,) = saved(emulated(one_graph(nodes, (square,)).SerializeToString())).run([x])
    assert torch.equal(got, (x.half() * x.half()).sqrt().float())


def test_branches_are_looked_into() -> None:
    def side(name: str, op_type: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT16, [4])
        return helper.make_graph([helper.make_node(op_type, ["h", "h"], [f"{name}_y"])], name, [], [result])

    nodes = [
        cast("x", "h", TensorProto.FLOAT16),
        helper.make_node("ReduceSum", ["h"], ["half_sum"], keepdims=0),
        cast("half_sum", "sum", TensorProto.FLOAT),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Greater", ["sum", "zero"], ["p"]),
        helper.make_node("If", ["p"], ["z"], then_branch=side("then", "Mul"), else_branch=side("else", "Add")),
        cast("z", "y", TensorProto.FLOAT),
    ]
    session = saved(emulated(one_graph(nodes).SerializeToString()))
    x = torch.tensor([300.0, 0.1, 7.0, 1.0])
    assert torch.equal(session.run([x])[0], (x.half() * x.half()).float())
    assert torch.equal(session.run([-x])[0], (-x.half() - x.half()).float())
