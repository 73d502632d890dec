"""Layers that integers make no faster, and that cost accuracy nevertheless.

    x -> quantize -> conv2d -> dequantize -> silu        of which nobody around it has or wants integers

Such a layer pays for the conversion on both sides. Where it multiplies little, floats are as fast: a first convolution
of three channels in front of a function without an integer kernel, or the last layers of a detector, of a few outputs
each. From which numbers on that is so, is a fact of the target. Convolutions in the middle are left alone: integers lie
with the channels last there, and to turn them around costs more.
"""

from __future__ import annotations

import math

import torch

from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.costs import macs_of
from fxopt.passes.quantize.layout import Layout, input_of
from fxopt.passes.quantize.placement import Site, move_source, path_of
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.target import Target

__all__ = ["layers_without_gain"]

_NEGLIGIBLE = 0.01  # of all multiply-accumulates, that small layers may be together


def layers_without_gain(gm: CapturedModule, plan: QuantPlan, target: Target) -> dict[str, str]:
    """Return the layers of a plan that would be as fast in floats: why, by name of the call.

    Args:
        gm: The graph that the plan is for.
        plan: A plan, with scales.
        target: The runtime.
    """
    layouts = [(prefix, Layout(graph, plan, target, prefix)) for graph, prefix in path_of(gm).items()]
    heavy = [(prefix, layout, site) for prefix, layout in layouts for site in layout.sites.values() if site.is_layer]
    behind = {layout: _behind_integers(layout) for _, layout in layouts}
    work = {site.node: macs_of(site, {}) for _, _, site in heavy}
    left = _NEGLIGIBLE * sum(work.values())
    found: dict[str, str] = {}
    for prefix, layout, site in sorted(heavy, key=lambda item: work[item[2].node]):
        if not _is_alone(layout, site):
            continue
        products = math.prod(site.weight.meta["val"].shape[1:]) if site.weight is not None else 0
        first = site.is_convolution and input_of(site) not in behind[layout]
        if first and products < target.fewest_products:
            found[prefix + site.node.name] = f"{products} products for each number that is converted"
        elif work[site.node] < target.fewest_macs and work[site.node] <= left:
            left -= work[site.node]
            found[prefix + site.node.name] = f"{work[site.node]:,.0f} multiply-accumulates in all"
    return found


def _is_alone(layout: Layout, site: Site) -> bool:
    """Return whether nobody around a layer computes in integers."""
    source = input_of(site)
    while source in layout.moves and (moved := move_source(source, layout.target)) is not None:
        source = moved
    computed = source in layout.results and source in layout.specs
    return not computed and not layout.is_read_as_integers(site)


def _behind_integers(layout: Layout) -> set[torch.fx.Node]:
    """Return what is computed of the result of any integer kernel."""
    found: set[torch.fx.Node] = set()
    for node in layout.order:
        if node in layout.sites or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found
