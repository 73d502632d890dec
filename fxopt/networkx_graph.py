"""A graph as a ``networkx.DiGraph``, for people's own analysis.

graph = fxopt.to_networkx(gm)
networkx.dag_longest_path(graph, weight="macs")                    the critical path
networkx.immediate_dominators(graph, "x")                          what every way from the input goes through
networkx.minimum_cut(graph, "x", "output", capacity="bytes")       where the least data crosses
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxopt.args import module_path, shape_text, size_text, source_line
from fxopt.graph_module import CapturedModule
from fxopt.node_costs import NodeCosts, argument_sources

if TYPE_CHECKING:
    import networkx

__all__ = ["to_networkx"]


def to_networkx(gm: torch.fx.GraphModule) -> networkx.DiGraph:
    """Return a directed graph with one node for each node of ``gm``, by its name.

    The graphs of branches and loops are not in it; each is a GraphModule of its own: ``to_networkx(gm.true_graph_0)``.

    Args:
        gm: Any GraphModule; what is not in the metadata of its nodes is None.

    Returns:
        The graph. Its nodes have the attributes ``op`` ("call_function"), ``target`` ("aten.conv2d.default"), ``type``
        ("f32[batch, 8]"), ``shape`` (integers, and the names of dynamic sizes), ``dtype``, ``module`` (path),
        ``source`` (the user's line), ``pass_name`` (which pass made it), ``bytes`` (of what it yields) and ``macs``.
        Its edges have ``arguments`` (names, as "self"), ``bytes`` (of what flows) and ``macs`` (of the node that
        reads), so that they can be weights and capacities. Counts are those of the first example, see
        :mod:`fxopt.node_costs`; an edge without a known count leaves the attribute out, which networkx takes for a
        capacity without limit.
    """
    import networkx

    costs = NodeCosts(gm)
    names = gm.symbol_names if isinstance(gm, CapturedModule) else {}
    graph = networkx.DiGraph()
    for node in gm.graph.nodes:
        graph.add_node(node.name, **_attributes(node, names), bytes=costs.bytes(node), macs=costs.macs(node))
        arguments: dict[str, list[str]] = {}
        for argument, source in argument_sources(node):
            arguments.setdefault(source.name, []).append(argument)
        for source_name, read in arguments.items():
            counts = {"bytes": graph.nodes[source_name]["bytes"], "macs": graph.nodes[node.name]["macs"]}
            known = {key: count for key, count in counts.items() if count is not None}
            graph.add_edge(source_name, node.name, arguments=tuple(read), **known)
    return graph


def _attributes(node: torch.fx.Node, names: dict[str, str]) -> dict[str, Any]:
    held = node.meta.get("val")
    tensor = held if isinstance(held, torch.Tensor) else None
    made = node.meta.get("fxopt")
    return {
        "op": node.op,
        "target": str(node.target),
        "type": None if held is None else shape_text(held, names),
        "shape": None if tensor is None else tuple(_size(size, names) for size in tensor.shape),
        "dtype": None if tensor is None else tensor.dtype,
        "module": module_path(node),
        "source": source_line(node),
        "pass_name": None if made is None else made.pass_name,
    }


def _size(size: Any, names: dict[str, str]) -> int | str:
    return size if isinstance(size, int) else size_text(size, names)
