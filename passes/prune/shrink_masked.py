"""Remove what the masks of a graph make zero, so that the same function is computed by a smaller graph.

    before:  y = conv(x, w * mask, b * mask_b);  z = conv(relu(y), v)      mask: 64 rows, 30 of them 0
    after:   y = conv(x, w[kept], b[kept]);      z = conv(relu(y), v[:, kept])

An index may go where its values are 0, where nothing that stays reads it, or where it is a constant that a bias can
hold. Which indices go together is read off the graph; see ``structure.py``, ``constants.py`` and ``removal.py``. The
pass compares what it made with the masked graph, on the examples, on random inputs, and for random masks as well.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fxopt.contracts import Contract
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import Pass
from fxopt.passes.prune.certificate import TOLERANCE, certify, error_between
from fxopt.passes.prune.shrinking import shrink
from fxopt.rewriter import Rewriter

__all__ = ["ShrinkMasked"]


@dataclasses.dataclass(frozen=True)
class ShrinkMasked(Pass):
    """Remove the channels, heads and hidden units that masks, or zeros in the weights, leave without any effect.

    Attributes:
        random_masks: How many random mask sets to prove it for, beside the masks that the graph has.
    """

    name: ClassVar[str] = "shrink-masked"
    contract: ClassVar[Contract] = Contract.ROUNDING
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    random_masks: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        if self.random_masks < 0:
            raise ValueError(f"random_masks is {self.random_masks}; wanted 0 or more")

    def run(self, rw: Rewriter) -> None:
        """Find what can go, cut it, and compare.

        Raises:
            PassError: the smaller graph computes something else, which would be a mistake in a rule.
        """
        masked = rw.gm.clone()
        shrink(rw)
        if not rw.changes:
            return
        before, after = (_parameters(gm) for gm in (masked, rw.gm))
        rw.notes.append(f"{before:,} parameters became {after:,}, {after / max(before, 1):.1%}")
        error = error_between(masked, rw.gm)
        rw.notes.append(f"masked and smaller graph differ by {error:.1e} on examples and random inputs, relatively")
        self._check(error, "the masks of the graph")
        if self.random_masks:
            found = certify(masked, runs=self.random_masks)
            rw.notes.append(f"certificate: {found}")
            self._check(found.worst, "random masks")

    def _check(self, error: float, masks: str) -> None:
        if not error <= TOLERANCE:
            raise PassError(
                describe(
                    f"{self.name} makes another function of the graph with {masks}",
                    got=f"a relative error of {error:.1e}",
                    wanted=f"at most {TOLERANCE:.0e}",
                    try_="bake-masks, which keeps the sizes; and a report of this graph, for it is a mistake in fxopt",
                )
            )


def _parameters(gm: CapturedModule) -> int:
    return sum(parameter.numel() for parameter in gm.parameters())
