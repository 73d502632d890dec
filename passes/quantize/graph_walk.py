"""Run a graph over several inputs at once, one node after the other, and stop where something is to be looked at.

A value is dropped behind its last reader, and the inputs are as many as the memory has room for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from fxopt.attributes import get_path
from fxopt.calibration_data import calibration_samples
from fxopt.eager_control_flow import EagerInterpreter, eager_call
from fxopt.errors import PassError
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated

__all__ = ["Walk", "items_within"]

_MEGABYTE = 2**20


class Walk:
    """A run of one graph over several inputs that advances as far as it is asked to.

    Args:
        gm: The graph.
        items: The leaves of each input.
        kept: Nodes whose values stay until they are taken.
    """

    def __init__(
        self, gm: torch.fx.GraphModule, items: Sequence[Sequence[Any]], kept: Collection[torch.fx.Node]
    ) -> None:
        self.gm, self.items, self._kept = gm, items, frozenset(kept)
        self._values: dict[torch.fx.Node, list[Any]] = {}  # one for each item, or one alone if it is a constant
        self._left = {node: len(node.users) for node in gm.graph.nodes}
        self._pending = [node for node in gm.graph.nodes if node.op != "output"][::-1]
        self._done: set[torch.fx.Node] = set()
        self._leaf = 0

    def advance(self, node: torch.fx.Node, *, past: bool) -> None:
        """Compute what stands before ``node``, and the node too if ``past``, as far as it is not computed yet."""
        while node not in self._done and (self._pending[-1] is not node or past):
            current = self._pending.pop()
            self._done.add(current)
            self._values[current] = self._run(current)
            for source in current.all_input_nodes:
                self._left[source] -= 1
                self._drop(source)
            self._drop(current)

    def values(self, node: torch.fx.Node) -> list[Any]:
        """Return what the node yields for each item."""
        found = self._values[node]
        return found * len(self.items) if len(found) < len(self.items) else found

    def take(self, node: torch.fx.Node) -> list[Any]:
        """Return the values of a kept node, which from now on stay only as long as they are read."""
        found = self.values(node)
        self._kept -= {node}
        self._drop(node)
        return found

    def set_constant(self, node: torch.fx.Node, value: torch.Tensor) -> None:
        """Let the readers of a constant that are still to come read another value."""
        self._values[node] = [value]

    def _drop(self, node: torch.fx.Node) -> None:
        if self._left[node] == 0 and node not in self._kept:
            self._values.pop(node, None)

    def _run(self, node: torch.fx.Node) -> list[Any]:
        if node.op == "placeholder":
            self._leaf += 1
            return [item[self._leaf - 1] for item in self.items]
        if node.op == "get_attr":
            return [get_path(self.gm, str(node.target))]
        if node.op != "call_function":
            raise PassError(f"{node.name} is a {node.op}, and a captured graph has none")
        call = eager_call(node.target)
        found = []
        for item in range(len(self.items) if any(len(self._values[n]) > 1 for n in node.all_input_nodes) else 1):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n, i=item: self._read(node, n, i))  # type: ignore[misc]  # mypy infers no default of a lambda
            found.append(call(*args, **kwargs))
        return found

    def _read(self, reader: torch.fx.Node, node: torch.fx.Node, item: int) -> Any:
        """Return what ``reader`` reads of ``node``."""
        found = self._values[node]
        return found[item if len(found) > 1 else 0]


def items_within(gm: CapturedModule, data: Any, megabytes: int) -> list[list[Any]]:
    """Return the leaves of the first calibration inputs that fit the memory together, one at least.

    Args:
        gm: The graph.
        data: See :func:`fxopt.calibration_data.calibration_samples`.
        megabytes: What the values may take that are alive at the same time, in units of 2**20 bytes.

    Raises:
        CalibrationError: the data are empty or do not fit the graph.
    """
    found: list[list[Any]] = []
    left = float(megabytes * _MEGABYTE)
    sizes: dict[tuple[Any, ...], int] = {}
    for sample in calibration_samples(gm, data):
        leaves = gm.flatten_inputs(*sample.args, **sample.kwargs)
        key = tuple(leaf.shape if isinstance(leaf, torch.Tensor) else None for leaf in leaves)
        if key not in sizes:
            sizes[key] = _most_alive(gm, leaves)
        left -= sizes[key]
        if left < 0 and found:
            break
        found.append(leaves)
    return found


def _most_alive(gm: CapturedModule, leaves: list[Any]) -> int:
    """Return the bytes of the values of one input that are alive at the same time, constants left out."""
    sizes: dict[torch.fx.Node, int] = {}

    class Measuring(EagerInterpreter):
        most = 0

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.op != "get_attr" and isinstance(value, torch.Tensor):
                sizes[n] = value.numel() * value.element_size()
            self.most = max(self.most, sum(sizes.get(held, 0) for held in self.env) + sizes.get(n, 0))
            return value

    with isolated(gm):
        run = Measuring(gm, garbage_collect_values=True)
        run.run(*leaves, enable_io_processing=False)
    return run.most
