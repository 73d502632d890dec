"""Where does a model leave the path: every value of ONNX Runtime against eager PyTorch, node by node.

The graph runs in PyTorch one node at a time. Beside it, the part of the file that computes the same value runs in ORT
twice: on what PyTorch computed before it, which gives the *local* error, and on what ORT itself computed before it,
which gives the *total* one. What is not local was inherited. Only values that are still to be read are alive.

A part is what lies between values that have a name in both: one operator of ATen in a file as it was exported, one or
several in the graph that ORT made of it, where a fused kernel answers for all of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from fxopt.args import module_path, source_line
from fxopt.dimensions import Sample
from fxopt.eager_control_flow import EagerInterpreter
from fxopt.errors import ExportError, describe
from fxopt.export.blame_report import BlameReport, NodeError
from fxopt.export.files import OnnxFile, load_model
from fxopt.export.node_bounds import local_problem
from fxopt.export.session import Optimization, Session, optimized_model
from fxopt.export.slices import Slice, Slicer
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.numerics import measure

__all__ = ["blame"]

Value = tuple[torch.fx.Node, int | None]  # a node, and which of its results


def blame(
    model: OnnxFile | str | os.PathLike[str] | bytes,
    gm: CapturedModule,
    inputs: Any = None,
    *,
    optimization: Optimization = "none",
) -> BlameReport:
    """Compare every value of a model that the graph has too.

    Args:
        model: The ONNX model, exported from ``gm``; it may have been changed since.
        gm: The graph, in eval mode.
        inputs: A sample; the first of the graph if not given.
        optimization: ``"none"`` looks at the operators of the file, other levels at the kernels that ORT fuses them to
            on that level ("all" only adds layouts to "extended", and is taken for it).

    Returns:
        The errors of each value, and which nodes compute something else than they should on inputs that are right.

    Raises:
        ExportError: ORT refuses the model, or no value of it has a name that the graph knows.
    """
    sample = Sample.of(inputs) if inputs is not None else gm.samples[0]
    whole = _read(model, optimization)
    values = _shared_values(whole, gm)
    if not values or _is_of_another(whole, gm):
        raise ExportError(
            describe(
                "no value of the model has the name of a node of the graph",
                got=", ".join(str(value.name) for value in list(whole.graph.outputs)[:4]),
                wanted=", ".join(node.name for node in list(gm.graph.nodes)[-4:]),
                try_="a file that fxopt.export.to_onnx made of this very graph",
            )
        )
    comparison = _Comparison(whole, gm, values)
    with isolated(gm):
        leaves = gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
        comparison.compare(leaves)
    return BlameReport(tuple(comparison.found), optimization)


def _read(model: OnnxFile | str | os.PathLike[str] | bytes, optimization: Optimization) -> ir.Model:
    if optimization == "none":
        return load_model(model)
    source = (model.path or model.to_bytes()) if isinstance(model, OnnxFile) else model
    return optimized_model(source, optimization="extended" if optimization == "all" else optimization)


def _shared_values(model: ir.Model, gm: CapturedModule) -> dict[ir.Value, Value]:
    """Return the values of the main graph that are those of a node, with the node."""
    known: dict[str, Value] = {}
    for node in gm.graph.nodes:
        held = node.meta.get("val")
        if node.op != "call_function":
            continue
        if isinstance(held, torch.Tensor):
            known[node.name] = (node, None)
        elif isinstance(held, tuple | list):
            known |= {f"{node.name}.{i}": (node, i) for i, one in enumerate(held) if isinstance(one, torch.Tensor)}
    found = {value: known[str(value.name)] for node in model.graph for value in node.outputs if value.name in known}
    (listed,) = gm.graph.output_node().args
    results = [leaf for leaf in listed if leaf is not None]  # type: ignore[union-attr]  # the flat outputs, a tuple
    for value, leaf in zip(model.graph.outputs, results, strict=False):
        if isinstance(leaf, torch.fx.Node) and value.producer() is not None and leaf.op == "call_function":
            found.setdefault(value, (leaf, None))
    return found


def _line_of(node: torch.fx.Node) -> str:
    """Return the user's line of a node; that of who reads it where it has none, as a quantized weight."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop(0)
        if line := source_line(current):
            return line
        waiting += [user for user in current.users if user not in seen]
        seen.update(current.users)
    return ""


