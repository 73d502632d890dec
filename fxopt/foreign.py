"""Passes that know nothing of fxopt: any ``torch.fx`` PassBase, and any function of a GraphModule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fxopt.args import source_line
from fxopt.contracts import Contract
from fxopt.effects import has_effect
from fxopt.errors import PassError
from fxopt.functionalize import fake_call
from fxopt.graph_module import CapturedModule, copy_graph
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["ForeignPass", "adopt"]


@dataclasses.dataclass(frozen=True)
class ForeignPass(Pass):
    """Somebody else's pass, with the same checks and the same record as our own.

    What it changed is found by comparing the graphs, whatever it reports; if that is something else, it is an error.

    Attributes:
        function: Takes a GraphModule; returns one, a ``PassResult``, or None if it changed its argument.
        label: Name in the report.
        promise: Its contract; ROUNDING unless the function has an attribute ``contract``.
    """

    name: ClassVar[str] = "foreign"
    function: Callable[[torch.fx.GraphModule], Any] = lambda gm: gm
    label: str = "foreign"
    promise: Contract = Contract.ROUNDING

    @classmethod
    def of(cls, function: Callable[[torch.fx.GraphModule], Any]) -> ForeignPass:
        """Return the pass that calls ``function``."""
        label = getattr(function, "__name__", None) or type(function).__name__
        return cls(function, label, getattr(function, "contract", Contract.ROUNDING))

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # computed here, a constant in other passes
        """What the function promises."""
        return self.promise

    def spec(self) -> str:
        """Return the label: a function has no text that makes it again."""
        return self.label

    def run(self, rw: Rewriter) -> None:
        """Call the function on a copy and take over what it made.

        Raises:
            PassError: it returns something else than a graph, or says that it changed nothing although it did.
        """
        copy = rw.gm.clone()
        result = self.function(copy)
        claimed = getattr(result, "modified", None)
        made = copy if result is None else getattr(result, "graph_module", result)
        if not isinstance(made, torch.fx.GraphModule):
            raise PassError(
                f"{self.label} returned a {type(made).__name__}; wanted a GraphModule, a PassResult or None"
            )
        before = len(rw.changes)
        rw.adopt(made, why=f"by {self.label}")
        if claimed is False and len(rw.changes) > before:
            first = rw.changes[before]
            raise PassError(
                f"{self.label} reports no change and made {len(rw.changes) - before}, "
                f"the first at {first.node} ({first.kind})"
            )


def adopt(gm: CapturedModule, other: torch.fx.GraphModule) -> list[tuple[str, str, str | None]]:
    """Make ``gm`` have the graph and the tensors of ``other``; return what differs as (kind, node, source line)."""
    before = {node.name: _content(node) for node in gm.graph.nodes}
    tensors = dict(_tensors(gm))
    gm.__dict__["_graph"] = copy_graph(other.graph, gm)
    gm.graph.set_codegen(copy_codegen(gm, other))
    for table in ("_parameters", "_buffers", "_modules"):
        gm.__dict__[table] = dict(other.__dict__[table])
    _drop_dead(gm.graph)
    _fill_values(gm.graph)
    after = {node.name: node for node in gm.graph.nodes}
    found = [("inserted", name, source_line(node)) for name, node in after.items() if name not in before]
    found += [("erased", name, None) for name in before if name not in after]
    found += [
        ("replaced", name, source_line(node))
        for name, node in after.items()
        if name in before and before[name] != _content(node)
    ]
    found += [
        ("tensor", name, None) for name, tensor in _tensors(gm) if name in tensors and tensors[name] is not tensor
    ]
    return found


def copy_codegen(gm: CapturedModule, other: torch.fx.GraphModule) -> Any:
    """Return the calling convention of the new graph; a foreign pass often forgets to carry it over."""
    kept = gm.__dict__["_in_spec"], gm.__dict__["_out_spec"]
    codegen = other.graph._codegen
    if hasattr(codegen, "pytree_info"):
        return codegen
    from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

    placeholders = [node.name for node in other.graph.nodes if node.op == "placeholder"]
    return _PyTreeCodeGen(_PyTreeInfo(placeholders, *kept))


def _content(node: torch.fx.Node) -> str:
    return f"{node.op}|{node.target}|{node.args}|{node.kwargs}"


def _tensors(gm: torch.fx.GraphModule) -> list[tuple[str, torch.Tensor]]:
    return [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]


def _drop_dead(graph: torch.fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users and not has_effect(node):
            graph.erase_node(node)


def _fill_values(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            node.meta["val"] = fake_call(node.target, node.args, node.kwargs)
        elif node.op == "get_attr" and "val" not in node.meta:
            owner = graph.owning_module
            assert owner is not None
            found: Any = owner
            for part in str(node.target).split("."):
                found = getattr(found, part)
            if not isinstance(found, torch.Tensor):  # the graph of a branch or loop, which has no value
                continue
            from torch._guards import detect_fake_mode

            mode = detect_fake_mode([n.meta["val"] for n in graph.nodes if "val" in n.meta])
            node.meta["val"] = mode.from_tensor(found, static_shapes=True) if mode is not None else found
