"""Break one operator of an ONNX model: a wrong scale, a wrong weight, a wrong operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

WRONG_OPERATOR = {
    "Add": "Sub", "Relu": "Abs", "MaxPool": "AveragePool", "ReduceMean": "ReduceMax",
    "GlobalAveragePool": "GlobalMaxPool", "Mul": "Add", "Sigmoid": "Tanh", "Softmax": "LogSoftmax", "Clip": "Abs",
}  # fmt: skip
CHANGED = {"QuantizeLinear": 1, "DequantizeLinear": 1, "Conv": 1, "Gemm": 1, "MatMul": 1}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault that can be planted.

    Attributes:
        place: Index of the operator in the main graph.
        node: The node of the captured graph that it computes.
        kind: ``"scale"``, ``"weight"`` or ``"operator"``.
    """

    place: int
    node: str
    kind: str

    def planted(self, model: ir.Model) -> ir.Model:
        """Return a copy of a model with the fault in it."""
        broken = model.clone()
        node = broken.graph[self.place]
        if self.kind == "operator":
            _replace_operator(node)
            return broken
        position = {"scale": 1, "weight": 0 if node.op_type == "DequantizeLinear" else 1}[self.kind]
        before = node.inputs[position].const_value.numpy()
        after = before * np.float32(1.5) if self.kind == "scale" else np.roll(before, 1, 0)[..., ::-1].copy()
        name = f"wrong_{node.name}"
        value = ir.Value(name=name, const_value=ir.tensor(after, name=name), type=node.inputs[position].type)
        value.shape = ir.Shape(after.shape)
        broken.graph.register_initializer(value)
        node.replace_input_with(position, value)
        return broken


def _replace_operator(node: ir.Node) -> None:
    kept = (
        {} if node.op_type == "Clip" else {name: item for name, item in node.attributes.items() if name != "dilations"}
    )
    inputs = list(node.inputs[:1]) if node.op_type == "Clip" else list(node.inputs)
    if node.op_type == "MaxPool":
        kept = {name: item for name, item in kept.items() if name != "storage_order"}
    wrong = ir.Node("", WRONG_OPERATOR[node.op_type], inputs, kept, num_outputs=1, name=node.name)
    wrong.metadata_props.update(node.metadata_props)
    wrong.outputs[0].name, wrong.outputs[0].type = node.outputs[0].name, node.outputs[0].type
    wrong.outputs[0].shape = node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [wrong], node.outputs, wrong.outputs)


def faults(model: ir.Model) -> Iterator[Fault]:
    """Yield every fault that changes what a model computes, in the order of its operators."""
    for place, node in enumerate(model.graph):
        origin = node.metadata_props.get("fxopt.node", "")
        constants = [value is not None and value.const_value is not None for value in node.inputs]
        if node.op_type in WRONG_OPERATOR:
            yield Fault(place, origin, "operator")
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and constants[1]:
            yield Fault(place, origin, "scale")
        if node.op_type in ("DequantizeLinear", "Conv", "Gemm", "MatMul"):
            position = 0 if node.op_type == "DequantizeLinear" else 1
            if constants[position] and node.inputs[position].const_value.size > 8:
                yield Fault(place, origin, "weight")
