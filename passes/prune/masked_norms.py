"""Let layer and group norms leave masked channels out of their mean and variance, and back."""

from __future__ import annotations

import torch

from fxopt.args import arg, shape_text
from fxopt.errors import PassError, describe
from fxopt.graph_module import graph_modules
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM
from fxopt.rewriter import Rewriter

__all__ = ["mask_norm"]

aten = torch.ops.aten
_MASKED = (MASKED_LAYER_NORM, MASKED_GROUP_NORM)


def mask_norm(rw: Rewriter, name: str, kept: torch.Tensor) -> None:
    """Mask channels of the norm that the call ``name`` makes.

    Args:
        rw: Changes the graph.
        name: Name of a call of a layer norm over the last axis, or of a group norm, masked already or not.
        kept: bool[C], true where a channel is kept.

    Raises:
        PassError: there is no such call, or it has another number of channels.
    """
    node = next((n for module in graph_modules(rw.gm) for n in module.graph.nodes if n.name == name), None)
    if node is None or node.target not in (aten.layer_norm.default, aten.group_norm.default, *_MASKED):
        raise PassError(
            describe(
                f"the plan masks channels of {name!r}, and no layer norm or group norm has that name",
                try_="make the plan on the graph that it is applied to: Prune(...).make_plan(gm)",
            )
        )
    size = rw.shape(node)[1 if node.target in (aten.group_norm.default, MASKED_GROUP_NORM) else -1]
    if kept.shape != (size,):
        raise PassError(
            describe(
                f"the mask of the channels of {name!r} has another shape", got=shape_text(kept), wanted=f"bool[{size}]"
            )
        )
    why = f"{int(kept.sum())} of {kept.numel()} channels kept"
    if node.target in _MASKED:
        mask = arg(node, "mask")
        joined = rw.tensor(mask) & kept.to(rw.tensor(mask).device)
        if not torch.equal(joined, rw.tensor(mask)):
            rw.set_tensor(mask, joined, why=why)
        return
    source, weight, bias, eps = (arg(node, each) for each in ("input", "weight", "bias", "eps"))
    device = next(
        (rw.tensor(each).device for each in (weight, bias) if each is not None and each.op == "get_attr"), None
    )
    mask = rw.constant(f"{name}_channels", kept.to(device), near=node, why=why)
    if node.target is aten.layer_norm.default:
        rw.replace_call(node, MASKED_LAYER_NORM, (source, mask, weight, bias, eps), why=why)
    else:
        groups = arg(node, "num_groups")
        rw.replace_call(node, MASKED_GROUP_NORM, (source, mask, groups, weight, bias, eps), why=why)
