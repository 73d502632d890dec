"""Change the element types of many values of a graph, and of the graphs inside it.

A type cannot be changed at one operand alone: most operators want all of one type. So the operands of a call are set
together, in the order of the graph, and its value is brought up to date at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxopt.args import shape_text, source_line, value
from fxopt.attributes import get_path, named_tensors
from fxopt.errors import PassError, describe
from fxopt.functionalize import fake_call
from fxopt.regions import COND, WHILE_LOOP, body_of, results_of
from fxopt.rewriter import Rewriter

__all__ = ["Retyping"]


class Retyping:
    """Changes of element types on behalf of the pass of a :class:`fxopt.Rewriter`, which records them.

    Args:
        rw: Its graph is changed.
        why: Reason, for the report.

    Attributes:
        retyped: The nodes that yield another type than before.
    """

    def __init__(self, rw: Rewriter, why: str) -> None:
        self._rw, self._why = rw, why
        self.retyped: set[torch.fx.Node] = set()
        self._places: dict[torch.Tensor, list[tuple[Any, str]]] | None = None

    def assume(self, node: torch.fx.Node, dtype: torch.dtype) -> None:
        """Let a placeholder stand for tensors of another type."""
        node.meta["val"] = node.meta["val"].to(dtype)
        self._note(node, "argument")

    def set_call(self, node: torch.fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Give a call these arguments, and the value that it has with them; what only the old ones read goes.

        Raises:
            PassError: it cannot run with arguments of these types.
        """
        inputs, before = list(node.all_input_nodes), node.meta.get("val")
        same = (node.args, node.kwargs) == (tuple(args), dict(kwargs))
        if same and self.retyped.isdisjoint(_read_by(node)):
            return  # some operators would get a new size, if asked again
        node.args, node.kwargs = tuple(args), dict(kwargs)
        try:
            node.meta["val"] = fake_call(node.target, node.args, node.kwargs)
        except Exception as error:
            raise PassError(
                describe(
                    f"{self._rw.pass_name} changes element types so that {node.name}, a call of {node.target}, cannot "
                    f"run: {str(error).partition(chr(10))[0]}",
                    got=", ".join(f"{n.name}: {shape_text(value(n))}" for n in node.all_input_nodes if "val" in n.meta),
                    source=source_line(node),
                )
            ) from error
        if shape_text(before) != shape_text(node.meta["val"]):
            self._note(node, "argument")
        elif not same:
            self._rw._record("argument", node, self._why)
        self._rw._erase_dead([found for found in inputs if found not in node.all_input_nodes])

    def set_results(self, graph: torch.fx.Graph, results: Sequence[Any]) -> None:
        """Let a graph return these values instead of as many others."""
        output = graph.output_node()
        listed: Any = output.args[0]
        if tuple(listed) != tuple(results):
            output.args = (type(listed)(results),)
            self._rw._record("argument", output, self._why)

    def store(self, node: torch.fx.Node, dtype: torch.dtype) -> None:
        """Keep the tensor that a ``get_attr`` node reads, under all of its names, in another type.

        The old tensor is not written: the graph before the pass still holds it.
        """
        old = self._rw.tensor(node)
        stored = old.detach().to(dtype)
        new = torch.nn.Parameter(stored, old.requires_grad) if isinstance(old, torch.nn.Parameter) else stored
        readers = self._rw.reads(old)
        for owner, leaf in self._places_of(old):
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = new
        for reader in readers:
            reader.meta["val"] = self._rw._fake(new, reader)
            self._rw._reads.add(reader)
            self._note(reader, "tensor")

    def _places_of(self, tensor: torch.Tensor) -> list[tuple[Any, str]]:
        """Return the modules that hold a tensor of the graph before the changes, each with its name there."""
        if self._places is None:
            self._places = {}
            for name, held in named_tensors(self._rw.gm):
                *parents, leaf = name.split(".")
                owner = get_path(self._rw.gm, ".".join(parents)) if parents else self._rw.gm
                self._places.setdefault(held, []).append((owner, leaf))
        return self._places[tensor]

    def _note(self, node: torch.fx.Node, kind: str) -> None:
        self.retyped.add(node)
        self._rw._record(kind, node, self._why)


def _read_by(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return what a call reads, and what the graphs that it runs yield."""
    if node.target not in (COND, WHILE_LOOP):
        return list(node.all_input_nodes)
    bodies = [body_of(source) for source in node.all_input_nodes if "val" not in source.meta]
    yielded = [result for body in bodies for result in results_of(body) if isinstance(result, torch.fx.Node)]
    return [*node.all_input_nodes, *yielded]
