"""Coverage: multiply-accumulates against torch's own counter, kernels by ORT's graph, reasons by made-up graphs."""

import json
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxopt
from fxopt.export import CoverageReport, coverage, optimized_model, to_onnx
from fxopt.export.coverage_table import KERNELS, Call
from tests.export.proof import captured
from tests.export.qdq_graph import RANDOM, Calibration, Graph, conv

pytestmark = pytest.mark.ort


def by_torch(model: Any, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


def exported(model: Any, *inputs: torch.Tensor) -> Any:
    return to_onnx(captured(model, *inputs, dynamic=False), validate=False)


# -- multiply-accumulates ----------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Convolutions of which ORT's layouts would pad the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 20, 3, stride=2), nn.ReLU(), nn.Conv2d(20, 7, 1))

    def forward(self, x):
        return self.layers(x)


X = torch.randn(2, 8, 9, 7)


@pytest.mark.parametrize(
    ("model", "inputs", "layer"),
    [
        (nn.Conv2d(8, 12, 3, padding=1, stride=2), (X,), "conv"),
        (nn.Conv2d(8, 12, 3, groups=4, dilation=2), (X,), "conv"),
        (nn.Conv2d(8, 16, 3, groups=8), (X,), "conv"),
        (nn.Conv1d(8, 4, 5), (X[..., 0],), "conv"),
        (nn.Conv3d(1, 4, 3), (X[:, None],), "conv"),
        (nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), (X,), "conv"),
        (Wide(), (torch.randn(1, 3, 32, 32),), "conv"),
        (nn.Linear(7, 5), (X,), "linear"),
        (nn.Linear(7, 5, bias=False), (X[0, 0],), "linear"),
        (lambda a, b: a @ b, (X, torch.randn(7, 4)), "matmul"),
        (lambda a, b: a @ b, (X, torch.randn(2, 1, 7, 4)), "matmul"),
        (lambda a, b: a @ b, (X[0], torch.randn(2, 1, 7, 4)), "matmul"),
        (lambda a, b: a @ b.mT, (X, X * 2), "matmul"),
        (lambda a, b: torch.einsum("bchw,bcdw->bhcd", a, b), (X, X * 2), "matmul"),
    ],
)
def test_multiply_accumulates_are_those_of_torch(model, inputs, layer):
    report = coverage(exported(model, *inputs))
    assert report.macs == by_torch(model, *inputs) > 0
    assert list(report.kernels) == [layer]
    assert report.kernels[layer][0] == report.integer_share == 0


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_kernels_count_every_step(kind, gates):
    report = coverage(exported(lambda x: net(x)[0], x := torch.randn(5, 2, 6)) if (net := kind(6, 4)) else None)
    assert report.macs == x.shape[0] * x.shape[1] * gates * 4 * (6 + 4)
    assert report.kernels == {"recurrent": (0, 1)}


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_what_a_recurrent_cell_is_made_of_counts_as_recurrent(kind, gates):
    cell = kind(6, 4)
    inputs = [torch.randn(5, size) for size in ((6, 4, 4) if gates == 4 else (6, 4))]
    report = coverage(exported((lambda x, h, c: cell(x, (h, c))) if gates == 4 else (lambda x, h: cell(x, h)), *inputs))
    assert report.macs == 5 * gates * 4 * (6 + 4)
    assert report.kernels["recurrent"] == (0, 2)
    assert "linear" not in report.kernels
    assert {one.reason for one in report.floats if one.layer == "recurrent"} == {
        "part of a recurrent cell, which static quantization leaves in float"
    }


def test_attention_kernels_count_projections_scores_and_sums():
    graph = Graph()
    x = graph.input(2, 5, 16)
    weight, bias = graph.constant(np.zeros((16, 48), np.float32)), graph.constant(np.zeros(48, np.float32))
    y = graph.op("Attention", x, weight, bias, domain="com.microsoft", num_heads=2)
    report = coverage(graph.model(y))
    assert report.macs == 2 * 5 * 16 * 48 + 2 * (2 * 5 * 5 * 16)
    graph = Graph()
    query, key, value = graph.input(2, 5, 16), graph.input(2, 7, 16), graph.input(2, 7, 8)
    y = graph.op("MultiHeadAttention", query, key, value, domain="com.microsoft", num_heads=2)
    report = coverage(graph.model(y))
    assert report.macs == 2 * 5 * 7 * (16 + 8)
    assert report.kernels == {"attention": (0, 1)}


