"""Which value of a file is wrong, told by another version of it: files of others, quantized, halved, fused by ORT."""

import math
import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime import quantization
from torch import nn

import fxopt
from fxopt import passes
from fxopt.contracts import Contract
from fxopt.errors import ExportError, InputError
from fxopt.export import bench, blame, to_onnx
from tests.export.faults import faults
from tests.export.qdq_graph import Calibration, product
from tests.models.randomized import randomized
from tests.passes.quantize import avx2
from tests.tools.viz.foreign_files import NAMES, foreign, parsed

pytestmark = pytest.mark.ort

NOT_COMPARED = {
    "no nodes": "no value in common",
    "returns a weight": "no value in common",
    "unknown domain": "ONNX Runtime does not accept the model",
    "equal names": "ONNX Runtime does not accept the model",
    "lost data": "ONNX Runtime does not accept the model",
    "strings": "no values can be drawn for input 'x'",
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with a residual sum, a softmax and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.last = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = self.pool((x + self.second(x)).relu())
        return self.last(x.mean((2, 3)).softmax(-1))


def written(name: str, folder: pathlib.Path) -> pathlib.Path:
    model = foreign(name, folder)
    if isinstance(model, pathlib.Path):
        return model
    onnx.save(model, folder / "foreign.onnx")
    return folder / "foreign.onnx"


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "net.onnx"
    torch.onnx.export(randomized(Net()).eval(), (IMAGES,), path, dynamo=True, verbose=False)
    return path


@pytest.fixture(scope="module")
def by_ort(by_torch):
    """Let ORT quantize the file that torch wrote; it leaves out each ReLU in front of a quantizer."""
    path = by_torch.with_name("quantized.onnx")
    quantization.quantize_static(by_torch, path, Calibration("x", IMAGES), per_channel=True)
    return path


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_COMPARED])
def test_a_foreign_file_is_compared_with_what_ort_makes_of_it(name, tmp_path):
    path = written(name, tmp_path)
    report = blame(path, optimization="extended")
    assert len(report.values) >= 1
    assert report.first is None
    assert bench([path], runs=2, memory=False).files[0].median_ms > 0


def test_a_kernel_whose_sums_overflow_here_is_named_with_the_reason():
    file = product(np.array([[127, 1], [127, 1], [0, 0], [0, 0]], np.int8), "uint8")
    report = blame(file, None, (torch.full((2, 4), 255.0),), optimization="extended")
    assert {value.value: value.overflowing for value in report.values} == {"q": 0, "r": 1, "y": 0}
    assert [row["overflowing"] for row in report.to_dict()["values"]] == [0, 1, 0]
    if avx2.oracle_missing() is None:
        assert [value.value for value in report.guilty] == ["r"]
        assert "16-bit sums of 1 channel can overflow there" in str(report)
    else:
        assert report.first is None


def test_at_least_twenty_foreign_files_are_compared():
    assert len(set(NAMES) - set(NOT_COMPARED)) >= 20


@pytest.mark.parametrize("name", NOT_COMPARED)
def test_what_cannot_be_compared_is_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ExportError, match=NOT_COMPARED[name]):
        blame(written(name, tmp_path), optimization="extended")


@pytest.mark.parametrize("which", ["by_torch", "by_ort"])
def test_each_fault_planted_in_a_file_of_others_is_named_and_nothing_else(which, request):
    path = request.getfixturevalue(which)
    model = ir.external_data.load_to_model(ir.load(path))
    planted = list(faults(model))
    assert len(planted) >= (8 if which == "by_torch" else 20)
    for fault in planted:
        node = model.graph[fault.place]
        broken = ir.to_proto(fault.planted(model)).SerializeToString()
        assert {one.node for one in blame(broken, path, (IMAGES,)).guilty} == {node.name}, fault


def test_the_line_in_a_file_that_torch_exported_is_named(by_torch):
    report = blame(by_torch, by_torch, (IMAGES,))
    assert any("test_blame_files.py" in value.source and "in forward" in value.source for value in report.values)
    assert all(value.local is not None and math.isinf(value.local.sqnr_db) for value in report.values)


def test_a_quantized_file_is_ranked_and_not_judged_by_rounding(by_ort, by_torch):
    report = blame(by_ort, by_torch, (IMAGES,))
    assert (report.contract, report.guilty) == ("", ())
    assert "nothing is judged" in str(report)
    assert len(report.values) >= 6


def test_a_relu_that_the_quantizer_stands_for_is_no_fault(by_ort, by_torch):
    operators = [node.op_type for node in ir.load(by_ort).graph]
    assert "Relu" not in operators
    relus = [value for value in blame(by_ort, by_torch, (IMAGES,)).values if value.target == "Relu"]
    assert relus
    assert all(value.local is not None and value.local.sqnr_db > 30 for value in relus)


