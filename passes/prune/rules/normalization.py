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
from fxopt.passes.prune.structure import Indices, Structure

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
            # Running statistics are written while training; in evaluation they are what the buffer holds.
            buffer = constants.buffer(value) if isinstance(value, torch.fx.Node) else None
            return constants.vector(value, size, otherwise) if buffer is None else buffer.double().numpy()

        gain, shift = vector("weight", 1.0), vector("bias", 0.0)
        found = np.where(gain == 0, shift, np.nan)
        if node.target is aten.batch_norm.default and arg(node, "running_mean") is not None:
            scale = gain / np.sqrt(vector("running_var", np.nan) + arg(node, "eps"))
            found = np.where(np.isnan(found), (x - vector("running_mean", np.nan)) * scale + shift, found)
        constants.values[out] = found


def _scaled_away(node: torch.fx.Node, dim: int, constants: Constants, *, bias: bool = True) -> np.ndarray:
    """Return the shift of each channel along an axis whose gain is 0, f64[channels], NaN for the others."""
    axis = constants.structure.axis(node, dim)
    size = 0 if axis is None else len(axis)
    gain = constants.vector(arg(node, "weight"), size, np.nan)
    return np.where(gain == 0, constants.vector(arg(node, "bias") if bias else None, size, 0.0), np.nan)


class _OverLastAxes(Rule):
    """Statistics over the last axes, along which gain and shift lie; other axes are handed through."""

    affine: tuple[str, ...] = ("weight", "bias")

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, rank, shape = arg(node, "input"), structure.rank(node), arg(node, "normalized_shape")
        for dim in range(rank):
            axis, to = structure.axis(source, dim), structure.axis(node, dim)
            structure.same(axis, to)
            if dim < rank - len(shape) or axis is None:
                continue
            self.normalize(node, axis, len(shape), structure)
            for name in self.affine:
                if isinstance(arg(node, name), torch.fx.Node):
                    structure.same(structure.axis(arg(node, name), dim - rank + len(shape)), to)

    def normalize(self, node: torch.fx.Node, axis: Indices, axes: int, structure: Structure) -> None:
        """Say what it takes for an index of one of ``axes`` axes to go."""
        raise NotImplementedError

    def sizes(self, node: torch.fx.Node, cut: Cut) -> list[int]:
        """Return the sizes of these axes after the cut."""
        shape = arg(node, "normalized_shape")
        first = cut.structure.rank(node) - len(shape)
        return [cut.size(node, first + place) for place in range(len(shape))]


@handles(aten.layer_norm.default)
class _LayerNorm(_OverLastAxes):
    """An index of the last axis can go only with a mask that leaves it out of the statistics."""

    def normalize(self, node: torch.fx.Node, axis: Indices, axes: int, structure: Structure) -> None:
        """Let one axis end; several stay."""
        if axes > 1:
            structure.pin(axis, "it is normalized over, together with other axes")
        else:
            structure.end(NormalizedEnd(node, axis))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Where the gain is 0, the result is the shift."""
        if (axis := constants.structure.axis(node, -1)) is not None:
            constants.values[axis] = _scaled_away(node, -1, constants)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Bring the shape up to date; it changes only where a mask had left the indices out."""
        cut.set_arg(node, "normalized_shape", self.sizes(node, cut))


@handles(aten.rms_norm.default)
class _RmsNorm(_OverLastAxes):
    """x / sqrt(sum(x^2) / n + eps): zeros may go, and n stays what it was by way of eps and a factor."""

    affine = ("weight",)

    def normalize(self, node: torch.fx.Node, axis: Indices, axes: int, structure: Structure) -> None:
        """Let each axis end in a sum."""
        structure.end(SumEnd(node, axis))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Zeros stay zeros, and so does what the gain is 0 for."""
        axis, source = (constants.structure.axis(value, -1) for value in (node, arg(node, "input")))
        if axis is not None:
            found = _scaled_away(node, -1, constants, bias=False)
            constants.values[axis] = found if source is None else np.where(constants.values[source] == 0, 0.0, found)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Keep the number of values that the mean is taken of."""
        sizes = self.sizes(node, cut)
        before, now = math.prod(arg(node, "normalized_shape")), math.prod(sizes)
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
        if (axis := constants.structure.axis(node, 1)) is not None:
            constants.values[axis] = _scaled_away(node, 1, constants)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Bring the number of groups up to date."""
        if (node, "groups") in cut.structure.notes:
            cut.set_arg(node, "num_groups", cut.count(cut.structure.notes[node, "groups"]))