def _is_of_another(model: ir.Model, gm: CapturedModule) -> bool:
    """Return whether the operators of a model say that they come from nodes, and the graph has none of these."""
    origins = {node.metadata_props.get("fxopt.node") for node in model.graph} - {None}
    return bool(origins) and origins.isdisjoint(node.name for node in gm.graph.nodes)


class _Comparison(EagerInterpreter):
    """Runs the graph in PyTorch, and at each node that the model knows the part of the model that computes it."""

    def __init__(self, model: ir.Model, gm: CapturedModule, values: Mapping[ir.Value, Value]) -> None:
        super().__init__(gm)
        self._model, self._gm, self._values = model, gm, values
        slicer = Slicer(model, values)
        self._slices: dict[torch.fx.Node, list[tuple[Slice, int | None]]] = {}
        for value, (node, place) in values.items():
            self._slices.setdefault(node, []).append((slicer.of(value), place))
        self._left = Counter(read for parts in self._slices.values() for part, _ in parts for read in part.inputs)
        self._eager: dict[ir.Value, torch.Tensor] = {}
        self._ort: dict[ir.Value, torch.Tensor] = {}
        self._placeholders: dict[torch.fx.Node, Any] = {}
        self.found: list[NodeError] = []

    def compare(self, leaves: Sequence[Any]) -> None:
        """Run on flat inputs."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for value, tensor in zip(self._model.graph.inputs, tensors, strict=True):
            self._eager[value] = self._ort[value] = tensor
        self._placeholders = dict(zip(self._gm.graph.find_nodes(op="placeholder"), leaves, strict=True))
        self.run(*leaves, enable_io_processing=False)

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node, and what stands for it."""
        result = super().run_node(n)
        for part, place in self._slices.get(n, ()):
            want = result if place is None else result[place]
            self._compare(n, part, want.detach())
        return result

    def _compare(self, node: torch.fx.Node, part: Slice, want: torch.Tensor) -> None:
        session = Session(ir.to_proto(part.model(self._model)).SerializeToString(), optimization="none")
        names = {value: str(value.name) for value in part.inputs}
        (local,) = session.run({names[value]: self._eager[value] for value in part.inputs})
        (total,) = session.run({names[value]: self._ort[value] for value in part.inputs})
        origin = node.meta.get("fxopt")
        self.found.append(
            NodeError(
                node=node.name,
                target=str(node.target),
                module=module_path(node) or "",
                source=_line_of(node),
                pass_name=origin.pass_name if origin is not None else "",
                operators=tuple(each.op_type for each in part.nodes),
                local=measure(want, local) if want.shape == local.shape else None,
                total=measure(want, total) if want.shape == total.shape else None,
                problem=local_problem(self._gm, node, self._started_from(part), want, local, len(part.nodes)),
            )
        )
        self._eager[part.output], self._ort[part.output] = want, total
        for value in part.inputs:
            self._left[value] -= 1
            if not self._left[value]:
                self._eager.pop(value, None)
                self._ort.pop(value, None)

    def _started_from(self, part: Slice) -> dict[torch.fx.Node, Any]:
        """Return the values that a part was given, by node."""
        known: dict[torch.fx.Node, Any] = dict(self._placeholders)
        for value in part.inputs:
            if value not in self._values:
                continue
            node, place = self._values[value]
            if place is None:
                known[node] = self._eager[value]
            else:
                known[node] = {**known.get(node, {}), place: self._eager[value]}
        return known
