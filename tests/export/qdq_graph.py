"""Small ONNX graphs in QDQ form, made node by node."""

from typing import Any

import numpy as np
import onnx
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


def conv(graph: Graph, x: str) -> str:
    """Return a convolution from 8 channels to 8 with quantized weights."""
    return graph.op("Conv", x, graph.weight(8, 8, 3, 3), pads=[1] * 4)