def test_einsum_counts_what_the_dots_stand_for():
    call = Call({"equation": "...ij, ...jk -> ...ik"}, ((3, 1, 4, 5), (2, 5, 6)), ((3, 2, 4, 6),))
    assert KERNELS["Einsum"].macs(call) == 3 * 2 * 4 * 5 * 6


def test_a_loop_counts_each_time_and_a_branch_only_where_it_is_taken():
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")

    def body(name: str, inputs: list[str], nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.GraphProto:
        kinds = {"go": (TensorProto.BOOL, []), "go_on": (TensorProto.BOOL, []), "i": (TensorProto.INT64, [])}
        matrix = (TensorProto.FLOAT, [4, 4])
        infos = [
            [helper.make_tensor_value_info(name, *kinds.get(name, matrix)) for name in names]
            for names in (inputs, outputs)
        ]
        return helper.make_graph(nodes, name, *infos)

    step = [helper.make_node("MatMul", ["h", "w"], ["h2"]), helper.make_node("Identity", ["go"], ["go_on"])]
    loop = helper.make_node("Loop", ["times", "", "x"], ["y"], body=body("b", ["i", "go", "h"], step, ["go_on", "h2"]))
    sides = {
        f"{side}_branch": body(side, [], [helper.make_node(op, ["y", "y"], [side])], [side])
        for side, op in (("then", "MatMul"), ("else", "Add"))
    }
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4]),
        helper.make_tensor_value_info("times", TensorProto.INT64, []),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    choice = helper.make_node("If", ["flag"], ["z"], **sides)
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    graph = helper.make_graph([loop, choice], "g", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    values = {"x": torch.randn(4, 4), "times": torch.tensor(3)}
    taken = coverage(model, values | {"flag": torch.tensor(True)})
    assert taken.macs == 4 * 64
    assert {kernel.layer: kernel.macs for kernel in taken.floats} == {"linear": 3 * 64, "matmul": 64}
    other = coverage(model, values | {"flag": torch.tensor(False)})
    assert {kernel.layer: kernel.macs for kernel in other.floats} == {"linear": 3 * 64, "matmul": 0}


# -- kernels -----------------------------------------------------------------------------------------------------------


def conv_net(graph: Graph, x: str) -> str:
    """A residual block, a pool and a concatenation of two scales, a linear layer: all as ORT wants them."""
    x = graph.quantized(x)
    inner = graph.quantized(graph.op("Relu", graph.op("Conv", x, graph.weight(8, 8, 3, 3), pads=[1] * 4)), 0.02, 0)
    inner = graph.quantized(graph.op("Conv", inner, graph.weight(8, 1, 3, 3), pads=[1] * 4, group=8), 0.03)
    total = graph.quantized(graph.op("Relu", graph.op("Add", inner, x)), 0.04, 0)
    both = graph.quantized(graph.op("Concat", total, inner, axis=1), 0.05)
    pooled = graph.quantized(graph.op("MaxPool", both, kernel_shape=[2, 2], strides=[2, 2]), 0.05)
    pooled = graph.quantized(graph.op("GlobalAveragePool", pooled))
    flat = graph.quantized(graph.op("Flatten", pooled))
    return graph.quantized(graph.op("Gemm", flat, graph.weight(10, 16), transB=1))


def test_every_layer_of_a_quantized_net_is_an_integer_kernel():
    graph = Graph()
    report = coverage(graph.model(conv_net(graph, graph.input("batch", 8, 6, 6))))
    assert report.kernels == {"conv": (2, 2), "linear": (1, 1), "add": (1, 1), "pool": (2, 2), "concat": (1, 1)}
    assert report.integer_share == 1.0
    assert report.macs == 36 * 8 * (8 * 9 + 9) + 16 * 10
    assert [(one.op, one.reason) for one in report.leftover] == [
        ("QuantizeLinear", "graph input"),
        ("DequantizeLinear", "graph output"),
    ]
    assert report.floats == ()


def test_a_float_weight_that_ort_quantizes_by_itself_is_a_warning():
    graph = Graph()
    x = graph.quantized(graph.input(1, 8, 5, 5))
    own = graph.quantized(graph.op("Conv", x, graph.constant(RANDOM.random((8, 8, 1, 1), np.float32))))
    report = coverage(graph.model(graph.quantized(conv(graph, own))))
    assert report.kernels == {"conv": (2, 2)}
    warning = "ORT itself quantizes the float weight, with one scale for all channels"
    assert [one.warning for one in report.layers] == [warning, ""]
    assert f"warnings:\n  1 x QLinearConv: {warning}  (Conv_node)" in str(report)


def test_share_is_by_multiply_accumulates_not_by_kernels():
    graph = Graph()
    x = graph.quantized(graph.input(1, 4, 5, 5))
    small = graph.quantized(graph.op("Conv", x, graph.weight(4, 4, 1, 1)))
    y = graph.op("Conv", small, graph.constant(np.ones((4, 4, 3, 3), np.float32)), pads=[1] * 4)
    report = coverage(graph.model(y))
    assert report.kernels == {"conv": (1, 2)}
    assert report.integer_share == pytest.approx(1 / 10)
    assert [(one.op, one.reason, one.macs) for one in report.floats] == [
        ("Conv", "its weight is not quantized", 25 * 16 * 9)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("activations", "convs", "adds", "left"), [("QUInt8", 20, 8, 2), ("QInt8", 9, 0, 72)])
def test_kernels_are_those_of_the_graph_that_ort_runs(tmp_path, activations, convs, adds, left):
    torchvision = pytest.importorskip("torchvision")
    quantization = pytest.importorskip("onnxruntime.quantization")
    x = torch.randn(1, 3, 64, 64)
    net = torchvision.models.resnet18().eval()
    gm = fxopt.optimize(fxopt.capture(net, (x,), modes="current", verify=False), "fold-batch-norm")
    to_onnx(gm, tmp_path / "float.onnx", validate=False)
    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "integer.onnx",
        Calibration("x", x),
        per_channel=True,
        activation_type=quantization.QuantType[activations],
    )
    report = coverage(tmp_path / "integer.onnx")
    ran = Counter(node.op_type for node in optimized_model(tmp_path / "integer.onnx", optimization="all").graph)
    assert report.kernels["conv"] == (ran["QLinearConv"], ran["QLinearConv"] + ran["Conv"]) == (convs, 20)
    assert report.kernels["add"] == (ran["QLinearAdd"], ran["QLinearAdd"] + ran["Add"]) == (adds, 8)
    assert report.kernels["linear"] == (ran["QGemm"], 1)
    assert len(report.leftover) == ran["QuantizeLinear"] + ran["DequantizeLinear"] == left
    assert report.macs == by_torch(net, x)
    assert (report.integer_share == 1.0) == (convs == 20)
    mixed_types = {"its input is int8 and its output uint8", "its input is uint8 and its output int8"}
    assert {one.reason for one in report.floats} <= mixed_types
    assert len(report.floats) == 20 - convs


