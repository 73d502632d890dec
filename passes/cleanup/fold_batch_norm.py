"""Fold batch normalization into the linear operator before or behind it.

    before:  y = conv2d(x, w, b);  z = batch_norm(y, gamma, beta, mean, var, eps)
    after:   z = conv2d(x, w', b')       w' = w s,  b' = (b - mean) s + beta,  s = gamma / sqrt(var + eps)

    before:  y = batch_norm(x, ...);  z = conv2d(y, w, b)      without padding
    after:   z = conv2d(x, w', b')       w' = w s (along the inputs),  b' = b + sum(w t),  t = beta - mean s

Pools may stand before the batch norm of the first form: a mean of values that are all scaled and shifted alike is the
mean, scaled and shifted; so is the largest of them, where no scale is negative.

In evaluation both sides are the same function of real numbers; w' and b' are computed in float64 and rounded once. With
padding the second form would pad with zeros where the first pads with t, so it is taken only where t is zero; so it is
before a transposed convolution, whose border gets fewer terms than its middle. A batch norm behind another one is such
an operator too. A graph that can still be switched to training keeps the statistics it had: its batch norm is frozen.
Source: Jacob et al. 2018, Quantization and Training of Neural Networks, section 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import ClassVar

import torch

from fxopt.args import arg
from fxopt.contracts import Contract
from fxopt.layer_operators import CONVOLUTIONS, MAX_POOLS, TRANSPOSED_CONVOLUTIONS
from fxopt.ops import UPDATE_BUFFER
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.batch_norm_algebra import fold_before, fold_into_norm, scale_and_shift
from fxopt.passes.cleanup.layer_weights import (
    LAYER_ARGUMENTS,
    fold_behind,
    groups_of,
    install,
    sibling,
    weights_of,
    weights_refusal,
)
from fxopt.passes.cleanup.same_uses import Fold, alike
from fxopt.rewriter import Rewriter

__all__ = ["FoldBatchNorm"]

aten = torch.ops.aten
_NORM = aten.batch_norm.default
_MEANS = frozenset({aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default})
_MEANS_OF_ALL = frozenset(
    {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default}
)
_POOLS = frozenset(MAX_POOLS) | _MEANS | _MEANS_OF_ALL


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norms of evaluation into convolutions, transposed convolutions, linear layers and batch norms."""

    name: ClassVar[str] = "fold-batch-norm"
    contract: ClassVar[Contract] = Contract.ROUNDING
    evaluation_only: ClassVar[bool] = True

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        folded: set[str] = set()
        sites = frozenset(rw.calls(_NORM))
        for norm in rw.calls(_NORM):
            statistics = arg(norm, "running_mean")
            reason = _not_ready(norm) or _fold(rw, norm, sites)
            if reason is not None:
                rw.skip(norm, reason)
            elif rw.readers(str(statistics.target), statistics.graph) == 0:
                folded.add(sibling(str(statistics.target), "num_batches_tracked"))
        for update in rw.calls(UPDATE_BUFFER):
            if str(arg(update, "buffer").target) in folded:
                rw.discard(update, why="counts the batches of a folded batch norm")


def _not_ready(norm: torch.fx.Node) -> str | None:
    if arg(norm, "training"):
        return "batch norm is training"
    names = ("weight", "bias", "running_mean", "running_var")
    if any(arg(norm, name) is None for name in names[2:]):
        return "it keeps no running statistics, so that it normalizes by the batch"
    if any(isinstance(arg(norm, name), torch.fx.Node) and arg(norm, name).op != "get_attr" for name in names):
        return "its statistics or weights are computed by the graph"
    return None


def _fold(rw: Rewriter, norm: torch.fx.Node, sites: Collection[torch.fx.Node]) -> str | None:
    """Fold one batch norm, and return None; or return why that is impossible."""
    layer, pools = _layer_before(norm)
    reason = _refuses_after(rw, layer, pools, norm) or _fold_after(rw, layer, pools, norm, sites)
    behind = next(iter(norm.users)) if len(norm.users) == 1 else None
    if reason is None or behind is None or behind.target not in LAYER_ARGUMENTS:
        return reason
    if arg(behind, LAYER_ARGUMENTS[behind.target][0]) is not norm:
        return reason
    return _refuses_before(rw, norm, behind) or _fold_before(rw, norm, behind, sites)


def _layer_before(norm: torch.fx.Node) -> tuple[torch.fx.Node, tuple[torch.fx.Node, ...]]:
    """Return what stands before a batch norm, and the pools between both, the first one first."""
    pools: list[torch.fx.Node] = []
    layer = arg(norm, "input")
    while layer.target in _POOLS:
        pools.insert(0, layer)
        layer = arg(layer, "self")
    return layer, tuple(pools)


def _fold_after(
    rw: Rewriter,
    layer: torch.fx.Node,
    pools: Sequence[torch.fx.Node],
    norm: torch.fx.Node,
    sites: Collection[torch.fx.Node],
) -> str | None:
    path = (arg(layer, LAYER_ARGUMENTS[layer.target][0]), layer, *pools, norm)
    fold = Fold(path, layer=1, node=len(path) - 1)
    return fold_behind(rw, alike(fold, sites), *_affine(rw, norm))


