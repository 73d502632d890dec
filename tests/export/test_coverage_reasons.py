"""Why a kernel stays float and a quantization is left: one graph for each reason."""

from typing import Any

import numpy as np
import pytest

from fxopt.export import coverage
from tests.export.qdq_graph import Graph, conv

pytestmark = pytest.mark.ort


def matmul(graph: Graph, x: str, axis: int = 1) -> str:
    return graph.op("MatMul", x, graph.weight(8, 12, axis=axis))


def gemm(graph: Graph, x: str, **attributes: Any) -> str:
    bias = graph.constant(np.ones(12, np.float32))
    return graph.op("Gemm", x, graph.weight(8, 12, axis=1), bias, **attributes)


REASONS = {
    "its input, graph input 'x', is not quantized": lambda g, x: g.quantized(conv(g, x)),
    "its weight is not quantized": lambda g, x: g.quantized(
        g.op("MatMul", g.quantized(x), g.constant(np.ones((5, 6), np.float32)))
    ),
    "nothing quantizes its output, a graph output": lambda g, x: conv(g, g.quantized(x)),
    "nothing quantizes its output, read by Abs": lambda g, x: g.op("Abs", conv(g, g.quantized(x))),
    "its output is quantized 2 times": lambda g, x: g.op(
        "Add", *(g.quantized(y) for y in [conv(g, g.quantized(x))] * 2)
    ),
    "its output is quantized, and read as float by Tanh": lambda g, x: g.op(
        "Sub", g.quantized(y := conv(g, g.quantized(x))), g.op("Tanh", y)
    ),
    "the Relu behind it stays: the quantization behind it has zero point 128, not 0": lambda g, x: g.quantized(
        g.op("Relu", conv(g, g.quantized(x)))
    ),
    "the Clip behind it stays: it cuts off more than the quantization behind it": lambda g, x: g.quantized(
        g.op("Clip", conv(g, g.quantized(x)), g.constant(np.float32(0)), g.constant(np.float32(6))), 7 / 255, 0
    ),
    "nothing quantizes its output before the LeakyRelu behind it": lambda g, x: g.quantized(
        g.op("LeakyRelu", conv(g, g.quantized(x)))
    ),
    "ORT has no integer kernel for uint16": lambda g, x: g.quantized(
        conv(g, g.quantized(x, 0.001, 32768, "u16")), 0.001, 32768, "u16"
    ),
    "has no integer kernel": lambda g, x: g.quantized(
        g.op("ConvTranspose", g.quantized(x), g.weight(8, 8, 3, 3, axis=1))
    ),
    "the scales of its weight lie along axis 0, not 1": lambda g, x: g.quantized(matmul(g, g.quantized(x), axis=0)),
    "its alpha is 0.5, not 1": lambda g, x: g.quantized(gemm(g, g.quantized(x), alpha=0.5)),
    "nothing quantizes its output, and its bias is float": lambda g, x: gemm(g, g.quantized(x)),
    "its second input, made by Tanh, is not quantized": lambda g, x: g.quantized(
        g.op("MatMul", g.quantized(x), g.op("Tanh", g.quantized(x)))
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_float_kernel_tells_its_reason(reason):
    graph = Graph()
    shape = (8, 8) if any(word in reason for word in ("second", "axis", "alpha", "bias")) else (1, 8, 5, 5)
    report = coverage(graph.model(REASONS[reason](graph, graph.input(*shape, name="x"))))
    assert [one.reason for one in report.floats] == [reason]
    assert report.integer_share == 0


def mixed(g: Graph, x: str) -> str:
    return g.op("Tanh", g.quantized(conv(g, g.op("Tanh", g.op("Tanh", x)))))


LEFT = {
    "between QLinearConv and Tanh, which has no integer kernel": lambda g, x: g.op(
        "Tanh", g.quantized(conv(g, g.quantized(x)))
    ),
    "made by Tanh, which has no integer kernel": lambda g, x: g.quantized(conv(g, g.quantized(g.op("Tanh", x)))),
    "weight of Conv (its input, made by Tanh, is not quantized)": mixed,
    "the scales before and after Relu differ": lambda g, x: g.quantized(
        g.op("Relu", g.quantized(conv(g, g.quantized(x)))), 0.02, 0
    ),
    "read by MaxPool (the scales before and after it differ)": lambda g, x: g.quantized(
        g.op("MaxPool", g.quantized(x), kernel_shape=[2, 2]), 0.03
    ),
    "made by Add (its constant is not quantized)": lambda g, x: g.quantized(
        g.op("Add", g.quantized(x), g.constant(np.float32(1)))
    ),
    "read by Add (its inputs are uint8 and int8)": lambda g, x: g.quantized(
        g.op("Add", g.quantized(x), g.weight(5, axis=0))
    ),
    "read by Pad, which has no integer kernel": lambda g, x: g.quantized(
        g.op("Pad", g.quantized(x), g.constant(np.array([0, 0, 1, 1] * 2)))
    ),
}


@pytest.mark.parametrize("reason", LEFT)
def test_a_quantization_that_is_left_tells_its_reason(reason):
    graph = Graph()
    report = coverage(graph.model(LEFT[reason](graph, graph.input(1, 8, 5, 5))))
    assert reason in [one.reason for one in report.leftover]
