"""A run over a graph that gives every complex value its pair: a real one of the same shape with an axis of 2 behind.

What an operator does to pairs is a rule of it: a function of the run and the node that returns the pair of the node's
value, or that replaces the node, if its value is real, and returns None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.args import source_line
from fxopt.errors import ExportError, describe
from fxopt.rewriter import Rewriter

__all__ = ["WHY", "Pairs", "is_complex", "rank_of", "refusal", "rule"]

_aten = torch.ops.aten
WHY = "a complex number is a pair of real ones"
Rule = Callable[["Pairs", torch.fx.Node], Any]
_RULES: dict[Any, Rule] = {}


def is_complex(value: Any) -> bool:
    """Return whether a node, or one of its results, or a number is complex."""
    held = value.meta.get("val") if isinstance(value, torch.fx.Node) else value
    if isinstance(held, list | tuple):
        return any(map(is_complex, held))
    return isinstance(held, complex) or (isinstance(held, torch.Tensor) and held.is_complex())


class Pairs:
    """One run over a graph. ``pairs`` has the real node of every complex one."""

    def __init__(self, rw: Rewriter, module: torch.fx.GraphModule) -> None:
        self.rw, self.module = rw, module
        self.pairs: dict[torch.fx.Node, torch.fx.Node] = {}
        self._parts: dict[torch.fx.Node, tuple[torch.fx.Node, torch.fx.Node]] = {}

    def run(self) -> None:
        """Replace all complex values.

        Raises:
            ExportError: see :func:`refusal`.
        """
        for node in list(self.module.graph.nodes):
            if not is_complex(node) and not any(source in self.pairs for source in node.all_input_nodes):
                continue
            if node.op == "get_attr":
                held = torch.view_as_real(self.rw.tensor(node).detach().resolve_conj()).contiguous()
                self.pairs[node] = self.rw.constant(f"{node.target}_pairs", held, near=node, why=WHY)
                continue
            known = _RULES.get(node.target)
            if known is None:
                raise refusal(node)
            found = known(self, node)
            if found is not None:
                self.pairs[node] = found
        for node in reversed(self.pairs):
            if not node._erased:
                self.rw.erase(node, why=WHY)

    def call(self, at: torch.fx.Node, target: Any, *args: Any) -> torch.fx.Node:
        """Insert a call before ``at``."""
        return self.rw.insert_call(target, args, before=at, why=WHY)

    def pair(self, at: torch.fx.Node, value: Any) -> torch.fx.Node:
        """Return the pair of a value, which may be real, or a number."""
        if value in self.pairs:
            return self.pairs[value]
        if isinstance(value, torch.fx.Node):
            return self.stacked(at, value, self.call(at, _aten.zeros_like.default, value))
        number = torch.tensor([complex(value).real, complex(value).imag], dtype=at.meta["val"].dtype.to_real())
        return self.rw.constant(f"{at.name}_number", number, near=at, why=WHY)

    def parts(self, at: torch.fx.Node, value: Any) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Return the real and the imaginary part of a value."""
        pair = self.pair(at, value)
        known = self._parts.get(pair)
        if known is None or any(part._erased for part in known):
            known = self.call(at, _aten.select.int, pair, -1, 0), self.call(at, _aten.select.int, pair, -1, 1)
            self._parts[pair] = known
        return known

    def stacked(self, at: torch.fx.Node, re: torch.fx.Node, im: torch.fx.Node) -> torch.fx.Node:
        """Return the pair of two real values of one shape."""
        return self.call(at, _aten.stack.default, [re, im], -1)

    def scaled(self, at: torch.fx.Node, target: Any, pair: torch.fx.Node, factor: Any) -> torch.fx.Node:
        """Return a pair times, or divided by, a real value or number."""
        if isinstance(factor, torch.fx.Node) and rank_of(factor):  # one without axes has no say in the element type
            factor = self.call(at, _aten.unsqueeze.default, factor, -1)
        return self.call(at, target, pair, factor)


def refusal(node: torch.fx.Node) -> ExportError:
    """Return the error that says what of a graph has no form for pairs."""
    if node.op in ("placeholder", "output"):
        what, other = ("takes", "view_as_complex") if node.op == "placeholder" else ("returns", "view_as_real")
        return ExportError(
            describe(
                f"the model {what} complex numbers, which ONNX Runtime has no tensors of",
                node=node.name if node.op == "placeholder" else ", ".join(n.name for n in node.all_input_nodes),
                try_=f"real tensors with an axis of 2 behind, and torch.{other}",
            )
        )
    return ExportError(
        describe(
            f"{node.target} of complex numbers cannot be written as ONNX",
            node=node.name,
            source=source_line(node) or "unknown",
            try_="write that line with the real and the imaginary part",
        )
    )


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operators."""

    def register(found: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, found))
        return found

    return register


def rank_of(value: Any) -> int:
    """Return the number of axes of a value, or of the first of several."""
    held = value.meta["val"]
    return len((held[0] if isinstance(held, list | tuple) else held).shape)
