"""Read the calls of a graph that run other graphs: the sides of a branch, the test and body of a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.attributes import get_path, owner_of

__all__ = [
    "COND", "WHILE_LOOP", "add_placeholders", "add_results", "body_of", "holds_control_flow", "region_value",
    "results_of",
]  # fmt: skip

COND, WHILE_LOOP = torch.ops.higher_order.cond, torch.ops.higher_order.while_loop


def holds_control_flow(gm: torch.fx.GraphModule) -> bool:
    """Return whether the graph branches or loops, in itself or in a graph inside it."""
    return any(node.target is COND or node.target is WHILE_LOOP for node in gm.graph.nodes)


def body_of(node: torch.fx.Node) -> torch.fx.GraphModule:
    """Return the graph that a ``get_attr`` node reads.

    Raises:
        TypeError: it reads something else.
    """
    found = get_path(owner_of(node), str(node.target))
    if not isinstance(found, torch.fx.GraphModule):
        raise TypeError(f"{node.name} reads {node.target!r}, which is a {type(found).__name__}, not a graph")
    return found


def results_of(gm: torch.fx.GraphModule) -> tuple[Any, ...]:
    """Return what the output node of a graph lists."""
    listed = gm.graph.output_node().args[0]
    return tuple(listed) if isinstance(listed, tuple | list) else (listed,)


def add_placeholders(graph: torch.fx.Graph, outer: Sequence[torch.fx.Node]) -> dict[torch.fx.Node, torch.fx.Node]:
    """Give the graph of a region one placeholder for each node of the graph around it; return which is which."""
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in outer:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {"val": node.meta["val"]}
    return env


def add_results(graph: torch.fx.Graph, results: Sequence[Any]) -> None:
    """Let the graph of a region yield ``results``, each in memory of its own, as ``torch.cond`` wants it."""
    listed: list[Any] = []
    for result in results:
        if isinstance(result, torch.fx.Node) and (result.op == "placeholder" or result in listed):
            copy = graph.call_function(torch.ops.aten.clone.default, (result,))
            copy.meta = {key: result.meta[key] for key in ("val", "stack_trace") if key in result.meta}
            result = copy
        listed.append(result)
    graph.output(tuple(listed))


def region_value(target: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the fake values that a ``cond`` or ``while_loop`` with these arguments yields."""
    yielded = results_of(body_of(args[1])) if target is COND else args[2]
    return tuple(_fake(result) for result in yielded)


def _fake(result: Any) -> Any:
    return result.meta["val"] if isinstance(result, torch.fx.Node) else result
