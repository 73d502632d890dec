"""Normalization: by channel, or over statistics of channels."""

from __future__ import annotations

import math

import numpy as np
import torch

from fxopt.args import arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.ends import NormalizedEnd, SumEnd
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten


@handles(aten.batch_norm.default, aten.instance_norm.default)
class _BatchNorm(Rule):
    """Each channel by itself."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = arg(node, "input")
        for dim in range(structure.rank(node)):
            structure.same(structure.axis(source, dim), structure.axis(node, dim))
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = arg(node, name)
            if isinstance(value, torch.fx.Node):
                structure.same(structure.axis(value, 0), structure.axis(node, 1))
        if node.target is aten.instance_norm.default:
            for dim in range(2, structure.rank(node)):
                structure.pin(structure.axis(node, dim), "it is normalized over")

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """A channel whose input or gain is constant, or 0, yields a constant, in evaluation."""
        out = constants.structure.axis(node, 1)
        if out is None:
            return
        size = len(out)
        source = arg(node, "input")
        x = constants.along(source, 1 - constants.structure.rank(source), size)

        def vector(name: str, otherwise: float) -> np.ndarray:
            value = arg(node, name)
            if not isinstance(value, torch.fx.Node):
                return np.full(size, otherwise)
            # Running statistics are written while training; in evaluation they are what the buffer holds.
            found = constants.along(value, -1, size)
            buffer = constants.buffer(value)
            return found if buffer is None else buffer.double().numpy()

        gain, shift = vector("weight", 1.0), vector("bias", 0.0)
        found = np.where(gain == 0, shift, np.nan)
        if node.target is aten.batch_norm.default and arg(node, "running_mean") is not None:
            scale = gain / np.sqrt(vector("running_var", np.nan) + arg(node, "eps"))
            found = np.where(np.isnan(found), (x - vector("running_mean", np.nan)) * scale + shift, found)
        constants.values[out] = found


@handles(aten.layer_norm.default)
class _LayerNorm(Rule):
    """Statistics over the last axis: an index of it can go only with a mask that leaves it out of them."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, rank, shape = arg(node, "input"), structure.rank(node), arg(node, "normalized_shape")
        for dim in range(rank):
            axis, to = structure.axis(source, dim), structure.axis(node, dim)
            structure.same(axis, to)
            if dim < rank - len(shape) or axis is None:
                continue
            if len(shape) > 1:
                structure.pin(axis, "it is normalized over, together with other axes")
            else:
                structure.end(NormalizedEnd(node, axis))
            for name in ("weight", "bias"):
                if isinstance(arg(node, name), torch.fx.Node):
                    structure.same(structure.axis(arg(node, name), dim - rank + len(shape)), to)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Where the gain is 0, the result is the shift."""
        constants.values[_last(node, constants)] = _scaled_away(node, constants)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Bring the shape up to date; it changes only where a mask had left the indices out."""
        shape = arg(node, "normalized_shape")
        first = cut.structure.rank(node) - len(shape)
        cut.set_arg(node, "normalized_shape", [cut.size(node, first + place) for place in range(len(shape))])


def _last(node: torch.fx.Node, constants: Constants) -> np.ndarray:
    axis = constants.structure.axis(node, -1)
    return np.zeros(0, int) if axis is None else axis


def _scaled_away(node: torch.fx.Node, constants: Constants) -> np.ndarray:
    size = len(_last(node, constants))
    weight = arg(node, "weight")
    bias = arg(node, "bias") if node.target is not aten.rms_norm.default else None
    if not isinstance(weight, torch.fx.Node):
        return np.full(size, np.nan)
    shift = constants.along(bias, -1, size) if isinstance(bias, torch.fx.Node) else np.zeros(size)
    return np.where(constants.along(weight, -1, size) == 0, shift, np.nan)


@handles(aten.rms_norm.default)
class _RmsNorm(Rule):
    """x / sqrt(sum(x^2) / n + eps): zeros may go, and n stays what it was by way of eps and a factor."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, rank, shape = arg(node, "input"), structure.rank(node), arg(node, "normalized_shape")
        for dim in range(rank):
            axis, to = structure.axis(source, dim), structure.axis(node, dim)
            structure.same(axis, to)
            if dim >= rank - len(shape) and axis is not None:
                structure.end(SumEnd(node, axis))
                if isinstance(arg(node, "weight"), torch.fx.Node):
                    structure.same(structure.axis(arg(node, "weight"), dim - rank + len(shape)), to)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Zeros stay zeros, and so does what the gain is 0 for."""
        axis = _last(node, constants)
        found = _scaled_away(node, constants)
        source = constants.structure.axis(arg(node, "input"), -1)
        constants.values[axis] = found if source is None else np.where(constants.values[source] == 0, 0.0, found)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Keep the number of values that the mean is taken of."""
        shape = arg(node, "normalized_shape")
        rank = cut.structure.rank(node)
        sizes = [cut.size(node, rank - len(shape) + place) for place in range(len(shape))]
        before, now = math.prod(shape), math.prod(sizes)
        if before != now:
            eps = arg(node, "eps")
            if eps is None:
                eps = torch.finfo(node.meta["val"].dtype).eps
            cut.set_arg(node, "normalized_shape", sizes)
            cut.set_arg(node, "eps", eps * before / now)
            cut.scale(node, math.sqrt(before / now))


@handles(aten.group_norm.default)
class _GroupNorm(Rule):
    """Statistics over the channels of a group: whole groups may go, channels of a group not."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, groups = arg(node, "input"), arg(node, "num_groups")
        for dim in range(structure.rank(node)):
            structure.same(structure.axis(source, dim), structure.axis(node, dim))
        for dim in range(2, structure.rank(node)):
            structure.pin(structure.axis(node, dim), "it is normalized over")
        axis = structure.axis(node, 1)
        for name in ("weight", "bias"):
            if isinstance(arg(node, name), torch.fx.Node):
                structure.same(structure.axis(arg(node, name), 0), axis)
        if axis is None:
            return
        outer = structure.fresh(groups)
        structure.notes[node, "groups"] = outer
        if groups == len(axis):
            structure.same(axis, outer)
            return
        inner = structure.fresh(len(axis) // groups)
        if groups == 1:
            structure.pin(outer, "it is the only group")
            structure.same(axis, inner)
        else:
            structure.product(axis, [outer, inner])
        structure.end(NormalizedEnd(node, inner))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Where the gain is 0, the result is the shift."""
        axis, weight, bias = constants.structure.axis(node, 1), arg(node, "weight"), arg(node, "bias")
        if axis is not None and isinstance(weight, torch.fx.Node):
            shift = constants.along(bias, -1, len(axis)) if isinstance(bias, torch.fx.Node) else np.zeros(len(axis))
            constants.values[axis] = np.where(constants.along(weight, -1, len(axis)) == 0, shift, np.nan)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Bring the number of groups up to date."""
        if (node, "groups") in cut.structure.notes:
            cut.set_arg(node, "num_groups", cut.count(cut.structure.notes[node, "groups"]))
