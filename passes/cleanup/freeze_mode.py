"""Fix a graph to the mode it is in.

    before:  y = select_mode(a, b, False);  update_buffer(counter, n, False);  z = dropout(y, 0.1, False)  {train: True}
    after:   z = dropout(b, 0.1, False)

Exact in the current mode, and the graph refuses to be switched afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fxopt.contracts import Contract
from fxopt.freeze import freeze_mode
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["FreezeMode"]


@dataclasses.dataclass(frozen=True)
class FreezeMode(Pass):
    """Drop what belongs to the other mode than the one the graph is in."""

    name: ClassVar[str] = "freeze-mode"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph."""
        freeze_mode(rw)