def _refuses_after(
    rw: Rewriter, layer: torch.fx.Node, pools: Sequence[torch.fx.Node], norm: torch.fx.Node
) -> str | None:
    """Return why the batch norm cannot go into the operator before it, or None."""
    # A batch norm before another one is folded into that when it is looked at itself.
    if layer.op != "call_function" or layer.target not in LAYER_ARGUMENTS or layer.target is _NORM:
        return f"{layer.name} before it is not a convolution or linear layer"
    for node in (layer, *pools):
        if len(node.users) > 1:
            return f"{node.name} has {len(node.users)} users"
    reason = weights_refusal(rw, layer) or _wrong_axis(rw, layer, f"axis 1 of {layer.name}")
    return reason or _pool_refusal(rw, pools, norm)


def _pool_refusal(rw: Rewriter, pools: Sequence[torch.fx.Node], norm: torch.fx.Node) -> str | None:
    """Return why the batch norm cannot go through pools, or None."""
    if not pools:
        return None
    scale, shift = _affine(rw, norm)
    for pool in pools:
        if pool.target in MAX_POOLS and bool((scale < 0).any()):
            return f"{pool.name} takes the largest values, and {int((scale < 0).sum())} scales are negative"
        if pool.target in _MEANS and bool(shift.any()) and not _is_mean(pool):
            return f"{pool.name} counts zeros of its padding, or divides by another number"
    return None


def _is_mean(pool: torch.fx.Node) -> bool:
    """Return whether an average pool averages nothing but values of its input."""
    divisor = None if pool.target is aten.avg_pool1d.default else arg(pool, "divisor_override")
    return divisor is None and not (_pads(pool) and arg(pool, "count_include_pad"))


def _refuses_before(rw: Rewriter, norm: torch.fx.Node, layer: torch.fx.Node) -> str | None:
    """Return why the batch norm cannot go into the operator behind it, or None."""
    reason = weights_refusal(rw, layer) or _wrong_axis(rw, layer, f"axis 1 of the input of {layer.name}")
    if layer.target is _NORM:
        reason = _not_ready(layer)
    if reason is not None:
        return reason
    _, shift = _affine(rw, norm)
    if layer.target in CONVOLUTIONS and _pads(layer) and bool(shift.any()):
        return f"{layer.name} pads with zeros, which the shift of the batch norm would change"
    if layer.target in TRANSPOSED_CONVOLUTIONS and bool(shift.any()):
        return f"the border of {layer.name} would get the shift of the batch norm less often than its middle"
    return None


def _wrong_axis(rw: Rewriter, layer: torch.fx.Node, where: str) -> str | None:
    if layer.target is aten.linear.default and rw.value(layer).ndim != 2:
        return f"it normalizes {where}, whose features are the last axis"
    if (
        layer.target in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
        and rw.value(layer).ndim != rw.value(arg(layer, "weight")).ndim
    ):
        return f"it normalizes {where}, which has no batch axis"
    return None


def _pads(layer: torch.fx.Node) -> bool:
    """Return whether a convolution or pool adds anything around its input."""
    padding = arg(layer, "padding")
    if isinstance(padding, str):
        return padding != "valid" and any(size != 1 for size in arg(layer, "weight").meta["val"].shape[2:])
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def _fold_before(
    rw: Rewriter, norm: torch.fx.Node, layer: torch.fx.Node, sites: Collection[torch.fx.Node]
) -> str | None:
    scale, shift = _affine(rw, norm)
    fold = Fold((arg(norm, "input"), norm, layer), layer=2, node=1)
    if layer.target is _NORM:
        new_weight, new_bias = fold_into_norm(*_affine(rw, layer), *_statistics(rw, layer), scale, shift)
        dtype = rw.tensor(arg(layer, "running_mean")).dtype
        new_weight, new_bias = new_weight.to(dtype), new_bias.to(dtype)
        return install(rw, alike(fold, sites), new_weight, new_bias)
    weight, bias = weights_of(rw, layer)
    if layer.target is aten.addmm.default:
        new_weight, new_bias = fold_before(weight.t(), bias, scale, shift)
        new_weight = new_weight.t()
    else:
        new_weight, new_bias = fold_before(
            weight, bias, scale, shift, transposed=layer.target in TRANSPOSED_CONVOLUTIONS, groups=groups_of(layer)
        )
    return install(rw, alike(fold, sites), new_weight, new_bias)


def _statistics(rw: Rewriter, norm: torch.fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    mean, var = (rw.tensor(arg(norm, name)).detach().double() for name in ("running_mean", "running_var"))
    return mean, (var + arg(norm, "eps")).sqrt()


def _affine(rw: Rewriter, norm: torch.fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    mean, deviation = _statistics(rw, norm)
    gamma, beta = (
        None if arg(norm, name) is None else rw.tensor(arg(norm, name)).detach().double() for name in ("weight", "bias")
    )
    return scale_and_shift(gamma, beta, mean, deviation)