def test_a_scale_that_clips_is_found_by_a_floor(by_ort, by_torch):
    model = onnx.load(by_ort)  # its weights as well
    (clipped,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "relu")
    for held in model.graph.initializer:
        if held.name == clipped.input[1]:
            held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held) / np.float32(8), held.name))
    floor = Contract.lossy("sqnr_db", 25.0)
    assert blame(by_ort, by_torch, (IMAGES,), contract=floor).first is None
    report = blame(model.SerializeToString(), by_torch, (IMAGES,), contract=floor)
    assert [value.target for value in report.guilty] == ["Relu"]
    assert "the contract says at least 25" in report.guilty[0].problem


def test_a_half_file_is_judged_by_the_digits_of_half():
    gm = fxopt.capture(randomized(Net()).eval(), (IMAGES,))
    wide = to_onnx(gm).to_bytes()
    half = to_onnx(fxopt.optimize(gm, [passes.CastHalf(dtype=torch.float16)]))
    report = blame(half, wide, (IMAGES,))
    assert report.first is None
    assert max(value.local.sqnr_db for value in report.values if value.local.mismatches) < 90
    fault = next(one for one in faults(half.model) if one.kind == "weight")
    assert len(blame(ir.to_proto(fault.planted(half.model)).SerializeToString(), wide, (IMAGES,)).guilty) == 1


def test_a_graph_may_be_compared_with_the_file_of_its_integers():
    gm = fxopt.optimize(randomized(Net()).eval(), passes.DEFAULT, example_inputs=(IMAGES,))
    file = to_onnx(fxopt.optimize(gm, [passes.Quantize(recipe="fast")]))
    assert blame(file, gm).contract == ""
    assert blame(file, gm, contract=Contract.lossy("sqnr_db", 15.0)).first is None
    assert blame(file, gm, contract=Contract.lossy("sqnr_db", 80.0)).guilty


def test_inputs_go_by_name_or_by_position():
    first = parsed("main (float[2] a, float[2] b) => (float[2] y) { y = Sub(a, b) }").SerializeToString()
    other = parsed("main (float[2] p, float[2] q) => (float[2] y) { y = Sub(p, q) }").SerializeToString()
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])
    for inputs in ((one, two), {"a": one, "b": two}):
        (value,) = blame(other, first, fxopt.Sample.of(inputs)).values
        assert value.total.mismatches == 0


def test_inputs_that_do_not_fit_are_refused():
    model = parsed("main (float[2] a, float[2] b) => (float[2] y) { y = Sub(a, b) }").SerializeToString()
    with pytest.raises(InputError, match="the inputs do not fit the model"):
        blame(model, model, (torch.ones(2),))
    with pytest.raises(InputError, match="the inputs do not fit the model"):
        blame(model, model, fxopt.Sample((), {"a": torch.ones(2), "c": torch.ones(2)}))


def test_models_of_other_inputs_are_refused():
    one = parsed("main (float[2] a) => (float[2] y) { y = Neg(a) }").SerializeToString()
    two = parsed("main (float[2] a, float[2] b) => (float[2] y) { y = Sub(a, b) }").SerializeToString()
    with pytest.raises(ExportError, match="the models take other inputs"):
        blame(one, two)


def test_a_file_alone_and_as_it_stands_is_refused():
    with pytest.raises(ExportError, match="as it stands and itself are the same"):
        blame(parsed("main (float[2] a) => (float[2] y) { y = Neg(a) }").SerializeToString())


def test_random_numbers_are_taken_over_and_not_compared():
    text = "main (float[64] x) => (float[64] y) { r = RandomNormalLike(x) t = Add(x, r) y = Exp(t) }"
    report = blame(parsed(text).SerializeToString(), parsed(text).SerializeToString())
    assert [value.target for value in report.values] == ["Add", "Exp"]
    assert report.first is None


def test_names_that_stand_for_values_in_another_order_are_left_out():
    right = parsed("main (float[2] x) => (float[2] y) { a = Relu(x) b = Exp(a) y = Neg(b) }")
    other = parsed("main (float[2] x) => (float[2] y) { b = Exp(x) a = Relu(b) y = Neg(a) }")
    report = blame(other.SerializeToString(), right.SerializeToString(), (torch.tensor([-1.0, 2.0]),))
    assert 1 <= len(report.values) < 3
    assert report.first is not None


def test_an_error_of_a_ten_thousandth_is_more_than_rounding():
    text = (
        "main (float[4, 512] x) => (float[4] y) <int64[1] axis = {1}> "
        "{ s = ReduceSum <keepdims = 0> (x, axis) y = Neg(s) }"
    )
    right, wrong = parsed(text), parsed(text)
    constant = helper.make_tensor("off", onnx.TensorProto.FLOAT, [], [1 + 1e-4])
    wrong.graph.initializer.append(constant)
    wrong.graph.node[0].output[0] = "t"
    wrong.graph.node.insert(1, helper.make_node("Mul", ["t", "off"], ["s"]))
    x = torch.rand(4, 512)
    assert blame(right.SerializeToString(), right.SerializeToString(), (x,)).first is None
    (guilty,) = blame(wrong.SerializeToString(), right.SerializeToString(), (x,)).guilty
    assert guilty.target == "ReduceSum"
