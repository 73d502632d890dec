"""Channels whose 16-bit sums overflow without VNNI: planted ones are counted, in each kernel that adds pairs."""

import json

import numpy as np
import pytest
import torch
from onnxruntime import quantization
from torch import nn

import fxopt
from fxopt.export import coverage, to_onnx
from fxopt.passes import Quantize, QuantizeDynamic
from tests.export.qdq_graph import Calibration, Graph

pytestmark = pytest.mark.ort
MS = "com.microsoft"


def planted(*shape: int, axis: int, channels: tuple[int, ...]) -> np.ndarray:
    """Return weights of 1, with two neighbours of 127 and 2 in some channels along an axis."""
    weight = np.ones(shape, np.int8)
    rows = np.moveaxis(weight, axis, 0)  # [out, in, ...] of a convolution, [out, in] of a matrix
    for channel in channels:
        rows[channel, 0], rows[channel, 1] = 127, 2
    return weight


def dequantized(graph: Graph, numbers: np.ndarray, axis: int) -> str:
    scale = np.full(numbers.shape[axis], 0.01, np.float32)
    given = graph.constant(numbers), graph.constant(scale), graph.constant(np.zeros(len(scale), numbers.dtype))
    return graph.op("DequantizeLinear", *given, axis=axis)


def convolution(kind: str, group: int, channels: tuple[int, ...]) -> bytes:
    graph = Graph()
    zero = {"u8": 128, "s8": 0}[kind]
    x = graph.quantized(graph.input(1, 8, 5, 5), 0.02, zero, kind)
    weight = dequantized(graph, planted(8, 8 // group, 3, 3, axis=0, channels=channels), 0)
    return graph.model(graph.quantized(graph.op("Conv", x, weight, group=group), 1.0, zero, kind))


@pytest.mark.parametrize("kind", ["u8", "s8"])  # ORT makes signed activations of quantizers unsigned
@pytest.mark.parametrize("group", [1, 4])
def test_channels_of_a_convolution_are_counted(kind, group):
    for channels in ((), (1,), (0, 3, 7)):
        report = coverage(convolution(kind, group, channels))
        assert [(one.op, one.overflowing) for one in report.layers] == [("QLinearConv", len(channels))]
        assert ("16-bit sums can overflow" in str(report)) == bool(channels)


def test_a_depthwise_convolution_adds_no_pairs():
    graph = Graph()
    weight = dequantized(graph, np.full((8, 1, 3, 3), 127, np.int8), 0)
    x = graph.quantized(graph.input(1, 8, 5, 5))
    report = coverage(graph.model(graph.quantized(graph.op("Conv", x, weight, group=8), 1.0)))
    assert [(one.op, one.overflowing) for one in report.layers] == [("QLinearConv", 0)]


@pytest.mark.parametrize(("op", "attributes", "axis"), [("MatMul", {}, 1), ("Gemm", {}, 1), ("Gemm", {"transB": 1}, 0)])
def test_columns_of_a_matrix_are_counted(op, attributes, axis):
    graph = Graph()
    shape = (6, 12) if axis == 0 else (12, 6)
    weight = dequantized(graph, planted(*shape, axis=axis, channels=(2, 5)), axis)
    y = graph.op(op, graph.quantized(graph.input(3, 12)), weight, **attributes)
    (layer,) = coverage(graph.model(graph.quantized(y, 1.0))).layers
    assert layer.kind == "integer"
    assert layer.overflowing == 2


@pytest.mark.parametrize(("kind", "count"), [("int8", 0), ("uint8", 2)])
def test_an_integer_product_written_as_such_is_exact_for_signed_activations(kind, count):
    graph = Graph()
    one, zero = graph.constant(np.float32(1)), graph.constant(np.array(0, kind))
    steps = graph.op("QuantizeLinear", graph.input(3, 12), one, zero)
    weight = planted(12, 6, axis=1, channels=(2, 5))
    given = graph.constant(weight), one, graph.constant(np.int8(0)), one, zero
    y = graph.op("DequantizeLinear", graph.op("QLinearMatMul", steps, one, zero, *given), one, zero)
    (layer,) = coverage(graph.model(y)).layers
    assert (layer.op, layer.overflowing) == ("QLinearMatMul", count)


def test_unsigned_weights_and_floats_cannot_overflow():
    graph = Graph()
    weight = dequantized(graph, np.full((8, 8, 3, 3), 255, np.uint8), 0)
    y = graph.quantized(graph.op("Conv", graph.quantized(graph.input(1, 8, 5, 5)), weight), 1.0)
    kept = graph.op("Conv", y, dequantized(graph, planted(4, 8, 1, 1, axis=0, channels=(1,)), 0))  # stays float
    report = coverage(graph.model(kept))
    assert [(one.op, one.overflowing) for one in report.layers] == [("QLinearConv", 0), ("Conv", 0)]


@pytest.mark.parametrize("op", ["MatMulInteger", "DynamicQuantizeMatMul", "batched"])
def test_products_with_scales_of_each_call_are_counted(op):
    graph = Graph()
    x = graph.input(2, 3, 12)
    weight = planted(12, 6, axis=1, channels=(0, 4, 5))
    weight = np.stack([weight, np.ones_like(weight)]) if op == "batched" else weight
    if op == "DynamicQuantizeMatMul":
        y = graph.op(op, x, graph.constant(weight), graph.constant(np.float32(0.01)), domain=MS)
    else:
        graph.op("DynamicQuantizeLinear", x)
        graph.nodes[-1].output.extend(["steps", "zero"])
        y = graph.op("MatMulInteger", graph.nodes[-1].output[0], graph.constant(weight), "zero")
        y = graph.op("Cast", y, to=1)
    (layer,) = coverage(graph.model(y)).layers
    assert (layer.layer, layer.overflowing) == ("linear", 3)


def test_gates_of_a_recurrent_layer_are_counted():
    torch.manual_seed(0)
    x = torch.randn(5, 1, 16)
    for no_saturation in (False, True):
        quantize = QuantizeDynamic(min_elements=1, no_saturation=no_saturation)
        gm = fxopt.optimize(nn.LSTM(16, 24).eval(), [quantize], (x,), modes="current", check="off")
        report = coverage(to_onnx(gm, validate=False))
        (layer,) = (one for one in report.layers if one.layer == "recurrent")
        assert layer.op == "DynamicQuantizeLSTM"
        assert bool(layer.overflowing) is not no_saturation


def test_the_report_names_places_and_says_what_to_try():
    report = coverage(convolution("u8", 1, (1, 2)))
    lines = str(report).splitlines()
    at = lines.index("16-bit sums can overflow on CPUs without VNNI, in 2 output channels:")
    assert lines[at + 1].startswith("  1 x QLinearConv  (Conv_node")
    assert "7 bits" in lines[at + 2]
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["overflowing"] == 2
    assert [one.overflowing for one in report.overflowing] == [2]


def test_files_of_ort_overflow_and_those_of_fxopt_do_not(tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()).eval()
    x = torch.randn(4, 3, 12, 12)
    gm = fxopt.optimize(net, None, (x,), modes="current", check="off")
    to_onnx(gm, tmp_path / "float.onnx", validate=False)
    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "theirs.onnx", Calibration("input_1", x), per_channel=True
    )
    mine = fxopt.optimize(net, [Quantize()], (x,), calibration=[(x,)], modes="current", check="off")
    to_onnx(mine, tmp_path / "mine.onnx", validate=False)
    theirs, ours = (coverage(tmp_path / name) for name in ("theirs.onnx", "mine.onnx"))
    assert theirs.integer_share == ours.integer_share == 1.0
    assert sum(one.overflowing for one in theirs.layers) > 4
    assert not ours.overflowing
