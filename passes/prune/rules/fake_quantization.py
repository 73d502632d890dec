"""Quantizers of training: every element by itself, with scales that may lie along one axis."""

from __future__ import annotations

import numpy as np
import torch

from fxopt.args import arg, tensor_arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure
from fxopt.quantized_ops import FAKE_QUANTIZE

__all__: list[str] = []


@handles(FAKE_QUANTIZE)
class _FakeQuantize(Rule):
    """Indices go with those of the input; scale and zero point have one for each index of their axis, or none."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        for axis, to in zip(structure.axes(tensor_arg(node, "x")), structure.axes(node), strict=True):
            structure.same(axis, to)
        for name in ("scale", "zero_point"):
            parameter = tensor_arg(node, name)
            if structure.rank(parameter) == 1 and not structure.is_one(parameter, 0):
                structure.same(structure.axis(parameter, 0), structure.axis(node, arg(node, "axis")))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """What is 0 stays 0, since the zero point is an integer; other numbers are rounded, and not followed."""
        axes = zip(constants.structure.axes(tensor_arg(node, "x")), constants.structure.axes(node), strict=True)
        for axis, to in axes:
            if axis is not None and to is not None:
                constants.values[to] = np.where(constants.values[axis] == 0, 0.0, np.nan)
