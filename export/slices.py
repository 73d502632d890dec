"""Cut an ONNX model into the parts that compute one value from others, each a model of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import onnx_ir as ir

from fxopt.export.finish import bodies_of

__all__ = ["Slice", "Slicer", "sources"]


@dataclasses.dataclass(frozen=True)
class Slice:
    """What computes one value.

    Attributes:
        output: Name of the value.
        inputs: Names of the values that it is computed from.
        nodes: The operators in between, in order.
        constants: Initializers that they read.
    """

    output: ir.Value
    inputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    constants: tuple[ir.Value, ...]

    def model(self, like: ir.Model) -> ir.Model:
        """Return the part as a model; ``like`` is the whole, which stays as it is."""
        view = ir.GraphView(
            list(self.inputs),
            [self.output],
            nodes=list(self.nodes),
            initializers=list(self.constants),
            opset_imports=like.graph.opset_imports,
            name="slice",
        )
        return ir.Model(view.clone(), ir_version=like.ir_version)


class Slicer:
    """Cuts the main graph of one model at values that are known."""

    def __init__(self, model: ir.Model, known: Collection[ir.Value]) -> None:
        """Args: model: left alone. known: values at which to cut; inputs of the model always are."""
        self._place = {node: place for place, node in enumerate(model.graph)}
        self._known = frozenset(known) | frozenset(model.graph.inputs)

    def of(self, value: ir.Value) -> Slice:
        """Return what computes ``value`` from the nearest known values."""
        nodes: set[ir.Node] = set()
        inputs: dict[ir.Value, None] = {}
        constants: dict[ir.Value, None] = {}
        producer = value.producer()
        waiting = [] if producer is None else [producer]
        while waiting:
            node = waiting.pop()
            if node in nodes:
                continue
            nodes.add(node)
            for source in sources(node):
                made_by = source.producer()
                if source in self._known:
                    inputs[source] = None
                elif made_by is not None:
                    waiting.append(made_by)
                else:
                    constants[source] = None
        return Slice(value, tuple(inputs), tuple(sorted(nodes, key=self._place.__getitem__)), tuple(constants))


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
