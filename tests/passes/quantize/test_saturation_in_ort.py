"""Which pairs ORT's kernels add in 16 bits, and that the emulation is right: on a CPU that saturates."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from fxopt.export import Session
from fxopt.passes.quantize.insert_qdq import weight_integers
from fxopt.passes.quantize.saturation import avoid_saturation
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.weights import channel_scales
from tests.export import qdq_graph
from tests.passes.quantize import avx2

MISSING = avx2.oracle_missing()
pytestmark = [
    pytest.mark.ort,
    pytest.mark.skipif(MISSING is not None, reason=f"ORT does not saturate here: {MISSING}"),
]
SPEC = QuantSpec("weight", 8, signed=True, symmetric=True, axis=0)
f32, u8, i8 = np.float32, np.uint8, np.int8
MS = "com.microsoft"


def one_node(
    op: str, inputs: dict[str, Any], *, fed: tuple[str, ...] = (), domain: str = "", **attributes: Any
) -> tuple[bytes, list[np.ndarray]]:
    """Return a model of one operator and what it is fed; the other inputs are constants."""
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    node = helper.make_node(op, list(arrays), ["y"], domain=domain, **attributes)
    shown = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(arrays[name].dtype), arrays[name].shape)
        for name in fed
    ]
    kept = [numpy_helper.from_array(value, name) for name, value in arrays.items() if name not in fed]
    graph = helper.make_graph([node], "g", shown, [onnx.ValueInfoProto(name="y")], kept)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), [arrays[name] for name in fed]


def run_node(op: str, inputs: dict[str, Any], **options: Any) -> np.ndarray:
    model, feeds = one_node(op, inputs, **options)
    session = Session(model, optimization="none", threads=1)
    return session.run([torch.from_numpy(array) for array in feeds])[0].numpy()


def one_pair_a_channel(k: int, value: int, dtype: type = i8) -> tuple[list[tuple[int, int]], np.ndarray]:
    pairs = list(itertools.combinations(range(k), 2))
    weight = np.zeros((len(pairs), k), dtype)
    for row, pair in zip(weight, pairs, strict=True):
        row[list(pair)] = value
    return pairs, weight


def wrong_pairs(pairs: list[tuple[int, int]], got: np.ndarray, want: np.ndarray) -> list[tuple[int, int]]:
    wrong = (got.astype(np.float64) != want).reshape(-1, len(pairs)).any(0)
    return [pair for pair, is_wrong in zip(pairs, wrong, strict=True) if is_wrong]


def product(op: str, a: np.ndarray, w: np.ndarray, fed: tuple[str, ...], per_channel: bool) -> tuple[np.ndarray, int]:
    """Return what ORT makes of a times w [K, N] with scales of 1, and the output's scale."""
    zero, w_zero, w_scale = np.array(0, a.dtype), np.array(0, w.dtype), f32(1)
    if per_channel:
        w_zero, w_scale = np.zeros(w.shape[1], w.dtype), np.ones(w.shape[1], f32)
    given_a, given_w = {"a": a, "as": f32(1), "az": zero}, {"w": w, "ws": w_scale, "wz": w_zero}
    out = {"ys": f32(512), "yz": np.array(0 if a.dtype == i8 else 128, a.dtype)}
    if op == "MatMulInteger":
        return run_node(op, {"a": a, "w": w}, fed=fed), 1
    if op == "MatMulIntegerToFloat":
        order = {"a": a, "w": w, "as": f32(1), "ws": w_scale, "az": zero, "wz": w_zero}
        return run_node(op, order, fed=fed, domain=MS), 1
    if op == "DynamicQuantizeMatMul":
        got = run_node(op, {"a": a.astype(f32), "w": w, "ws": w_scale, "wz": w_zero}, fed=fed, domain=MS)
        return np.rint(got), 1
    if op == "QLinearMatMul":
        return run_node(op, {**given_a, **given_w, **out}, fed=fed), 512
    bias = {"c": np.zeros(w.shape[1], np.int32)}
    if op == "QGemm":
        return run_node(op, {**given_a, **given_w, **bias, **out}, fed=fed, domain=MS), 512
    given_w["w"] = w.T.copy()
    return run_node("QGemm", {**given_a, **given_w, **bias, **out}, fed=fed, domain=MS, transB=1), 512


PRODUCTS = (
    "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QGemm transB",
)  # fmt: skip
INTEGER_PRODUCTS = tuple(op for op in PRODUCTS if op != "DynamicQuantizeMatMul")


