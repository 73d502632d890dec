"""Compute what depends on constants alone, once and for all.

    before:  t = transpose(table, 0, 1);  e = exp(t);  y = add(x, e)
    after:   y = add(x, folded)

Exact: the same kernel computes the same bits now as later. Trainable parameters are not constants, nor are buffers that
the graph writes; random calls and calls with effects stay. A result that is much larger than what it is made from stays
too, so that an ``expand`` does not blow up the file.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload

from fxopt.args import shape_text
from fxopt.contracts import Contract
from fxopt.effects import is_pure
from fxopt.graph_module import graph_modules
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.merge_common_subexpressions import written_attributes
from fxopt.rewriter import Rewriter

__all__ = ["FoldConstants"]

_Known = dict[torch.fx.Node, Any]


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace calls on constants by their results.

    Attributes:
        max_growth_bytes: How many bytes a result may have beyond those of the constants that it replaces.
        parameters: Whether parameters count as constants too; they can then no longer be trained.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = Contract.EXACT
    max_growth_bytes: int = 65536
    parameters: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.max_growth_bytes < 0:
            raise ValueError(f"max_growth_bytes is {self.max_growth_bytes}; wanted 0 or more")

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it, each on its own."""
        for module in graph_modules(rw.gm):
            known = self._constants(rw, module)
            for node in rw.nodes_of(module):
                if node.op == "call_function" and is_foldable(node, known):
                    known[node] = evaluate(node, known)
            for node in rw.nodes_of(module):
                if node.op == "call_function" and node in known and self._is_wanted(node, known):
                    self._fold(rw, node, known)

    def _constants(self, rw: Rewriter, module: torch.fx.GraphModule) -> _Known:
        written = written_attributes(module.graph)
        found: _Known = {}
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
                tensor = rw.tensor(node)
                if str(node.target) not in written and (self.parameters or not isinstance(tensor, torch.nn.Parameter)):
                    found[node] = tensor.detach()
        return found

    def _is_wanted(self, node: torch.fx.Node, known: _Known) -> bool:
        """Return whether someone who is not folded himself reads the node: the others disappear with their readers."""
        return isinstance(known[node], torch.Tensor | int | float | bool) and any(
            user not in known for user in node.users
        )

    def _fold(self, rw: Rewriter, node: torch.fx.Node, known: _Known) -> None:
        result = known[node]
        if not isinstance(result, torch.Tensor):
            for user in list(node.users):
                rw.replace_argument(user, node, result, why=f"{node.name} is {result}")
            return
        grown = result.numel() * result.element_size() - source_bytes(node, known)
        if grown > self.max_growth_bytes:
            rw.skip(node, f"its result would add {grown} bytes")
            return
        folded = rw.constant(f"{node.name}_folded", result.contiguous(), near=node, why=f"{node.target} of constants")
        rw.replace_value(node, folded, why=f"computed once: {shape_text(result)}")


def is_foldable(node: torch.fx.Node, known: _Known) -> bool:
    """Return whether the call depends on constants alone and always gives the same result."""
    if "modes" in node.meta or not is_pure(node) or not all(source in known for source in node.all_input_nodes):
        return False
    return isinstance(node.target, OpOverload) or getattr(node.target, "__module__", "") in ("_operator", "math")


def evaluate(node: torch.fx.Node, known: _Known) -> Any:
    """Return the result of the call on real tensors."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: known[source])
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function nodes have a callable target


def source_bytes(node: torch.fx.Node, known: _Known) -> int:
    """Return the bytes of the attributes that nobody else reads once the call is folded."""
    total, stack, seen = 0, [node], set()
    while stack:
        current = stack.pop()
        for source in current.all_input_nodes:
            if source in seen or len(source.users) > 1:
                continue
            seen.add(source)
            if source.op == "get_attr":
                total += known[source].numel() * known[source].element_size()
            else:
                stack.append(source)
    return total
