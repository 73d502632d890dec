"""Fold constants that the result of a linear operator is multiplied by, or that are added to it, into its weights.

    before:  y = linear(x, w, b);  z = mul(y, s)                after:  z = linear(x, w s, b s)
    before:  y = conv2d(x, w, b);  z = add(y, t)                after:  z = conv2d(x, w, b + t)

The constants are numbers, or tensors of one element or one for each channel: the scales of residual branches,
LayerScale (Touvron et al. 2021, Going deeper with image transformers), activations with a slope. Both sides are the
same function of real numbers; weights are computed in float64 and rounded once. A trained scale becomes a part of the
weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import ClassVar

import torch

from fxopt.args import arg, plain_number, shape
from fxopt.contracts import Contract
from fxopt.layer_operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.layer_weights import LAYER_ARGUMENTS, fold_behind, weights_refusal
from fxopt.passes.cleanup.memory import same_layout
from fxopt.passes.cleanup.same_uses import Fold, alike
from fxopt.rewriter import Rewriter

__all__ = ["FoldScale"]

aten = torch.ops.aten

_LAYERS = frozenset(LAYER_ARGUMENTS) - {aten.batch_norm.default}
_OPERATORS = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar)


@dataclasses.dataclass(frozen=True)
class FoldScale(Pass):
    """Fold constant factors and summands into the convolutions and linear layers before them."""

    name: ClassVar[str] = "fold-scale"
    contract: ClassVar[Contract] = Contract.ROUNDING
    evaluation_only: ClassVar[bool] = True

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        sites = frozenset(rw.calls(*_OPERATORS))
        for node in rw.calls(*_OPERATORS):
            site = _site(node)
            if site is None:
                continue
            reason = _refusal(rw, site) or _fold(rw, site, sites)
            if reason is not None:
                rw.skip(node, reason)


@dataclasses.dataclass(frozen=True)
class _Site:
    """A constant behind a layer.

    Attributes:
        node: What joins both.
        value: The operand that comes from the layer.
        constant: The other one.
        layer: The layer.
        between: What moves the axes of its result; ``value`` is the last of them, or the layer itself.
        axis: Along which the channels of the layer lie in ``value``.
    """

    node: torch.fx.Node
    value: torch.fx.Node
    constant: torch.fx.Node | float
    layer: torch.fx.Node
    between: tuple[torch.fx.Node, ...]
    axis: int


def _site(node: torch.fx.Node) -> _Site | None:
    """Return what a node joins, or None if that is not a layer and a constant."""
    left, right = arg(node, "self"), arg(node, "other")
    pairs = [(left, right)] if node.target is aten.div.Tensor else [(left, right), (right, left)]
    for value, constant in pairs:
        is_number = plain_number(constant) is not None
        if not is_number and not (isinstance(constant, torch.fx.Node) and constant.op == "get_attr"):
            continue
        if isinstance(value, torch.fx.Node) and (found := _layer_of(value)) is not None:
            return _Site(node, value, constant, *found)
    return None


def _layer_of(value: torch.fx.Node) -> tuple[torch.fx.Node, tuple[torch.fx.Node, ...], int] | None:
    """Return the layer that a value is the result of, what moves its axes, and where its channels lie then."""
    layer, between = value, []
    while layer.target in (aten.permute.default, aten.transpose.int):
        between.append(layer)
        layer = arg(layer, "self")
    if layer.target not in _LAYERS:
        return None
    rank = len(shape(layer))
    convolution = layer.target in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
    axis = rank - len(shape(arg(layer, "weight"))) + 1 if convolution else rank - 1
    for move in reversed(between):
        axis = _order(move, rank).index(axis)
    return layer, tuple(between), axis


def _order(move: torch.fx.Node, rank: int) -> list[int]:
    """Return which axis of its input each axis of a permutation is."""
    if move.target is aten.permute.default:
        return [dim % rank for dim in arg(move, "dims")]
    order = list(range(rank))
    first, second = (arg(move, name) % rank for name in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return order


def _refusal(rw: Rewriter, site: _Site) -> str | None:
    if not rw.dtype(site.node).is_floating_point or not same_layout(site.node.meta["val"], site.value.meta["val"]):
        return f"its result has another type or shape than {site.value.name}"
    for node in (site.layer, *site.between):
        if len(node.users) > 1:
            return f"{node.name} has {len(node.users)} users"
    return weights_refusal(rw, site.layer)


def _fold(rw: Rewriter, site: _Site, sites: Collection[torch.fx.Node]) -> str | None:
    """Fold one constant, and return None; or return why that is impossible."""
    numbers, node = _along_channels(rw, site), site.node
    if numbers is None:
        return "its constant differs along other axes than that of the channels"
    scale, shift = numbers, None
    if node.target is aten.div.Tensor:
        scale = 1 / numbers
    elif node.target is not aten.mul.Tensor:
        one = torch.ones_like(numbers)
        alpha = plain_number(arg(node, "alpha"))
        if alpha is None:
            return f"its factor alpha is {arg(node, 'alpha').name}, a size"
        sign = alpha if node.target is aten.add.Tensor else -alpha
        first = arg(node, "self") is site.value and node.target is not aten.rsub.Scalar
        scale, shift = (one, sign * numbers) if first else (sign * one, numbers)
    path = (arg(site.layer, LAYER_ARGUMENTS[site.layer.target][0]), site.layer, *reversed(site.between), node)
    return fold_behind(rw, alike(Fold(path, layer=1, node=len(path) - 1), sites), scale, shift)


def _along_channels(rw: Rewriter, site: _Site) -> torch.Tensor | None:
    """Return a constant as float64[channels]; None if it differs along another axis."""
    sizes = shape(site.value)
    if isinstance(site.constant, torch.fx.Node):
        held = rw.tensor(site.constant).detach().double()
    else:
        held = torch.tensor(site.constant, dtype=torch.float64)
    aligned = [1] * (len(sizes) - held.ndim) + list(held.shape)
    if any(size != 1 for place, size in enumerate(aligned) if place != site.axis):
        return None
    return held.flatten().expand(int(sizes[site.axis]))
