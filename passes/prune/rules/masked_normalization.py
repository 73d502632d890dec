"""Normalization over the channels that a mask keeps: what it leaves out may go, and without gaps it is a plain norm."""

from __future__ import annotations

import numpy as np
import torch

from fxopt.args import arg
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.ends import MaskedEnd, MaskedGroupsEnd
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten


@handles(MASKED_LAYER_NORM, MASKED_GROUP_NORM)
class _MaskedNorm(Rule):
    """Channels are an axis of input, mask, weight, bias and output alike; other axes are handed through."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, channels = arg(node, "input"), _channels(node, structure)
        for dim in range(structure.rank(node)):
            structure.same(structure.axis(source, dim), structure.axis(node, dim))
            if node.target is MASKED_GROUP_NORM and dim > 1:
                structure.pin(structure.axis(node, dim), "it is normalized over")
        axis, mask = structure.axis(node, channels), structure.axis(arg(node, "mask"), 0)
        for name in ("mask", "weight", "bias"):
            if isinstance(arg(node, name), torch.fx.Node):
                structure.same(structure.axis(arg(node, name), 0), axis)
        if axis is None or mask is None:
            return
        if node.target is MASKED_LAYER_NORM:
            structure.end(MaskedEnd(node, axis, mask))
        else:
            groups = arg(node, "groups")
            structure.end(MaskedGroupsEnd(node, axis.reshape(groups, -1), mask.reshape(groups, -1)))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Where the mask is false or the gain is 0, the result is the shift."""
        axis = constants.structure.axis(node, _channels(node, constants.structure))
        if axis is None:
            return
        mask, gain = (constants.vector(arg(node, name), len(axis), 1.0) for name in ("mask", "weight"))
        shift = constants.vector(arg(node, "bias"), len(axis), 0.0)
        constants.values[axis] = np.where((mask == 0) | (gain == 0), shift, np.nan)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Bring the number of groups up to date; where the mask keeps all that is left, normalize without it."""
        source, mask, weight, bias, eps = (arg(node, name) for name in ("input", "mask", "weight", "bias", "eps"))
        axis = cut.structure.axis(node, _channels(node, cut.structure))
        known = cut.constants.known.get(mask)
        goes = np.zeros(1, bool) if axis is None else cut.removal.removed(axis)
        is_full = known is not None and bool(known.numpy()[~goes].all())
        if node.target is MASKED_LAYER_NORM:
            if is_full:
                size = int((~goes).sum())
                cut.set_call(node, aten.layer_norm.default, (source, [size], weight, bias, eps))
            return
        groups = int((~goes.reshape(arg(node, "groups"), -1)).any(axis=1).sum())
        if is_full:
            cut.set_call(node, aten.group_norm.default, (source, groups, weight, bias, eps))
        else:
            cut.set_arg(node, "groups", groups)


def _channels(node: torch.fx.Node, structure: Structure) -> int:
    """Return the axis of the channels."""
    return 1 if node.target is MASKED_GROUP_NORM else structure.rank(node) - 1
