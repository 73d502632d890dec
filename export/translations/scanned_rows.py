"""Rows that each turn of a loop writes, one after the other: ONNX's Loop collects them, and copies no buffer.

    rows = zeros(n, ...)                      Loop body: ..., row     (a scan output)
    for i in range(n):                        rows = the scan output
        rows[i] = row

Other writes copy the whole buffer on each turn.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.args import arg
from fxopt.export.emitter import Value, dims, tensor_of
from fxopt.export.sizes import as_size

__all__ = ["ScannedRows", "scanned_rows"]

aten = torch.ops.aten
Graph = torch.fx.GraphModule
Node = torch.fx.Node


@dataclasses.dataclass(frozen=True)
class ScannedRows:
    """A loop some of whose variables are filled row by row.

    Attributes:
        body: One turn: first what the other variables become, in order, then the rows, [1, ...] each.
        places: Which of the variables are so filled.
    """

    body: Graph
    places: tuple[int, ...]


def scanned_rows(call: Node, condition: Graph, body: Graph, start: Sequence[Value]) -> ScannedRows | None:
    """Return the loop in that form, or None if no variable is filled so.

    Every turn writes the row whose number is that of the turn, nobody reads the others, and there are as many turns as
    rows: the counter starts at 0, grows by 1 and ends at a size, which is that of the variable.

    Args:
        call: The call of ``while_loop``.
        condition: Its test.
        body: Its turn.
        start: What the variables are before the first.
    """
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    (results,) = next(node for node in reversed(body.graph.nodes) if node.op == "output").args
    counter = _counter(condition)
    if counter is None or not _counts(inputs[counter], results[counter], start[counter]):
        return None
    turns = _turns(call, condition, counter)
    places = tuple(
        place
        for place, value in enumerate(start)
        if _is_filled(inputs[place], results[place], inputs[counter]) and turns == dims(value)[0]
    )
    return ScannedRows(_without_buffers(body, places), places) if places and turns is not None else None


def _counter(condition: Graph) -> int | None:
    """Return which variable the test compares with an end, as ``variable < end``."""
    inputs = [node for node in condition.graph.nodes if node.op == "placeholder"]
    (results,) = next(node for node in reversed(condition.graph.nodes) if node.op == "output").args
    test = results[0] if isinstance(results, tuple | list) else results
    if not isinstance(test, Node) or test.target is not aten.lt.Tensor or test.args[0] not in inputs:
        return None
    return inputs.index(test.args[0])


def _counts(variable: Node, after: Node, start: Value) -> bool:
    """Return whether a variable starts at 0 and grows by 1."""
    held = tensor_of(start)
    if held is None or held.numel() != 1 or int(held) != 0:
        return False
    return (
        isinstance(after, Node)
        and after.target is aten.add.Tensor
        and list(after.args) == [variable, 1]
        and not after.kwargs
    )


def _turns(call: Node, condition: Graph, counter: int) -> Any:
    """Return the size at which the counter ends; None if it is none."""
    inputs = [node for node in condition.graph.nodes if node.op == "placeholder"]
    test = next(user for user in inputs[counter].users if user.target is aten.lt.Tensor)
    carried, constants = call.args[2], call.args[3] if len(call.args) > 3 else ()
    assert isinstance(carried, tuple | list)
    assert isinstance(constants, tuple | list)
    if test.args[1] not in inputs[len(carried) :]:
        return None
    end = constants[inputs.index(test.args[1]) - len(carried)]
    if not isinstance(end, Node) or end.target is not aten.full.default or arg(end, "size") != []:
        return None
    filled = arg(end, "fill_value")
    return as_size(filled.meta["val"] if isinstance(filled, Node) else filled)


def _is_filled(variable: Node, after: Node, counter: Node) -> bool:
    """Return whether a turn writes the row at the counter, and does nothing else with a variable."""
    if not isinstance(after, Node) or after.target is not aten.index_copy.default or len(after.users) != 1:
        return False
    target, axis, place, row = after.args
    at_counter = isinstance(place, Node) and place.target is aten.reshape.default and list(place.args) == [counter, [1]]
    if not at_counter or axis != 0 or target is not variable or list(variable.users) != [after]:
        return False
    return isinstance(row, Node) and bool(row.meta["val"].shape[0] == 1)


def _without_buffers(body: Graph, places: Sequence[int]) -> Graph:
    graph = torch.fx.Graph()
    twins: dict[Node, Node] = {}
    graph.graph_copy(body.graph, twins)
    (results,) = next(node for node in reversed(body.graph.nodes) if node.op == "output").args
    others = [twins[node] for place, node in enumerate(results) if place not in places]
    graph.output((*others, *(twins[results[place].args[3]] for place in places)))
    for old, new in twins.items():
        new.meta = copy.copy(old.meta)
    for place in places:
        graph.erase_node(twins[results[place]])
    return torch.fx.GraphModule(body, graph)