@pytest.mark.parametrize(("level", "kind"), [(4, "integer"), (0, "weight-only")])
def test_matmul_of_packed_weights_is_integer_only_where_activations_become_integers(level, kind):
    graph = Graph()
    packed, scales = graph.constant(np.full((8, 1, 32), 9, np.uint8)), graph.constant(np.ones(8, np.float32))
    y = graph.op(
        "MatMulNBits", graph.input(3, 32), packed, scales, domain="com.microsoft",
        K=32, N=8, bits=8, block_size=32, accuracy_level=level,
    )  # fmt: skip
    report = coverage(graph.model(y))
    assert [(one.kind, one.macs) for one in report.layers] == [(kind, 3 * 32 * 8)]
    assert (report.integer_share, report.weight_only_share) == ((1, 0) if kind == "integer" else (0, 1))
    assert ("integer weights with float activations 100.0 %" in str(report)) == (kind == "weight-only")


def test_additions_of_constants_and_other_shapes_are_no_residual_additions():
    def forward(x):
        return (x + torch.ones(3, 4)) + x.mean(0), x.shape[0] + torch.arange(3)

    assert coverage(exported(forward, torch.randn(3, 4))).kernels == {}
    assert coverage(exported(lambda x: torch.tanh(x) + x, torch.randn(3, 4))).kernels == {"add": (0, 1)}