def scaled(sums: np.ndarray, scale: int, dtype: np.dtype) -> np.ndarray:
    if scale == 1:
        return sums
    zero = 0 if dtype == i8 else 128
    return np.clip(np.rint(sums / scale) + zero, np.iinfo(dtype).min, np.iinfo(dtype).max)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("fed", [("a",), ("a", "w")], ids=["constant", "computed"])
@pytest.mark.parametrize("op", PRODUCTS)
def test_products_pair_consecutive_inputs(op, fed, rows):
    for k, value, per_channel in itertools.product((2, 5, 11), (127, -128), (False, True)):
        pairs, weight = one_pair_a_channel(k, value)
        a = np.full((rows, k), 255, u8)
        got, scale = product(op, a, weight.T.copy(), fed, per_channel)
        want = scaled(a.astype(int) @ weight.T.astype(int), scale, a.dtype)
        assert wrong_pairs(pairs, got, want) == [(i, i + 1) for i in range(0, k - 1, 2)]


@pytest.mark.parametrize("op", INTEGER_PRODUCTS)
@pytest.mark.parametrize(("a_type", "w_type"), [(i8, i8), (u8, u8)])
def test_products_of_equal_signedness_are_exact(op, a_type, w_type):
    for rows, ends in itertools.product((1, 6), (max, min)):
        a = np.full((rows, 10), ends(np.iinfo(a_type).min, np.iinfo(a_type).max, key=abs), a_type)
        pairs, weight = one_pair_a_channel(10, np.iinfo(w_type).max, w_type)
        got, scale = product(op, a, weight.T.copy(), ("a",), False)
        assert wrong_pairs(pairs, got, scaled(a.astype(int) @ weight.T.astype(int), scale, a.dtype)) == []


