"""Take masks out of the graph: a masked weight becomes a weight with zeros.

    before:  y = conv2d(x, mul(w, w_mask))
    after:   y = conv2d(x, w)                      w is 0 where the mask was false

Exact. A weight that is also read without the mask, or with another one, stays as it is. What is trained afterwards may
move away from 0 again.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.contracts import Contract
from fxopt.graph_module import graph_modules
from fxopt.pass_base import Pass
from fxopt.passes.prune.masks import masked_parts
from fxopt.resizing import Resizing
from fxopt.rewriter import Rewriter

__all__ = ["BakeMasks", "drop_full_masks"]


@dataclasses.dataclass(frozen=True)
class BakeMasks(Pass):
    """Replace the product of a weight and its mask by the weight, with zeros where it was masked."""

    name: ClassVar[str] = "bake-masks"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Bake every mask."""
        with Resizing(rw, "masked weights are 0") as resizing:
            for node in rw.calls(torch.ops.aten.mul.Tensor):
                if (parts := masked_parts(node)) is None:
                    continue
                weight, mask = parts
                baked = rw.tensor(weight).detach() * rw.tensor(mask)
                if not torch.equal(baked, resizing.tensor(weight).detach()):
                    if (other := _other_read(rw, weight, mask)) is not None:
                        rw.skip(node, f"{other.name} reads the same weight, and not with this mask")
                        continue
                    resizing.set_tensor(weight, baked)
                rw.replace_value(node, weight, why="its mask is in the weight now")


def _other_read(rw: Rewriter, weight: torch.fx.Node, mask: torch.fx.Node) -> torch.fx.Node | None:
    """Return a node that reads the weight, under any of its names, without the mask or with another one."""
    for user in (user for node in rw.reads(rw.tensor(weight)) for user in node.users):
        parts = masked_parts(user)
        if parts is None or not torch.equal(rw.tensor(parts[1]), rw.tensor(mask)):
            return user
    return None


def drop_full_masks(rw: Rewriter) -> None:
    """Take the masks out that mask nothing."""
    for module in graph_modules(rw.gm):
        for node in list(module.graph.nodes):
            parts = masked_parts(node)
            if parts is not None and bool(rw.tensor(parts[1]).all()):
                rw.replace_value(node, parts[0], why="its mask masks nothing")
