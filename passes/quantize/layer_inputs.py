"""What a layer reads and yields during calibration, as matrices in which rounding its weights is a linear problem.

A convolution is, at each output position, the product of a patch of its input with a matrix of weights. So it and a
linear layer alike become rows ``[groups, rows, in]`` times weights ``[groups, out, in]``; only a grouped convolution
has more groups than one.

A layer's weights are settled from what all calibration inputs make of the settled layers before it, and a walk through
the quantized graph goes on with them: one run of the graph, and one of the float graph if its values are the targets,
settles all layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from fxopt.args import arg
from fxopt.errors import PassError, describe
from fxopt.graph_module import graph_modules
from fxopt.passes.quantize.graph_walk import Walk, items_within
from fxopt.passes.quantize.insert_qdq import InsertQdq, refuse_quantized
from fxopt.passes.quantize.layout import Layout, bias_of
from fxopt.passes.quantize.placement import Site, path_of
from fxopt.passes.quantize.saturation import can_overflow
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.target import TARGETS
from fxopt.rewriter import Rewriter

__all__ = ["LayerMatrix", "PlannedLayer", "Settle", "planned_layers"]

_CHUNK = 64 * 2**20  # bytes of the patches that are laid out at a time


@dataclasses.dataclass(frozen=True)
class LayerMatrix:
    """A layer as a product of matrices.

    Attributes:
        node: The call: a convolution, or a product with a constant matrix.
        groups: How many products there are side by side.
        spatial: Number of axes that a convolution slides along; 0 for a product.
        transposed: Whether the weight lies as ``[in, out]``.
        weight_shape: Shape of the weight.
    """

    node: torch.fx.Node
    groups: int
    spatial: int
    transposed: bool
    weight_shape: tuple[int, ...]

    @classmethod
    def of(cls, site: Site, weight: torch.Tensor) -> LayerMatrix:
        """Return the matrices of a site whose kernel has a constant weight."""
        if not site.is_convolution:
            return cls(site.node, 1, 0, site.kernel.weight_axis == 1, tuple(weight.shape))
        return cls(site.node, site.groups, weight.ndim - 2, False, tuple(weight.shape))

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as ``[groups, out, in]``."""
        rows = weight.t() if self.transposed else weight.flatten(1)
        return rows.reshape(self.groups, rows.shape[0] // self.groups, rows.shape[1])

    def weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`matrix` makes ``matrix`` of."""
        rows = matrix.flatten(0, 1)
        return rows.t().contiguous() if self.transposed else rows.reshape(self.weight_shape)

    def rows(self, x: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows of an input, ``[groups, rows, in]``, all or those with the numbers ``chosen``."""
        if not self.spatial:
            flat = x.reshape(-1, x.shape[-1])
            return (flat if chosen is None else flat[chosen])[None]
        patches = self._patches(x)
        positions = patches.shape[: 1 + self.spatial]
        if chosen is None:
            rows = patches.reshape(positions.numel(), self.groups, -1)
        else:
            rows = patches[torch.unravel_index(chosen, positions)].reshape(len(chosen), self.groups, -1)
        return rows.transpose(0, 1)

    def row_chunks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield all rows of an input, so many at a time that they take little memory."""
        if not self.spatial:
            yield self.rows(x)
            return
        batch = x if x.ndim == 2 + self.spatial else x[None]
        patches = self._patches(batch)
        step = max(1, _CHUNK // max(1, patches[:1].numel() * patches.element_size()))
        for part in batch.split(step):
            yield self.rows(part)

    def some_rows(self, x: torch.Tensor, each: int) -> torch.Tensor:
        """Return the rows of an input at ``each`` or a few more places of each of its images, evenly spread."""
        if not self.spatial:
            lines = x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1])
            return lines[:, :: max(1, lines.shape[1] // each)].reshape(1, -1, x.shape[-1])
        patches = self._patches(x)
        places = patches.shape[1 : 1 + self.spatial].numel()
        every = max(1, math.floor((places / each) ** (1 / self.spatial)))
        some = patches[(slice(None), *[slice(None, None, every)] * self.spatial)]
        return some.reshape(some.shape[: 1 + self.spatial].numel(), self.groups, -1).transpose(0, 1)

    def count(self, x: torch.Tensor) -> int:
        """Return the number of rows of an input."""
        return x.shape[:-1].numel() if not self.spatial else self._patches(x).shape[: 1 + self.spatial].numel()

    def results(self, y: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return an output of the layer as ``[groups, rows, out]``, the rows with the numbers ``chosen``."""
        if self.spatial:
            y = (y if y.ndim == 2 + self.spatial else y[None]).movedim(1, -1)
        rows = y.reshape(-1, y.shape[-1])[chosen]
        return rows.reshape(len(chosen), self.groups, -1).transpose(0, 1)

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view ``[batch, *positions, channels, *kernel]`` of what each output position reads."""
        kernel = self.weight_shape[2:]
        x = x if x.ndim == 2 + self.spatial else x[None]
        stride, dilation = self._sizes("stride"), self._sizes("dilation")
        padding = arg(self.node, "padding")
        if padding == "same":
            total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            before = [(size // 2, size - size // 2) for size in total]
        else:
            before = [(0, 0)] * self.spatial if padding == "valid" else [(p, p) for p in self._sizes("padding")]
        x = functional.pad(x, list(itertools.chain(*reversed(before))))
        for axis in range(self.spatial):
            extent = dilation[axis] * (kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, extent, stride[axis])[..., :: dilation[axis]]
        return x.movedim(1, 1 + self.spatial)

    def _sizes(self, name: str) -> list[int]:
        given = arg(self.node, name)
        sizes = [given] if isinstance(given, int) else list(given)
        return sizes * self.spatial if len(sizes) == 1 else sizes


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
