"""Right values from a graph: it runs in PyTorch, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from fxopt.args import module_path, source_line
from fxopt.contracts import Contract
from fxopt.dimensions import Sample
from fxopt.eager_control_flow import EagerInterpreter
from fxopt.errors import ExportError, describe
from fxopt.export.blame_report import NodeError
from fxopt.export.blame_run import About, Comparison, Started, nearest_line
from fxopt.export.node_bounds import local_problem
from fxopt.export.slices import Slice
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated

__all__ = ["compare_with_graph"]

_aten = torch.ops.aten
_RECTIFIERS = frozenset({_aten.relu.default, _aten.relu6.default, _aten.hardtanh.default, _aten.clamp.default})
Place = tuple[torch.fx.Node, int | None]  # a node, and which of its results


def compare_with_graph(model: ir.Model, gm: CapturedModule, inputs: Any, contract: Contract | None) -> list[NodeError]:
    """Compare every value of a model that a graph has too; see :func:`fxopt.export.blame`.

    Raises:
        ExportError: ORT refuses the model, or no value of it has a name that the graph knows.
    """
    sample = Sample.of(inputs) if inputs is not None else gm.samples[0]
    shared = _shared(model, gm)
    if not shared or _is_of_another(model, gm):
        raise ExportError(
            describe(
                "no value of the model has the name of a node of the graph",
                got=", ".join(str(value.name) for value in list(model.graph.outputs)[:4]),
                wanted=", ".join(node.name for node in list(gm.graph.nodes)[-4:]),
                try_="a file that fxopt.export.to_onnx made of this very graph, or another file to compare with",
            )
        )
    with isolated(gm):
        leaves = gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        rectified = {value for value, (node, _) in shared.items() if _is_rectified(node)}
        comparison = Comparison(model, shared, dict(zip(model.graph.inputs, tensors, strict=True)), rectified)
        _Runner(gm, shared, comparison, leaves, contract).run(*leaves, enable_io_processing=False)
    return comparison.found


def _shared(model: ir.Model, gm: CapturedModule) -> dict[ir.Value, Place]:
    """Return the values of the main graph that are those of a node, with the node."""
    known: dict[str, Place] = {}
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


def _is_rectified(node: torch.fx.Node) -> bool:
    return bool(node.users) and all(user.target in _RECTIFIERS for user in node.users)


def _is_of_another(model: ir.Model, gm: CapturedModule) -> bool:
    """Return whether the operators of a model say that they come from nodes, and the graph has none of these."""
    origins = {node.metadata_props.get("fxopt.node") for node in model.graph} - {None}
    return bool(origins) and origins.isdisjoint(node.name for node in gm.graph.nodes)


class _Runner(EagerInterpreter):
    """Runs the graph in PyTorch, and at each node that the model knows the part of the model that computes it."""

    def __init__(
        self,
        gm: CapturedModule,
        shared: dict[ir.Value, Place],
        comparison: Comparison,
        leaves: Sequence[Any],
        contract: Contract | None,
    ) -> None:
        super().__init__(gm)
        self._gm, self._shared, self._comparison, self._contract = gm, shared, comparison, contract
        self._values: dict[torch.fx.Node, list[tuple[ir.Value, int | None]]] = {}
        for value, (node, place) in shared.items():
            self._values.setdefault(node, []).append((value, place))
        self._placeholders = dict(zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=True))

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node, and what stands for it."""
        result = super().run_node(n)

        def judge(part: Slice, started: Started, want: torch.Tensor, got: torch.Tensor) -> str | None:
            known = self._by_node(started)
            return local_problem(self._gm, n, known, want, got, len(part.nodes), self._contract)

        for value, place in self._values.get(n, ()):
            want = result if place is None else result[place]
            self._comparison.compare(value, want.detach(), _about(n), judge)
        return result

    def _by_node(self, started: Started) -> dict[torch.fx.Node, Any]:
        """Return the values that a part was given, by node."""
        known: dict[torch.fx.Node, Any] = dict(self._placeholders)
        for value, tensor in started.items():
            if value not in self._shared:
                continue
            node, place = self._shared[value]
            known[node] = tensor if place is None else {**known.get(node, {}), place: tensor}
        return known


def _about(node: torch.fx.Node) -> About:
    origin = node.meta.get("fxopt")
    pass_name = origin.pass_name if origin is not None else ""
    return About(node.name, str(node.target), module_path(node) or "", _line_of(node), pass_name)


def _line_of(node: torch.fx.Node) -> str:
    """Return the user's line of a node; that of who reads it where it has none, as a quantized weight."""
    return nearest_line(node, source_line, lambda current: current.users)
