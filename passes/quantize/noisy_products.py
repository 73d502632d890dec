"""Products of two activations that 8 bits leave little of.

    probabilities = softmax(scores)        one head attends to one place: its largest is 1, and so is the scale's
    probabilities @ values                 another attends to two hundred alike: 0.005 each, one or two steps of 1 / 255

All heads share the scale of the tensor, so that whatever is spread over many places is rounded away. Weights have a
scale for each channel; such a product has not. It multiplies little beside the layers around it, as a rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from fxopt.dimensions import Sample
from fxopt.eager_control_flow import eager_call
from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.layout import Layout
from fxopt.passes.quantize.placement import Site
from fxopt.passes.quantize.simulate import Simulation, run_by_node, signal_to_noise
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.target import Target

__all__ = ["noisy_products"]

_LITTLE = 15.0  # dB that are left of a product; of a layer with 8-bit weights 30 to 40 are


def noisy_products(gm: CapturedModule, plan: QuantPlan, target: Target, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the products of which quantization leaves little: signal to noise in dB, by name of the call.

    Each is computed of rounded operands alone, all else in floats.

    Args:
        gm: The float graph.
        plan: A plan, with scales.
        target: The runtime.
        samples: What to measure on; all of them are held in memory at once.
    """
    sites = {site.node: site for site in Layout(gm.graph, plan, target, "").sites.values() if _is_product(site)}
    if not sites:
        return {}
    simulation = Simulation(gm, plan, target)
    waiting = Counter(operand for site in sites.values() for operand in site.operands)
    rounded: dict[torch.fx.Node, list[torch.Tensor]] = {}
    ratios: dict[str, float] = {}

    def watch(node: torch.fx.Node, values: list[torch.Tensor]) -> list[torch.Tensor]:
        if node in waiting:
            rounded[node] = [simulation.rounded(node, value) for value in values]
        if node in sites:
            operands = sites[node].operands
            items = zip(*(rounded[operand] for operand in operands), strict=True)
            products = [_called(node, dict(zip(operands, each, strict=True))) for each in items]
            ratios[node.name] = signal_to_noise([[value] for value in values], [[product] for product in products])
            waiting.subtract(operands)
            for operand in operands:
                if not waiting[operand]:
                    rounded.pop(operand, None)
        return values

    run_by_node(gm, samples, watch)
    return {name: ratio for name, ratio in ratios.items() if ratio < _LITTLE}


def _is_product(site: Site) -> bool:
    """Return whether a call multiplies two activations, and adds no third."""
    return site.kernel.heavy and site.weight is None and set(site.node.all_input_nodes) == set(site.operands)


def _called(node: torch.fx.Node, values: Mapping[torch.fx.Node, torch.Tensor]) -> torch.Tensor:
    """Return what a call yields for other values."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    product: torch.Tensor = eager_call(node.target)(*args, **kwargs)
    return product
