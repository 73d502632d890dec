"""The description of a torch.fx graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree

import fxopt
from fxopt.args import argument_positions, module_path, shape_text, source_line
from fxopt.attributes import get_path, owner_of
from fxopt.graph_module import CapturedModule
from fxopt.node_costs import NodeCosts, argument_sources
from fxopt.tools.viz.kinds import kind_of, with_numbers
from fxopt.tools.viz.model import Edge, Graph, Node, Number, Weight
from fxopt.tools.viz.weights import describe_tensor

__all__ = ["WeightCache", "fx_graph"]

WeightCache = dict[int, tuple[torch.Tensor, Weight]]
"""What is known of each tensor, by its id; the tensor is held, so that its id stays its own."""


def fx_graph(
    gm: torch.fx.GraphModule,
    *,
    reasons: Mapping[tuple[str, str], str] | None = None,
    title: str = "",
    known: WeightCache | None = None,
) -> Graph:
    """Return the description of a graph and of the graphs inside it.

    Args:
        gm: Any GraphModule; what its nodes carry no metadata for is left out.
        reasons: Why a pass made a node, by (name of the pass, name of the node); those of ``gm.report`` if not given.
        title: Of the page.
        known: Statistics of weights, filled as they are found: steps of one pipeline share most of them.
    """
    if reasons is None:
        reasons = reasons_of(gm.report) if isinstance(gm, CapturedModule) and gm.report is not None else {}
    reader = _Reader(gm, reasons, {} if known is None else known)
    reader.read(gm, "", ())
    return Graph(tuple(reader.nodes), title)


def reasons_of(report: fxopt.Report) -> dict[tuple[str, str], str]:
    """Return the reason of each change by (pass, node); of several the last, as it is what the node is now."""
    return {(change.pass_name, change.node): change.why for step in report.steps for change in step.changes}


_Operands = tuple[tuple[str, torch.fx.Node], ...]
"""Id and node of each value that a graph inside another is given."""


class _Reader:
    def __init__(self, gm: torch.fx.GraphModule, reasons: Mapping[tuple[str, str], str], known: WeightCache) -> None:
        self.nodes: list[Node] = []
        self._names = gm.symbol_names if isinstance(gm, CapturedModule) else {}
        self._costs = NodeCosts(gm)
        self._reasons, self._known = reasons, known
        self._by_id: dict[str, Node] = {}

    def read(self, gm: torch.fx.GraphModule, prefix: str, path: tuple[str, ...], operands: _Operands = ()) -> Any:
        """Add the nodes of one graph; return its outputs.

        Args:
            gm: The graph.
            prefix: Of the ids of its nodes.
            path: The groups around it.
            operands: What its placeholders stand for, in order; the graph's own inputs stand for nothing.
        """
        places = dict(zip(gm.graph.find_nodes(op="placeholder"), operands, strict=False))
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                if not isinstance(_held(node), torch.Tensor) or not node.users:
                    continue
                if all(user.op != "output" for user in node.users):
                    continue  # it is shown with those who read it
            if node.op == "output" and prefix:
                return node.args[0]
            described = self._describe(node, prefix, path)
            if inner := _inner_graphs(node):
                described = self._with_regions(node, described, inner, prefix)
            if node in places:
                outer, operand = places[node]
                if _is_weight(operand):
                    described = dataclasses.replace(described, weights=(self._weight("input", operand),))
                else:
                    edge = Edge(outer, "input", _type(operand, self._names))
                    described = dataclasses.replace(described, inputs=(edge,))
            self._add(described)
        return None

    def _add(self, node: Node) -> None:
        node = with_numbers(node, self._by_id)
        self.nodes.append(node)
        self._by_id[node.id] = node

    def _with_regions(
        self, node: torch.fx.Node, described: Node, inner: dict[str, torch.fx.GraphModule], prefix: str
    ) -> Node:
        """Add the graphs that a node runs, and return the node, which reads what they yield."""
        nested = node.args if node.op == "call_module" else [a for a in node.args if isinstance(a, list | tuple)]
        leaves = [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, torch.fx.Node)]
        operands = tuple((prefix + leaf.name, leaf) for leaf in leaves)
        edges = [edge for edge in described.inputs if edge.source.removeprefix(prefix) not in inner]
        for label, module in inner.items():
            below = f"{prefix}{label}/"
            results = self.read(module, below, (*described.path, f"{node.name}: {label}"), operands)
            edges += [
                Edge(below + leaf.name, f"{label}[{i}]", _type(leaf, self._names))
                for i, leaf in enumerate(results if isinstance(results, list | tuple) else [results])
                if isinstance(leaf, torch.fx.Node) and below + leaf.name in self._by_id
            ]
        return dataclasses.replace(described, inputs=tuple(edges))

    def _describe(self, node: torch.fx.Node, prefix: str, path: tuple[str, ...]) -> Node:
        read = argument_sources(node)
        made = node.meta.get("fxopt")
        weights = tuple(self._weight(argument, source) for argument, source in read if _is_weight(source))
        if node.op == "get_attr":
            weights = (self._weight("value", node),)
        op = _operator(node)
        kind = {"placeholder": "input", "output": "output"}.get(node.op) or kind_of(op)
        return Node(
            id=prefix + node.name,
            op=op,
            kind=kind,
            path=(*path, *_modules(node)),
            inputs=tuple(
                Edge(prefix + source.name, argument, _type(source, self._names))
                for argument, source in read
                if not _is_weight(source) or node.op == "output"
            ),
            outputs=tuple(_types(node, self._names)),
            attributes=tuple(_attributes(node)),
            weights=weights if node.op != "output" else (),
            line=source_line(node) or "",
            pass_name=made.pass_name if made is not None else "",
            why=self._reasons.get((made.pass_name, node.name), "") if made is not None else "",
            origins=made.sources if made is not None and made.sources else (node.name,),
            values=self._values(node, weights),
        )

    def _weight(self, argument: str, node: torch.fx.Node) -> Weight:
        tensor = _held(node)
        if id(tensor) not in self._known:
            self._known[id(tensor)] = (tensor, describe_tensor(str(node.target), argument, tensor))
        return dataclasses.replace(self._known[id(tensor)][1], name=str(node.target), argument=argument)

    def _values(self, node: torch.fx.Node, weights: tuple[Weight, ...]) -> dict[str, Number | str]:
        held = node.meta.get("val")
        first = held[0] if isinstance(held, tuple | list) and held else held
        dtype = str(first.dtype).removeprefix("torch.") if isinstance(first, torch.Tensor) else None
        return found_values(self._costs.macs(node), self._costs.bytes(node), dtype, weights)


def found_values(
    macs: int | None, output_bytes: int | None, dtype: str | None, weights: tuple[Weight, ...]
) -> dict[str, Number | str]:
    """Return the values of the built-in overlays that are known of a node."""
    values: dict[str, Number | str] = {}
    if macs:
        values["MACs"] = macs
    if output_bytes is not None:
        values["activation bytes"] = output_bytes
    if weights:
        values["weight bytes"] = sum(weight.bytes for weight in weights)
    counted = [weight for weight in weights if weight.zeros is not None and weight.elements > 1]
    if counted:
        zeros = sum(weight.zeros or 0 for weight in counted)
        values["sparsity"] = zeros / sum(weight.elements for weight in counted)
    if dtype is not None:
        values["dtype"] = dtype
    return values


def _held(node: torch.fx.Node) -> Any:
    return get_path(owner_of(node), str(node.target))


def _inner_graphs(node: torch.fx.Node) -> dict[str, torch.fx.GraphModule]:
    """Return the graphs that a node runs by their names: sides of a branch, parts of a loop, a module that is one."""
    if node.op == "call_module":
        held = _held(node)
        return {str(node.target): held} if isinstance(held, torch.fx.GraphModule) else {}
    if not isinstance(node.target, HigherOrderOperator):
        return {}
    read = [item for item in node.args if isinstance(item, torch.fx.Node) and item.op == "get_attr"]
    return {str(item.target): held for item in read if isinstance(held := _held(item), torch.fx.GraphModule)}


def _is_weight(node: torch.fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(_held(node), torch.Tensor)


def _operator(node: torch.fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        namespace, name = node.target._schema.name.split("::")
        return f"{namespace}.{name}"
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": "input", "get_attr": "weight"}.get(node.op, node.op)
    if node.op == "call_module":
        owner = node.graph.owning_module
        return type(owner.get_submodule(str(node.target))).__name__ if owner is not None else "module"
    return str(getattr(node.target, "__name__", node.target))


def _modules(node: torch.fx.Node) -> tuple[str, ...]:
    """Return the modules around a node, ``layer1.0 (Block)``; a module that is called again is another group."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        path = module_path(node)
        return (path,) if path else ()
    found = []
    for key, (path, kind) in stack.items():
        if path:
            name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
            _, again, number = str(key).partition("@")
            found.append(f"{path}{again}{number} ({name.rpartition('.')[2]})")
    return tuple(found)


