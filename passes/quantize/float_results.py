"""Convolutions of integers whose results may stay floats, since nobody reads them as integers.

    x -> quantize -> conv2d -> quantize -> prelu       8 bits with one scale for all channels, read by a float function
    x -> quantize -> conv2d -> prelu                   the same sums of integers, not rounded again

The second takes longer: it is a product of matrices then, for which the windows are copied
(``python -m tests.bench float_results``). Linear layers have such results anyway, at no cost.
"""

from __future__ import annotations

from fxopt.args import shape
from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.layout import Layout
from fxopt.passes.quantize.placement import Site, path_of
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.target import Target

__all__ = ["results_for_floats"]


def _channels(site: Site) -> int:
    return shape(site.weight)[1] if site.weight is not None else 0


def results_for_floats(gm: CapturedModule, plan: QuantPlan, target: Target) -> list[str]:
    """Return the entries of a plan that round the result of an integer kernel though floats alone read it.

    Args:
        gm: The graph that the plan is for.
        plan: A plan, with scales.
        target: The runtime.
    """
    found: list[str] = []
    for graph, prefix in path_of(gm).items():
        layout = Layout(graph, plan, target, prefix)
        for site in layout.sites.values():
            rounded = site.output == "preferred" and site.result in layout.specs
            if rounded and _channels(site) >= target.fewest_channels and not layout.is_read_as_integers(site):
                found.append(prefix + site.result.name)
    return found