def ort_convolution(
    image: np.ndarray,
    weight: np.ndarray,
    *,
    last: bool,
    fed: tuple[str, ...],
    zero: int,
    scales: Any,
    out: float,
    **attrs,
) -> np.ndarray:
    inputs = {
        "x": np.moveaxis(image, 1, -1).copy() if last else image, "xs": f32(1), "xz": np.array(zero, image.dtype),
        "w": weight, "ws": scales, "wz": np.zeros(scales.shape, weight.dtype),
        "ys": f32(out), "yz": np.array(128, u8), "b": np.zeros(len(weight), np.int32),
    }  # fmt: skip
    if last:
        attrs["channels_last"] = 1
    got = run_node("QLinearConv", inputs, fed=fed, domain=MS if last else "", **attrs)
    return np.moveaxis(got, -1, 1) if last else got


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("fed", [("x",), ("x", "w")], ids=["constant", "computed"])
@pytest.mark.parametrize(
    ("channels", "kernel"),
    [(3, (3, 3)), (4, (2, 2)), (8, (1, 1)), (5, (1, 1)), (1, (3, 3)), (3, (3,)), (4, (5,)), (2, (2, 1, 2))],
)
def test_convolutions_pair_channels_within_positions(channels, kernel, fed, last):
    positions = int(np.prod(kernel))
    pairs, weight = one_pair_a_channel(channels * positions, 127)
    weight = weight.reshape(-1, channels, *kernel)
    image = np.full((1, channels, *(side + 2 for side in kernel)), 255, u8)
    scales = np.ones(len(weight), f32)
    got = ort_convolution(image, weight, last=last, fed=fed, zero=0, scales=scales, out=512.0)
    got = np.moveaxis(got, 1, -1)
    order = [c * positions + p for p in range(positions) for c in range(channels)]
    expected = {tuple(sorted(order[i : i + 2])) for i in range(0, len(order) - 1, 2)}
    assert set(wrong_pairs(pairs, got, np.full(got.shape, min(255, 128 + round(255 * 254 / 512))))) == expected


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("k", [1, 4, 9, 129, 1027])
def test_emulated_product_equals_ort_bit_for_bit(k, rows):
    random = np.random.default_rng(k)
    a = np.where(random.random((rows, k)) < 0.5, 255, random.integers(0, 256, (rows, k))).astype(u8)
    w = random.integers(-128, 128, (k, 37)).astype(i8)
    got = run_node("MatMulInteger", {"a": a, "w": w, "az": u8(7), "wz": i8(3)}, fed=("a",))
    assert (got == avx2.matmul(a, w, (7, 3))).all()
    if k > 4:
        assert (got != avx2.matmul(a, w, (7, 3), exact=True)).any()


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("out", "channels", "groups", "kernel", "strides"),
    [
        (16, 3, 1, (3, 3), (2, 2)), (24, 8, 1, (3, 3), (1, 1)), (32, 12, 1, (1, 1), (1, 1)), (9, 6, 3, (3, 3), (1, 1)),
        (16, 16, 16, (3, 3), (1, 1)), (5, 5, 5, (3, 3), (2, 2)), (12, 6, 6, (3, 3), (1, 1)), (8, 4, 1, (5,), (1,)),
    ],
)  # fmt: skip
def test_emulated_convolution_equals_ort_bit_for_bit(out, channels, groups, kernel, strides, last):
    random = np.random.default_rng(out)
    image = random.choice(np.array([0, 3, 200, 255], u8), (2, channels, *(7,) * len(kernel)))
    weight = random.integers(-127, 128, (out, channels // groups, *kernel)).astype(i8)
    scales = random.uniform(0.5, 2, out).astype(f32)
    scale = float(f32(weight[0].size * 100))
    attrs = {"strides": strides, "group": groups, "pads": [1] * 2 * len(kernel)}
    got = ort_convolution(image, weight, last=last, fed=("x",), zero=3, scales=scales, out=scale, **attrs)
    options: dict[str, Any] = {"strides": strides, "padding": 1, "groups": groups}

    def emulated(exact: bool) -> np.ndarray:
        sums = np.moveaxis(avx2.convolution(image, weight, 3, exact=exact, **options), 1, -1)
        return np.moveaxis(avx2.requantize(sums, 1.0, scales, scale, 128), -1, 1)

    assert (got == emulated(exact=False)).all()
    depthwise = groups == channels == out
    assert (got == emulated(exact=True)).all() == depthwise


def test_a_convolution_of_integers_alone_is_exact():
    pairs, weight = one_pair_a_channel(12, 127)
    weight = weight.reshape(-1, 3, 2, 2)
    got = run_node("ConvInteger", {"x": np.full((1, 3, 2, 2), 255, u8), "w": weight}, fed=("x",))
    assert wrong_pairs(pairs, got, np.full(got.shape, 2.0 * 127 * 255)) == []


def test_ort_has_an_exact_mode_of_its_own():
    import onnxruntime

    a, w = np.full((2, 4), 255, u8), np.full((4, 3), 127, i8)
    model, _ = one_node("MatMulInteger", {"a": a, "w": w, "az": u8(0), "wz": i8(0)}, fed=("a",))
    got = []
    for mode in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", mode)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        got.append(int(session.run(None, {"a": a})[0][0, 0]))
    assert got == [2 * 32767, 4 * 255 * 127]


def test_ort_is_exact_with_the_raised_scales_and_was_not_before():
    weight = torch.randn(32, 8, 3, 3)
    scale = channel_scales(weight, SPEC)
    wrong = []
    for scales in (scale, avoid_saturation(weight, scale, 0)):
        spec = dataclasses.replace(SPEC, scale=scales, zero_point=(0,) * len(scales))
        held = weight_integers(weight, spec).numpy()
        image = avx2.worst_rows(held.reshape(32, -1)).reshape(-1, 8, 3, 3)
        steps = np.array(scales, f32) / f32(scales[0])
        got = ort_convolution(image, held, last=False, fed=("x",), zero=0, scales=steps, out=2000.0)
        sums = np.moveaxis(avx2.convolution(image, held, exact=True), 1, -1)
        want = np.moveaxis(avx2.requantize(sums, 1.0, steps, 2000.0, 128), -1, 1)
        wrong.append(int((got != want).sum()))
    assert wrong[0] > 0
    assert wrong[1] == 0


def test_signed_activations_of_a_file_saturate_since_ort_makes_them_unsigned():
    found = {}
    for number in (64, 127):
        file = qdq_graph.product(np.full((4, 3), number, i8), "int8")
        rows = torch.tensor([[255.0, 255, 0, 0], [255, 0, 255, 0]])  # a pair, and two halves of pairs
        plain, fused = (Session(file, optimization=level).run([rows])[0] for level in ("none", "extended"))
        found[number] = ((plain - fused) / 512).abs().amax(1).tolist()
    assert found == {64: [0, 0], 127: [round(2 * 127 * 255 / 512) - round(32767 / 512), 0]}
