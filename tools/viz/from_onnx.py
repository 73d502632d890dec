"""The description of an ONNX model, whoever made it: bodies of If, Loop and Scan and of functions are groups.

Where nodes come from is read from the metadata that fxopt and torch.onnx write, or from names with slashes, as older
exporters gave them: ``/layer1/conv/Conv``.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxopt.export import OnnxFile
from fxopt.export.coverage_table import KERNELS, Call
from fxopt.export.files import load_model
from fxopt.export.origins import scopes_of, source_of
from fxopt.export.shape_inference import infer_types
from fxopt.tools.viz.from_fx import found_values
from fxopt.tools.viz.kinds import kind_of, with_numbers
from fxopt.tools.viz.model import Edge, Graph, Node, Number, Weight
from fxopt.tools.viz.weights import describe_tensor

__all__ = ["onnx_graph"]

_LARGEST_EXTERNAL = 2**22  # bytes of a weight in another file up to which it is read
_MOST_NODES = 20_000  # beyond which calls of functions stay closed
_SHORT = {
    "FLOAT": "f32", "DOUBLE": "f64", "FLOAT16": "f16", "BFLOAT16": "bf16", "BOOL": "bool", "INT8": "i8", "INT16": "i16",
    "INT32": "i32", "INT64": "i64", "UINT8": "u8", "UINT16": "u16", "UINT32": "u32", "UINT64": "u64",
}  # fmt: skip


def onnx_graph(model: OnnxFile | ir.Model | str | os.PathLike[str] | bytes, *, title: str = "") -> Graph:
    """Return the description of a model.

    Args:
        model: A file, its bytes, or a model in memory. Weights in other files are read only where they are small.
        title: Of the page.

    Raises:
        ExportError: the file cannot be read.
    """
    loaded = load_model(model)
    with_shapes = infer_types(loaded)
    reader = _Reader(loaded)
    reader.read(loaded.graph, "", (), {})
    notes = [] if with_shapes else ["the types of inner values are not known: ONNX's shape inference refuses the model"]
    if reader.closed:
        notes.append(f"{reader.closed} calls of functions are not opened: the model has more than {_MOST_NODES} nodes")
    if reader.unread:
        name, reason = next(iter(reader.unread.items()))
        notes.append(f"the values of {len(reader.unread)} weights cannot be read; {name}: {reason}")
    return Graph(tuple(reader.nodes), title, tuple(notes))


class _Reader:
    def __init__(self, model: ir.Model) -> None:
        self.nodes: list[Node] = []
        self.closed = 0
        self.unread: dict[str, str] = {}
        self._model = model
        self._ids: set[str] = set()
        self._by_id: dict[str, Node] = {}
        self._weights: dict[ir.Value, Weight] = {}

    def read(
        self,
        graph: ir.Graph | ir.Function,
        prefix: str,
        path: tuple[str, ...],
        outer: Mapping[ir.Value, str],
        operands: tuple[ir.Value | None, ...] = (),
    ) -> list[tuple[str, ir.Value]]:
        """Add the nodes of a graph; return the id of the node behind each of its outputs, with the value.

        Args:
            graph: The main graph, the body of a node, or a function.
            prefix: Of the ids of its nodes.
            path: The groups around it.
            outer: Ids of the nodes behind the values that can be read from around it.
            operands: What its inputs stand for; the main graph's inputs stand for nothing.
        """
        made = dict(outer)
        held = set() if isinstance(graph, ir.Function) else set(graph.initializers.values())
        for index, value in enumerate(graph.inputs):
            if value in held:
                continue  # an initializer with a default that callers may replace
            operand = operands[index] if index < len(operands) else None
            made[value] = self._input(value, prefix, path, operand, outer)
        for node in graph:
            identifier = self._unique(prefix + (node.name or _first_output(node)))
            self._add(self._describe(node, identifier, path, made))
            made |= dict.fromkeys(node.outputs, identifier)
        if not prefix:
            for value in graph.outputs:
                self._output(value, made)
        return [(made[value], value) for value in graph.outputs if value in made]

    def _input(
        self,
        value: ir.Value,
        prefix: str,
        path: tuple[str, ...],
        operand: ir.Value | None,
        outer: Mapping[ir.Value, str],
    ) -> str:
        identifier = self._unique(prefix + str(value.name))
        edges = (Edge(outer[operand], "input", _type(operand)),) if operand in outer and operand is not None else ()
        weights = (self._weight("input", operand),) if operand is not None and _is_constant(operand) else ()
        self._add(
            Node(
                id=identifier,
                op="input",
                kind="input",
                path=path,
                inputs=edges,
                outputs=(_type(value),),
                weights=weights,
                origins=(str(value.name),),
                values=found_values(None, _bytes(value), _dtype(value), ()),
            )
        )
        return identifier

    def _output(self, value: ir.Value, made: Mapping[ir.Value, str]) -> None:
        edges = (Edge(made[value], "value", _type(value)),) if value in made else ()
        weights = (self._weight("value", value),) if _is_constant(value) else ()
        identifier = self._unique(f"output {value.name}")
        self._add(Node(identifier, "output", "output", inputs=edges, weights=weights, origins=(identifier,)))

    def _add(self, node: Node) -> None:
        node = with_numbers(node, self._by_id)
        self.nodes.append(node)
        self._by_id[node.id] = node

    def _describe(
        self, node: ir.Node, identifier: str, outer_path: tuple[str, ...], made: Mapping[ir.Value, str]
    ) -> Node:
        path = (*outer_path, *scopes_of(node))
        names = _argument_names(node)
        read = [(names[i], value) for i, value in enumerate(node.inputs) if value is not None]
        edges = [Edge(made[value], argument, _type(value)) for argument, value in read if value in made]
        edges += self._inside(node, identifier, path, made)
        weights = tuple(self._weight(argument, value) for argument, value in read if _is_constant(value))
        if (constant := _constant_of(node)) is not None:
            weights = (*weights, self._statistics("value", identifier, constant))
        op = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        made_by = node.metadata_props
        return Node(
            id=identifier,
            op=op,
            kind=kind_of(op),
            path=path,
            inputs=tuple(edges),
            outputs=tuple(_type(value) for value in node.outputs if value.name),
            attributes=tuple(_attributes(node)),
            weights=weights,
            line=source_of(node),
            pass_name=made_by.get("fxopt.pass", ""),
            origins=(made_by.get("fxopt.node") or identifier,),
            values=self._values(node, weights),
        )

    def _inside(
        self, node: ir.Node, identifier: str, path: tuple[str, ...], made: Mapping[ir.Value, str]
    ) -> list[Edge]:
        """Add the graphs that a node runs, and return edges from what they yield."""
        inner: list[tuple[str, ir.Graph | ir.Function, tuple[ir.Value | None, ...]]] = [
            (name if place is None else f"{name}[{place}]", body, () if node.op_type == "If" else tuple(node.inputs))
            for name, place, body in _bodies(node)
        ]
        function = self._model.functions.get(node.op_identifier())
        if function is not None:
            if len(self.nodes) + len(function) > _MOST_NODES:
                self.closed += 1
            else:
                inner.append((node.op_type, function, tuple(node.inputs)))
        edges = []
        for name, body, operands in inner:
            label = f"{identifier}: {name}"
            results = self.read(body, f"{identifier}/{name}/", (*path, label), made, operands)
            edges += [Edge(source, f"{name}[{i}]", _type(value)) for i, (source, value) in enumerate(results)]
        return edges

    def _unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._ids:
            count += 1
            candidate = f"{name}#{count}"
        self._ids.add(candidate)
        return candidate

    def _weight(self, argument: str, value: ir.Value) -> Weight:
        if value not in self._weights:
            tensor = value.const_value
            assert tensor is not None
            self._weights[value] = self._statistics(argument, str(value.name), tensor)
        return dataclasses.replace(self._weights[value], argument=argument)

    def _statistics(self, argument: str, name: str, tensor: ir.TensorProtocol) -> Weight:
        type_ = f"{_short(tensor.dtype)}[{', '.join(map(str, tensor.shape))}]"
        plain = Weight(name, argument, type_, tensor.nbytes, int(tensor.size))
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > _LARGEST_EXTERNAL:
            return plain
        if tensor.dtype == ir.DataType.STRING:
            return plain
        try:
            values = np.asarray(tensor.numpy())
        except (OSError, ValueError) as error:  # the graph can be looked at without its weights
            self.unread[name] = str(error)
            return plain
        if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
            return plain
        if values.dtype.kind == "u" and values.dtype.itemsize > 1:
            values = values.astype(np.float64)
        described = describe_tensor(name, argument, torch.from_numpy(np.array(values)))
        return dataclasses.replace(described, type=type_, bytes=tensor.nbytes)

    def _values(self, node: ir.Node, weights: tuple[Weight, ...]) -> dict[str, Number | str]:
        first = node.outputs[0] if node.outputs else None
        dtype = None if first is None else _dtype(first)
        return found_values(_macs(node), None if first is None else _bytes(first), dtype, weights)


def _first_output(node: ir.Node) -> str:
    return next((str(value.name) for value in node.outputs if value.name), node.op_type)


def _bodies(node: ir.Node) -> list[tuple[str, int | None, ir.Graph]]:
    found: list[tuple[str, int | None, ir.Graph]] = []
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            found.append((name, None, attribute.as_graph()))
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            found += [(name, place, body) for place, body in enumerate(attribute.as_graphs())]
    return found


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.producer() is None


def _constant_of(node: ir.Node) -> ir.TensorProtocol | None:
    if node.op_type != "Constant" or "value" not in node.attributes or node.attributes["value"].is_ref():
        return None
    return node.attributes["value"].as_tensor()


def _argument_names(node: ir.Node) -> list[str]:
    import onnx

    count = len(node.inputs)
    try:
        schema = onnx.defs.get_schema(node.op_type, node.version or 22, node.domain)
    except onnx.defs.SchemaError:
        return [f"input {i}" for i in range(count)]
    names = [parameter.name for parameter in schema.inputs]
    last = names[-1] if names else "input"
    return [names[i] if i < len(names) else f"{last}[{i}]" for i in range(count)]


def _short(dtype: ir.DataType) -> str:
    return _SHORT.get(dtype.name, dtype.name.lower())


def _type(value: ir.Value) -> str:
    if value.type is None:
        return ""
    if not isinstance(value.type, ir.TensorType):
        return str(value.type)
    shape = "" if value.shape is None else f"[{', '.join(_size(size) for size in value.shape)}]"
    return _short(value.type.dtype) + shape


def _size(size: Any) -> str:
    text = str(size) if isinstance(size, int) else size.value
    return "?" if text is None else text


def _dtype(value: ir.Value) -> str | None:
    return None if value.dtype is None else value.dtype.name.lower()


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the sizes of a value; a dynamic size counts as 1."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else 1 for size in value.shape)


def _bytes(value: ir.Value) -> int | None:
    shape = _shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    return math.ceil(math.prod(shape) * value.dtype.itemsize)


def _macs(node: ir.Node) -> int | None:
    kernel = KERNELS.get(node.op_type)
    shapes = [_shape(value) for value in node.inputs], [_shape(value) for value in node.outputs]
    if kernel is None or any(shapes[0][i] is None for i in kernel.operands if i < len(shapes[0])) or None in shapes[1]:
        return None
    plain = {name: held.value for name, held in node.attributes.items() if not held.is_ref()}
    return kernel.macs(Call(plain, tuple(shapes[0]), tuple(shapes[1])))


def _attributes(node: ir.Node) -> list[tuple[str, str]]:
    shown = []
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            shown.append((name, f"@{attribute.ref_attr_name}"))
        elif attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        else:
            held = attribute.value
            shown.append((name, ", ".join(map(str, held)) if isinstance(held, list | tuple) else str(held)))
    return shown
