"""Cut an ONNX model into the parts that compute one value from others, each a model of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

import onnx_ir as ir
import torch

from fxopt.errors import ExportError, describe
from fxopt.export.dtypes import onnx_dtype
from fxopt.export.finish import bodies_of
from fxopt.export.session import Session

__all__ = ["Slice", "Slicer", "given_inputs", "sources"]


@dataclasses.dataclass(frozen=True)
class Slice:
    """What computes some values, mostly one.

    Attributes:
        outputs: The values.
        inputs: The values that they are computed from.
        nodes: The operators in between, in order.
        constants: Initializers that they read.
    """

    outputs: tuple[ir.Value, ...]
    inputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    constants: tuple[ir.Value, ...]

    @property
    def output(self) -> ir.Value:
        """The value, where it is one."""
        (value,) = self.outputs
        return value

    @property
    def operators(self) -> tuple[str, ...]:
        """The types of the operators."""
        return tuple(node.op_type for node in self.nodes)

    def model(self, like: ir.Model) -> ir.Model:
        """Return the part as a model; ``like`` is the whole, which stays as it is."""
        view = ir.GraphView(
            list(self.inputs),
            list(self.outputs),
            nodes=list(self.nodes),
            initializers=list(self.constants),
            opset_imports=like.graph.opset_imports,
            name="slice",
        )
        part = ir.Model(view.clone(), ir_version=like.ir_version, functions=list(like.functions.values()))
        try:
            return ir.external_data.load_to_model(part)
        except (OSError, ValueError) as error:
            raise ExportError(describe("cannot read the weights of the model", because=str(error))) from error

    def session(
        self,
        like: ir.Model,
        held: Mapping[ir.Value, torch.Tensor],
        *,
        constant: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Callable[[Mapping[ir.Value, torch.Tensor]], torch.Tensor]:
        """Return what runs the part in ORT, its optimizer off.

        Args:
            like: The whole.
            held: Tensors like those that the inputs will get, of which the types are read that the file leaves out.
            constant: What to put in place of each floating-point initializer.
        """
        part = self.model(like)
        for value, source in zip(part.graph.inputs, self.inputs, strict=True):
            if value.type is None:
                value.type = ir.TensorType(onnx_dtype(held[source].dtype))
        if constant is not None:
            for value in part.graph.initializers.values():
                _replace(value, constant)
        session = Session(ir.to_proto(part).SerializeToString(), optimization="none")
        names = {source: str(source.name) for source in self.inputs}

        def run(inputs: Mapping[ir.Value, torch.Tensor]) -> torch.Tensor:
            (result,) = session.run({name: inputs[source] for source, name in names.items()})
            return result

        return run


def _replace(value: ir.Value, constant: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return
    changed = constant(torch.from_numpy(tensor.numpy().copy()))
    value.const_value = ir.tensor(changed.numpy(), name=str(value.name))


class Slicer:
    """Cuts the main graph of one model at values that are known."""

    def __init__(self, model: ir.Model, known: Collection[ir.Value]) -> None:
        """Args: model: left alone. known: values at which to cut; inputs of the model always are."""
        self._place = {node: place for place, node in enumerate(model.graph)}
        self._known = frozenset(known) | frozenset(given_inputs(model))

    def place(self, value: ir.Value) -> int:
        """Return the position of the node that yields a value."""
        producer = value.producer()
        return -1 if producer is None else self._place[producer]

    def of(self, *values: ir.Value, inside: ir.Value | None = None) -> Slice:
        """Return what computes values from the nearest known ones; ``inside`` is not taken for known."""
        nodes: set[ir.Node] = set()
        inputs: dict[ir.Value, None] = {}
        constants: dict[ir.Value, None] = {}
        waiting = [producer for value in values if (producer := value.producer()) is not None]
        while waiting:
            node = waiting.pop()
            if node in nodes:
                continue
            nodes.add(node)
            for source in sources(node):
                made_by = source.producer()
                if source in self._known and source is not inside:
                    inputs[source] = None
                elif made_by is not None:
                    waiting.append(made_by)
                else:
                    constants[source] = None
        return Slice(values, tuple(inputs), tuple(sorted(nodes, key=self._place.__getitem__)), tuple(constants))


def given_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that a caller must give; the others have a default."""
    return [value for value in model.graph.inputs if value.const_value is None]


def sources(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that a node reads, those that its branches or its body read from around it included."""
    yield from (value for value in node.inputs if value is not None)
    inner = [graph for attribute in node.attributes.values() for graph in bodies_of(attribute)]
    own = {id(value) for graph in inner for value in _values_of(graph)}
    for graph in inner:
        for reader in ir.traversal.RecursiveGraphIterator(graph):
            yield from (value for value in reader.inputs if value is not None and id(value) not in own)
        yield from (value for value in graph.outputs if id(value) not in own)


def _values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values that a body and the bodies inside it make or take."""
    for body in (graph, *graph.subgraphs()):
        yield from body.inputs
        yield from body.initializers.values()
        for node in body:
            yield from node.outputs
