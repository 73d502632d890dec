"""The student graph as it was when a teacher was merged with it: node by node, in a form that is saved with the graph.

What is listed of a node is all that it computes: its name, operator, target and arguments, and the type and shape of a
tensor that it reads. Arguments that the mode sets are listed with both of their values, so that the list is the same in
training and in evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from fxopt.args import argument_positions, shape_text, value
from fxopt.attributes import get_path
from fxopt.codec import Encoder, target_text
from fxopt.graph_module import CapturedModule

__all__ = ["StudentRecord", "differences", "listing"]

Listing = dict[str, list[list[Any]]]


@dataclasses.dataclass(frozen=True)
class StudentRecord:
    """What is needed to take the student out again, and to prove that it is the one that went in.

    Attributes:
        nodes: Its graph, and the graphs inside it by their path, as :func:`listing` has them.
        outputs: The names of its outputs.
        arguments: The arguments that came with the teacher.
        roots: The first part of the name of each attribute that came with the teacher and the losses.
    """

    nodes: Listing
    outputs: list[str]
    arguments: list[str]
    roots: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> StudentRecord:
        """Return the record that :meth:`to_json` wrote."""
        return cls(**written)

    def names(self, path: str = "") -> set[str]:
        """Return the names of the nodes of one graph of the student."""
        return {entry[0] for entry in self.nodes[path]}


def listing(gm: CapturedModule) -> Listing:
    """Return every node of a graph, and of the graphs that it runs by their path, as plain JSON values."""
    encoder, found = Encoder(), {}
    waiting: list[tuple[str, torch.fx.GraphModule]] = [("", gm)]
    while waiting:
        path, module = waiting.pop()
        found[path] = [_entry(encoder, node) for node in module.graph.nodes]
        for node in module.graph.nodes:
            inner = get_path(module, str(node.target)) if node.op == "get_attr" else None
            if isinstance(inner, torch.fx.GraphModule):
                waiting.append((f"{path}.{node.target}" if path else str(node.target), inner))
    return found


def _entry(encoder: Encoder, node: torch.fx.Node) -> list[Any]:
    modes = node.meta.get("modes", {})
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in modes:
        position = argument_positions(node.target)[name][0]
        if position is not None and position < len(args):
            args[position] = None
        kwargs.pop(name, None)
    both = {name: [encoder.item(part) for part in pair] for name, pair in sorted(modes.items())}
    written = {key: encoder.item(item) for key, item in sorted(kwargs.items())}
    read = shape_text(value(node)) if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor) else None
    return [node.name, node.op, target_text(node.target), encoder.item(args), written, both, read]


def differences(before: Listing, after: Listing) -> Iterator[tuple[str, str]]:
    """Yield each node that is not the same in both, as (what happened to it, its name)."""
    for path in sorted(before.keys() | after.keys()):
        old, new = ({entry[0]: entry for entry in side.get(path, [])} for side in (before, after))
        prefix = f"{path}/" if path else ""
        yield from (("gone", prefix + name) for name in old if name not in new)
        yield from (("new", prefix + name) for name in new if name not in old)
        yield from (("changed", prefix + name) for name in old if name in new and old[name] != new[name])
        kept = [name for name in new if name in old]
        if kept != [name for name in old if name in new]:
            yield "moved", prefix + next(a for a, b in zip(kept, (n for n in old if n in new), strict=True) if a != b)
