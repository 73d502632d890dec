"""Compute two linear layers with nothing between them as the one that they are.

    before:  y = conv2d(conv2d(x, w1, b1), w2, b2)         pointwise, as the last of a block and the first of the next
    after:   y = conv2d(x, w2 w1, w2 b1 + b2)

The same function of real numbers; weights are computed in float64 and rounded once. What lies between such layers has
channels of very different sizes, and no relu that would bound them: in 8 bits, with one scale, it is often the worst
value of a net (the bottlenecks of Sandler et al., MobileNetV2, CVPR 2018, that no residual sum reads). Composed, it is
never rounded. A pair whose product multiplies more than ``most`` times as much as both is left alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from fxopt.args import arg, shape, spread
from fxopt.contracts import Contract
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.layer_weights import weights_of, weights_refusal
from fxopt.rewriter import Rewriter

__all__ = ["ComposeLayers"]

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclasses.dataclass(frozen=True)
class ComposeLayers(Pass):
    """Compose pairs of linear layers, and of pointwise convolutions.

    Attributes:
        most: How many times as many multiply-accumulates the composed layer may have as the two.
    """

    name: ClassVar[str] = "compose-layers"
    contract: ClassVar[Contract] = Contract.ROUNDING
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    most: float = 1.5

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.most > 0:
            raise ValueError(f"most is {self.most}; wanted above 0")

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for second in rw.calls(aten.linear.default, *_CONVOLUTIONS):
            first = arg(second, "input")
            if first.op != "call_function" or first.target is not second.target:
                continue
            if not _is_matrix(first) or not _is_matrix(second):
                continue
            reason = self._refusal(rw, first, second)
            if reason is None:
                _compose(rw, first, second)
            else:
                rw.skip(second, reason)

    def _refusal(self, rw: Rewriter, first: torch.fx.Node, second: torch.fx.Node) -> str | None:
        """Return why two layers cannot be one, or None if they can."""
        if len(first.users) > 1:
            return f"{first.name} has {len(first.users)} users"
        times = _products(first, second)
        if times > self.most:
            return f"composed with {first.name} it would multiply {times:.3g} times as much"
        return weights_refusal(rw, first) or weights_refusal(rw, second)


def _is_matrix(layer: torch.fx.Node) -> bool:
    """Return whether a layer is a product with a matrix at each place, or each few places, of its input."""
    if layer.target not in _CONVOLUTIONS:
        return True
    kernel = shape(arg(layer, "weight"))[2:]
    return arg(layer, "groups") == 1 and set(kernel) == {1} and not any(_each(layer, "padding"))


def _each(layer: torch.fx.Node, name: str) -> list[int]:
    """Return an argument of a convolution as a number for each axis."""
    return spread(arg(layer, name), len(shape(arg(layer, "weight"))) - 2)


def _products(first: torch.fx.Node, second: torch.fx.Node) -> float:
    """Return how many times as many multiply-accumulates the composed layer has as the two."""
    (middle, inputs), (outputs, _) = (shape(arg(layer, "weight"))[:2] for layer in (first, second))
    places = math.prod(_each(second, "stride")) if second.target in _CONVOLUTIONS else 1  # of the first for each
    return float(outputs * inputs / (places * middle * inputs + outputs * middle))


def _compose(rw: Rewriter, first: torch.fx.Node, second: torch.fx.Node) -> None:
    (inner, inner_bias), (outer, outer_bias) = (weights_of(rw, layer) for layer in (first, second))
    matrix = outer.detach().double().flatten(1)
    weight = (matrix @ inner.detach().double().flatten(1)).reshape(len(outer), *inner.shape[1:])
    bias = None if outer_bias is None else outer_bias.detach().double()
    if inner_bias is not None:
        moved = matrix @ inner_bias.detach().double()
        bias = moved if bias is None else bias + moved
    held = arg(second, "weight")
    arguments: list[Any] = [
        arg(first, "input"),
        rw.constant(str(held.target), weight.to(outer.dtype), near=second, trainable=outer.requires_grad),
        None if bias is None else rw.constant(f"{held.target}_bias", bias.to(outer.dtype), near=second),
    ]
    if second.target in _CONVOLUTIONS:
        strides = zip(_each(first, "stride"), _each(second, "stride"), strict=True)
        arguments.append([inside * outside for inside, outside in strides])
    rw.replace_call(second, second.target, arguments, why=f"composed with {first.name}", sources=[first])
