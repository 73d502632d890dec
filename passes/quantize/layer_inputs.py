"""What a layer reads and yields during calibration, as matrices in which rounding its weights is a linear problem.

A layer's weights are settled from what all calibration inputs make of the settled layers before it, and a walk through
the quantized graph goes on with them: one run of the graph, and one of the float graph if its values are the targets,
settles all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from fxopt.args import arg
from fxopt.errors import PassError, describe
from fxopt.graph_module import graph_modules
from fxopt.pair_sums import can_overflow
from fxopt.passes.quantize.graph_walk import Walk, items_within
from fxopt.passes.quantize.insert_qdq import InsertQdq, refuse_quantized
from fxopt.passes.quantize.layer_matrix import LayerMatrix
from fxopt.passes.quantize.layout import Layout, bias_of
from fxopt.passes.quantize.placement import Site, path_of
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.target import TARGETS
from fxopt.rewriter import Rewriter

__all__ = ["PlannedLayer", "Settle", "planned_layers"]


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """A layer whose weights a plan rounds, and what calibration makes of it.

    Attributes:
        site: The layer in the float graph.
        spec: How its weight is quantized.
        layout: The layer as matrices.
        weight: Its float weights, f32[groups, out, in].
        scale: The steps of their grid, f32[groups, out].
        bias: Its bias as the quantized graph has it, f32[groups, out], or None.
        inputs: What it reads, for each calibration input, where all layers before it are quantized and settled.
        targets: What it is to yield, that is what the float graph yields, limits behind it included; or None.
        limits: The smallest and the largest of these, where the layer has such a limit.
    """

    site: Site
    spec: QuantSpec
    layout: LayerMatrix
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor] | None
    limits: tuple[float | None, float | None]

    def nearest(self) -> torch.Tensor:
        """Return the integers that the weights are nearest to, as floats, [groups, out, in]."""
        return torch.round(self.weight / self.scale[..., None]).clamp(*self.spec.limits)

    @property
    def on_grid(self) -> bool:
        """Whether the weights are integers times their scales already, so that there is nothing to round."""
        return torch.equal(self.nearest() * self.scale[..., None], self.weight)

    def can_overflow(self, integers: torch.Tensor) -> torch.Tensor:
        """Return which channels have activations for which a 16-bit sum overflows, bool[groups, out]."""
        if self.spec.dtype is not torch.int8:
            return torch.zeros(self.scale.shape, dtype=torch.bool)
        axis, weight = self.site.kernel.weight_axis, self.layout.weight(integers).to(torch.int8)
        return can_overflow(weight, axis, groups=self.layout.groups).reshape(self.scale.shape)


def planned_layers(
    rw: Rewriter, plan: QuantPlan, target: str, data: Any, *, megabytes: int, with_targets: bool
) -> Iterator[tuple[PlannedLayer, Settle]]:
    """Yield the layers whose weights the plan rounds, in order, each with a function to be called with its integers.

    The layers behind read what a layer yields then. Layers that are not settled are rounded to nearest. Layers in a
    branch or loop, and weights that something else reads too, are refused through ``rw.skip``.

    Raises:
        PassError: the graph is quantized or in train mode, or the plan does not fit it.
        CalibrationError: the calibration data do not fit.
    """
    refuse_quantized(rw, rw.pass_name)
    if rw.gm.training:
        raise PassError(describe("the graph is in train mode, and a plan is for evaluation", try_="graph.eval()"))
    quantized = InsertQdq(plan, target)(rw.gm).gm
    sites = _sites(rw, plan, target)
    if not sites:
        return
    items = items_within(rw.gm, data, megabytes // 2 if with_targets else megabytes)
    twins = {node.name: node for node in quantized.graph.nodes}
    # A pass changes its graph while it runs, and a run of a clone does not notice.
    original = rw.gm.clone()
    results = {node.name: node for node in original.graph.nodes}
    floats = Walk(original, items, [results[site.result.name] for site in sites.values()]) if with_targets else None
    integers = Walk(quantized, items, [])
    with torch.no_grad():
        for node in rw.nodes_of(rw.gm):
            if node in sites:
                site, twin = sites[node], twins[node.name]
                integers.advance(twin, past=False)
                goal = None
                if floats is not None:
                    floats.advance(results[site.result.name], past=True)
                    goal = floats.take(results[site.result.name])
                layer = _layer(rw, site, plan, target, integers, twin, goal)
                yield layer, Settle(rw, layer, integers, twin)


class Settle:
    """Sets the weight of one layer."""

    def __init__(self, rw: Rewriter, layer: PlannedLayer, walk: Walk, twin: torch.fx.Node) -> None:
        self._rw, self._layer, self._walk, self._twin = rw, layer, walk, twin

    def __call__(self, integers: torch.Tensor, *, by: str) -> None:
        """Set it to the integers, [groups, out, in], times its scales.

        A channel in which rounding to nearest cannot overflow 16-bit sums of two products, and these integers can, is
        rounded to nearest. Where that leaves no other channel, ``rw.skip`` says so.
        """
        layer = self._layer
        assert layer.site.weight is not None  # _sites takes in only sites that have one
        nearest = layer.nearest()
        risky = layer.can_overflow(integers) & ~layer.can_overflow(nearest)
        chosen = torch.where(risky[..., None], nearest, integers)
        same = int((chosen == nearest).all(-1).sum())
        channels = layer.scale.numel()
        if same == channels:
            self._rw.skip(layer.site.node, "rounding to nearest is as good in all channels")
        kept = f"; {int(risky.sum())} others could overflow" if bool(risky.any()) else ""
        on_grid = layer.layout.weight(chosen * layer.scale[..., None])
        self._rw.set_tensor(layer.site.weight, on_grid, why=f"{channels - same} of {channels} channels by {by}{kept}")
        self._walk.set_constant(arg(self._twin, str(layer.site.kernel.weight)), on_grid)


def _sites(rw: Rewriter, plan: QuantPlan, target: str) -> dict[torch.fx.Node, Site]:
    """Return the layers whose weight can be replaced; the others that the plan rounds are refused."""
    found: dict[torch.fx.Node, Site] = {}
    prefixes = path_of(rw.gm)
    for module in graph_modules(rw.gm):
        for site in Layout(module.graph, plan, TARGETS[target], prefixes[module.graph]).sites.values():
            if site.weight is None:
                continue
            readers = max(len(site.weight.users), rw.readers(str(site.weight.target), module.graph))
            if module is not rw.gm:
                rw.skip(site.node, "it runs inside a branch or loop; its weights are rounded to nearest")
            elif readers > 1:
                rw.skip(site.node, f"its weight has {readers} readers; it is rounded to nearest")
            else:
                found[site.node] = site
    return found


def _layer(
    rw: Rewriter,
    site: Site,
    plan: QuantPlan,
    target: str,
    walk: Walk,
    twin: torch.fx.Node,
    targets: list[torch.Tensor] | None,
) -> PlannedLayer:
    assert site.weight is not None  # _sites takes in only sites that have one
    tensor, spec = rw.tensor(site.weight).detach(), plan[site.weight.name]
    layout = LayerMatrix.of(site, tensor)
    weight = layout.matrix(tensor)
    scale = torch.tensor(spec.scale, dtype=torch.float32).expand(weight.shape[0] * weight.shape[1])
    bias = None if bias_of(site) is None else arg(twin, str(site.kernel.bias))
    source = next(name for name in site.kernel.operands if name != site.kernel.weight)
    return PlannedLayer(
        site,
        spec,
        layout,
        weight,
        scale.reshape(weight.shape[:2]),
        None if bias is None else walk.values(bias)[0].reshape(weight.shape[:2]),
        walk.values(arg(twin, source)),
        targets,
        _limits(site),
    )


def _limits(site: Site) -> tuple[float | None, float | None]:
    ends = list(site.limits())
    lows = [low for low, _ in ends if low is not None]
    highs = [high for _, high in ends if high is not None]
    return (max(lows) if lows else None), (min(highs) if highs else None)