# -- where it comes from -----------------------------------------------------------------------------------------------


def test_fused_kernels_keep_the_node_and_the_line_of_the_user():
    def forward(x, w):
        return F.conv2d(x, w).relu() @ w[0, 0, :3]

    file = exported(forward, torch.randn(1, 2, 6, 6), torch.randn(3, 2, 4, 4))
    names = [node.name for node in file.model.graph]
    report = coverage(file)
    assert [node.name for node in file.model.graph] == names
    conv_kernel = next(one for one in report.floats if one.layer == "conv")
    assert conv_kernel.op == "FusedConv"
    assert conv_kernel.node == "conv2d"
    assert conv_kernel.source.startswith("test_coverage.py:")
    assert "F.conv2d(x, w)" in conv_kernel.source


# -- what it runs on ---------------------------------------------------------------------------------------------------


def test_sizes_of_dynamic_axes_scale_the_count():
    file = to_onnx(captured(nn.Linear(3, 5), torch.randn(4, 3)), validate=False)
    assert [coverage(file, sizes=sizes).macs for sizes in (None, {"n4": 1}, {"n4": 6})] == [15, 15, 90]
    assert coverage(file, [torch.randn(7, 3)]).macs == 7 * 15
    with pytest.raises(ValueError, match="sizes names batch; the model has n4"):
        coverage(file, sizes={"batch": 2})
    with pytest.raises(ValueError, match="leave out one of them"):
        coverage(file, [torch.randn(7, 3)], sizes={"n4": 7})


def test_drawn_identifiers_are_legal_and_masks_let_all_through():
    def forward(ids, mask):
        return F.linear(F.embedding(ids, torch.ones(2, 4)), torch.ones(3, 4))[mask.bool()]

    ids, mask = torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    report = coverage(to_onnx(fxopt.capture(forward, (ids, mask), modes="current", verify=False), validate=False))
    assert report.macs == 5 * 4 * 3


def test_models_on_disk_with_weights_beside_them(tmp_path):
    file = exported(nn.Linear(40, 30), torch.randn(2, 40)).save(tmp_path / "net.onnx", external_data="always")
    assert (tmp_path / "net.onnx.data").exists()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert coverage(tmp_path / "net.onnx").macs == coverage(file).macs == 2400
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_cannot_be_read_or_run_is_told(tmp_path):
    with pytest.raises(fxopt.ExportError, match="cannot read the model"):
        coverage(b"not a model")
    with pytest.raises(fxopt.ExportError, match="cannot read the model"):
        coverage(tmp_path / "nothing.onnx")
    file = exported(nn.Linear(3, 5), torch.randn(4, 3))
    with pytest.raises(fxopt.ExportError, match="fails to run the model") as caught:
        coverage(file, [torch.randn(4, 2)])
    assert caught.value.__notes__ == ["try: coverage(model, inputs=...) with inputs that the model was made for"]


# -- the report --------------------------------------------------------------------------------------------------------


def test_report_for_people_and_for_programs():
    graph = Graph()
    y = conv(graph, graph.quantized(graph.input(1, 8, 4, 4)))
    report = coverage(graph.model(graph.op("Abs", y)))
    lines = str(report).splitlines()
    assert [*lines[:6], *sorted(lines[6:])] == [
        "integer kernels do 0.0 % of 9,216 multiply-accumulates",
        "  layer  integer  all  share of all MACs  of these integer",
        "  conv   0        1    100.0 %            0.0 %",
        "in float:",
        "  1 x Conv: nothing quantizes its output, read by Abs  (Conv_node)",
        "QuantizeLinear and DequantizeLinear left: 3",
        "  1 x DequantizeLinear: read by Conv (nothing quantizes its output, read by Abs)  (Conv_node)",
        "  1 x DequantizeLinear: weight of Conv (nothing quantizes its output, read by Abs)  (Conv_node)",
        "  1 x QuantizeLinear: graph input  (QuantizeLinear_node)",
    ]
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["kernels"] == {"conv": [0, 1]}
    assert plain["layers"][0]["macs"] == plain["macs"] == 9216
    assert CoverageReport((), ()).integer_share == 0.0
