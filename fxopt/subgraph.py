"""Cut out of a captured graph what computes one value from others: a captured graph of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxopt.attributes import attach, get_path
from fxopt.dimensions import Dimension, Sample
from fxopt.graph_module import CapturedModule
from fxopt.interface import input_spec

__all__ = ["between", "extract"]

Node = torch.fx.Node


def between(end: Node, starts: Collection[str]) -> tuple[set[str], set[Node]] | None:
    """Return what ``end`` is computed from: which of the nodes called ``starts``, and by which nodes, itself included.

    None if it also depends on an input of the graph that is no start.
    """
    if end.name in starts:
        return {end.name}, set()
    inputs: set[str] = set()
    members: set[Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in members:
            continue
        if node.op == "placeholder":
            return None
        members.add(node)
        inputs |= {source.name for source in node.all_input_nodes if source.name in starts}
        waiting += [source for source in node.all_input_nodes if source.name not in starts]
    return inputs, members


def extract(
    gm: CapturedModule, values: Mapping[str, torch.Tensor], members: Collection[Node], end: Node
) -> CapturedModule:
    """Return the graph that computes ``end`` by ``members``, with the values as its sample, in the mode of ``gm``.

    Nodes and tensors keep their names; tensors are shared with ``gm``, and only those that are read are there.

    Args:
        gm: The whole graph; left alone.
        values: What each input is on the sample, by the name of the node that yields it in ``gm``. Those that no
            member reads become inputs all the same.
        members: The nodes in between, from :func:`between`.
        end: The one whose value is the output.
    """
    source = gm.clone()  # the graphs of branches and loops move into the new one
    twins = dict(zip(gm.graph.nodes, source.graph.nodes, strict=True))
    names = {node.name: node for node in source.graph.nodes}
    root, graph = torch.nn.Module(), torch.fx.Graph()
    made: dict[Node, Node] = {}
    for name in values:
        made[names[name]] = graph.placeholder(name)
        made[names[name]].meta = {key: item for key, item in names[name].meta.items() if key != "modes"}
    inside = {twins[node] for node in members}
    for node in source.graph.nodes:
        if node not in inside:
            continue
        made[node] = graph.node_copy(node, lambda old: made[old])
        if node.op == "get_attr":
            _take(root, source, str(node.target))
    graph.output((made[twins[end]],))
    in_spec = pytree.tree_structure(((0,) * len(values), {}))
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(values), in_spec, pytree.tree_structure(0))))
    new = CapturedModule(root, graph)
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[table] = root.__dict__[table]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    new.inputs = tuple(
        input_spec(node, value, gm.symbol_names) for node, value in zip(placeholders, values.values(), strict=True)
    )
    new.output_names = ("output",)
    new.dims = _dims_in(gm, placeholders)
    new.samples = (Sample(tuple(values.values())),)
    new.modes, new.modes_reason = ("train" if gm.training else "eval"), "it is a part of a graph that ran in this mode"
    new.__dict__["training"] = gm.training  # the nodes are set for it already
    return new


def _take(root: torch.nn.Module, source: CapturedModule, path: str) -> None:
    """Register what is under a path of ``source`` under the same one of ``root``."""
    found = get_path(source, path)
    if isinstance(found, torch.nn.Module):
        root.add_module(path, found)
        return
    parent, _, leaf = path.rpartition(".")
    persistent = leaf not in source.get_submodule(parent)._non_persistent_buffers_set
    attach(root, path, found, persistent=persistent)


def _dims_in(gm: CapturedModule, placeholders: list[Node]) -> dict[str, Dimension]:
    """Return the dynamic sizes of the inputs; none if one of them follows from a size that no input has as its own."""
    sizes = [
        size.node.expr for node in placeholders for size in node.meta["val"].shape if isinstance(size, torch.SymInt)
    ]
    used = {str(symbol) for size in sizes for symbol in size.free_symbols}
    own = {str(size) for size in sizes}
    return {name: dimension for name, dimension in gm.dims.items() if dimension.symbol in used} if used <= own else {}
