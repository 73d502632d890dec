"""The nodes of one ONNX graph under construction, and what is known in it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import sympy

__all__ = ["Scope"]


@dataclasses.dataclass
class Scope:
    """The nodes of one ONNX graph under construction, the main one or the body of a control-flow node."""

    parent: Scope | None = None
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)
    computed: dict[Any, ir.Value] = dataclasses.field(default_factory=dict)
    sources: dict[sympy.Symbol, tuple[ir.Value, int | None]] = dataclasses.field(default_factory=dict)

    def chain(self) -> Iterator[Scope]:
        """Yield this scope and those around it, the innermost first."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Take back what is emitted inside where that raises: nodes, and values that later nodes would find known."""
        nodes = len(self.nodes)
        tables: tuple[dict[Any, Any], ...] = (self.computed, self.sources)
        entries = [len(table) for table in tables]
        try:
            yield
        except Exception:
            del self.nodes[nodes:]
            for table, before in zip(tables, entries, strict=True):
                while len(table) > before:
                    table.popitem()  # the newest
            raise
