"""Read the calls of a graph that run other graphs: the sides of a branch, the test and body of a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.attributes import get_path, owner_of

__all__ = ["COND", "WHILE_LOOP", "body_of", "holds_control_flow", "region_value", "results_of"]

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


def region_value(target: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the fake values that a ``cond`` or ``while_loop`` with these arguments yields."""
    yielded = results_of(body_of(args[1])) if target is COND else args[2]
    return tuple(_fake(result) for result in yielded)


def _fake(result: Any) -> Any:
    return result.meta["val"] if isinstance(result, torch.fx.Node) else result
