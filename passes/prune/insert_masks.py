"""Multiply parameters by masks, which are buffers of the graph.

    before:  y = conv2d(x, w)
    after:   y = conv2d(x, mul(w, w_mask))        w_mask: bool in the shape of w, true where a weight is kept

The gradient of a masked weight is 0, and the weight itself is set to 0: neither momentum nor weight decay moves it
(``w <- w - lr * grad * M``). The masks are in the state dict and in the exported file; ``bake-masks`` takes them out
again, and ``shrink-masked`` removes what they make 0. Layer and group norms over masked channels take mean and variance
of the others alone, as they do in the smaller net.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch

from fxopt.args import shape_text
from fxopt.attributes import get_path
from fxopt.errors import PassError, describe
from fxopt.pass_base import LossyPass
from fxopt.passes.prune.masked_norms import mask_norm
from fxopt.passes.prune.masks import MaskPlan, masked_parts
from fxopt.resizing import Resizing
from fxopt.rewriter import Rewriter

__all__ = ["InsertMasks"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class InsertMasks(LossyPass):
    """Apply a plan of masks.

    Attributes:
        plan: The masks; see :class:`MaskPlan`. Where a parameter has one already, what either masks is masked.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB. The default refuses only
            nonsense: a pruned net is of use after training.
    """

    name: ClassVar[str] = "insert-masks"
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    divisible: ClassVar[bool] = False
    plan: MaskPlan = dataclasses.field(default_factory=lambda: MaskPlan({}), repr=False)
    min_sqnr_db: float = -20.0

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.plan, MaskPlan):
            raise TypeError(f"plan is a {type(self.plan).__name__}; wanted a MaskPlan")

    def run(self, rw: Rewriter) -> None:
        """Insert the masks.

        Raises:
            PassError: the plan names a parameter or a norm that the graph does not have, or a mask has another shape.
        """
        parameters = dict(rw.gm.named_parameters(remove_duplicate=False))
        for name, mask in self.plan.items():
            _check(parameters, name, mask)
        with Resizing(rw, "masked weights are 0") as resizing:
            for name, mask in self.plan.items():
                _mask(rw, resizing, name, mask)
        for name, kept in self.plan.channels.items():
            mask_norm(rw, name, kept)


def _check(parameters: Mapping[str, torch.Tensor], name: str, mask: torch.Tensor) -> None:
    if name not in parameters:
        near = [other for other in parameters if other.rsplit(".", 1)[0] == name.rsplit(".", 1)[0]]
        raise PassError(
            describe(
                f"the plan masks {name!r}, and the graph has no such parameter",
                wanted=", ".join((near or list(parameters))[:8]),
                try_="make the plan on the graph that it is applied to: Prune(...).make_plan(gm)",
            )
        )
    if mask.shape != parameters[name].shape:
        raise PassError(
            describe(
                f"the mask of {name!r} has another shape than the parameter",
                got=shape_text(mask),
                wanted=shape_text(torch.empty(parameters[name].shape, dtype=torch.bool, device="meta")),
            )
        )


def _mask(rw: Rewriter, resizing: Resizing, name: str, mask: torch.Tensor) -> None:
    """Mask every read of a parameter, in each graph with one product for all of them; masks that it has are joined."""
    tensor = get_path(rw.gm, name)
    reads = rw.reads(tensor)
    if not any(node.users for node in reads):
        return
    mask = mask.to(tensor.device)
    held = [parts[1] for node in reads for user in node.users if (parts := masked_parts(user)) is not None]
    for old in held:
        mask = mask & rw.tensor(old)
    why = f"{int(mask.sum())} of {mask.numel()} weights kept"
    for old in held:
        if not torch.equal(rw.tensor(old), mask):
            rw.set_tensor(old, mask, why=why)
    for graph in dict.fromkeys(node.graph for node in reads):
        _insert(rw, [node for node in reads if node.graph is graph], name, mask, why)
    resizing.set_tensor(reads[0], tensor.detach().masked_fill(~mask, 0))


def _insert(rw: Rewriter, reads: list[torch.fx.Node], name: str, mask: torch.Tensor, why: str) -> None:
    """Put one product in front of all of a graph's uses of a parameter that are not masked."""
    users = [(user, node) for node in reads for user in node.users if masked_parts(user) is None]
    if not users:
        return
    first, read = min(users, key=lambda pair: pair[0])  # nodes compare by their place in the graph
    kept = rw.constant(f"{name}_mask", mask, near=first, why=why)
    masked = rw.insert_call(aten.mul.Tensor, (read, kept), before=first, why=why, sources=[read])
    for user, node in users:
        rw.replace_argument(user, node, masked, why=f"{name} is masked")
