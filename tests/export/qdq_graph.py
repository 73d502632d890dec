"""Small ONNX graphs in QDQ form, made node by node, and what ORT's quantizer makes them of."""

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

RANDOM = np.random.default_rng(0)
INTEGERS = {"u8": np.uint8, "s8": np.int8, "u16": np.uint16}


class Graph:
    """Builds ONNX graphs in QDQ form, one call a node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_node", domain=domain, **attributes))
        return output

    def constant(self, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"constant_{len(self.constants)}"))
        return self.constants[-1].name

    def input(self, *shape: Any, name: str | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name or f"x{len(self.inputs)}", TensorProto.FLOAT, shape))
        return self.inputs[-1].name

    def quantized(self, x: str, scale: float = 0.02, zero_point: int = 128, kind: str = "u8") -> str:
        parameters = [self.constant(np.float32(scale)), self.constant(INTEGERS[kind](zero_point))]
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *parameters), *parameters)

    def weight(self, *shape: int, axis: int = 0) -> str:
        scale = np.full(shape[axis], 0.01, np.float32)
        parameters = [self.constant(scale), self.constant(np.zeros_like(scale, np.int8))]
        numbers = self.constant(RANDOM.integers(-60, 60, shape).astype(np.int8))
        return self.op("DequantizeLinear", numbers, *parameters, axis=axis)

    def model(self, *outputs: str, opset: int = 21) -> bytes:
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, results, self.constants)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


_PRODUCT = """
<ir_version: 10, opset_import: ["" : 21]>
quantized (float[rows, terms] a) => (float[rows, columns] y)
<float one = {{1.0}}, float large = {{512.0}}, {kind} zero = {{{zero}}}>
{{
    q = QuantizeLinear(a, one, zero)
    x = DequantizeLinear(q, one, zero)
    held = DequantizeLinear(w, one)
    p = MatMul(x, held)
    r = QuantizeLinear(p, large, zero)
    y = DequantizeLinear(r, large, zero)
}}
"""


def product(weight: np.ndarray, kind: str) -> bytes:
    """Return a product of 0 to 255 in steps of 1 with i8[terms, columns], in steps of 512 from 0 on."""
    model = onnx.parser.parse_model(_PRODUCT.format(kind=kind, zero=np.iinfo(kind).min))
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model.SerializeToString()


def conv(graph: Graph, x: str) -> str:
    """Return a convolution from 8 channels to 8 with quantized weights."""
    return graph.op("Conv", x, graph.weight(8, 8, 3, 3), pads=[1] * 4)


class Calibration:
    """One batch of inputs for ORT's quantizer."""

    def __init__(self, name: str, batch: torch.Tensor) -> None:
        self.batches = iter([{name: batch.numpy()}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)