def _type(node: torch.fx.Node, names: dict[str, str]) -> str:
    held = node.meta.get("val")
    return "" if held is None else shape_text(held, names)


def _types(node: torch.fx.Node, names: dict[str, str]) -> list[str]:
    held = node.meta.get("val")
    if held is None:
        return []
    return [shape_text(item, names) for item in held] if isinstance(held, tuple | list) else [shape_text(held, names)]


def _attributes(node: torch.fx.Node) -> list[tuple[str, str]]:
    """Return the arguments that are not the values of nodes alone, by name; those at their default are left out."""
    if node.op == "output":
        return []
    names: list[str] = []
    defaults: dict[str, Any] = {}
    if isinstance(node.target, OpOverload):
        table = argument_positions(node.target)
        names = [name for name, (position, _, _) in table.items() if position is not None]
        defaults = {name: default for name, (_, default, has_default) in table.items() if has_default}
    given = [(names[i] if i < len(names) else f"args[{i}]", held) for i, held in enumerate(node.args)]
    shown = []
    for name, held in (*given, *node.kwargs.items()):
        if isinstance(held, torch.fx.Node) or held is None or (name in defaults and held == defaults[name]):
            continue
        if isinstance(held, list | tuple) and held and all(isinstance(item, torch.fx.Node) for item in held):
            continue
        shown.append((name, str(held).removeprefix("torch.")))
    return shown


__all__ += ["found_values", "reasons_of"]
