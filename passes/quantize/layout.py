"""Which calls of one graph become integer kernels under a plan, and who reads what in integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxopt.args import arg, shape
from fxopt.passes.quantize.placement import Site, integer_sites, move_source
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.weights import bias_integers, constant_of

__all__ = ["Layout"]

aten = torch.ops.aten

_COVERED = 1e-6  # by how much, relative, the largest integer may stand for more than the limit that it replaces


class Layout:
    """A plan read against one graph.

    Attributes:
        order: The nodes of the graph.
        specs: The specs of its values and weights.
        sites: The calls that become integer kernels.
        results: The same, by the node behind which their result is quantized.
        moves: The calls that move integers.
        refused: Calls that the plan means to be integers and that cannot be, with the reason.
    """

    def __init__(self, graph: torch.fx.Graph, plan: QuantPlan, target: Target, prefix: str) -> None:
        self.target = target
        self.refused: dict[torch.fx.Node, str] = {}
        self.order = list(graph.nodes)
        self.specs: dict[torch.fx.Node, QuantSpec] = {
            node: plan[prefix + node.name] for node in self.order if prefix + node.name in plan
        }
        self.sites = {site.node: site for site in integer_sites(graph, target, {}, prefix) if self._is_integer(site)}
        self.results = {site.result: site for site in self.sites.values()}
        self.moves = {
            node
            for node in self.order
            if node in self.specs and (source := move_source(node, target)) is not None and source in self.specs
        }

    def _is_integer(self, site: Site) -> bool:
        if any(operand not in self.specs for operand in site.operands):
            return False
        if site.output == "required" and site.result not in self.specs:
            self.refused[site.node] = "its result is not in the plan, and the kernel needs it in integers"
            return False
        bias = bias_of(site)
        if bias is not None and site.weight is not None and not self.keeps_float_bias(site):
            inputs = self.specs[input_of(site)]
            if bias_integers(constant_of(bias), inputs.scale[0], self.specs[site.weight]) is None:
                self.refused[site.node] = "its bias does not fit 32 bits beside such a small weight scale"
                return False
        return True

    def readers(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Return who reads the integers of a value: everyone if an integer kernel made them, else the kernels."""
        site = self.results.get(node)
        if (site is not None and site.output != "optional") or node in self.moves:
            return list(node.users)
        return [
            user
            for user in node.users
            if user in self.moves or (user in self.sites and node in self.sites[user].operands)
        ]

    def is_read_as_integers(self, site: Site) -> bool:
        """Return whether an integer kernel reads the result of a call, or what is moved of it."""
        return any(user in self.sites for user in self._readers_behind_moves(site.result))

    def _readers_behind_moves(self, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        for user in node.users:
            if user in self.moves:
                yield from self._readers_behind_moves(user)
            else:
                yield user

    def keeps_float_bias(self, site: Site) -> bool:
        """Return whether the bias of a layer is added to floats.

        ONNX Runtime computes a linear layer of more than two axes and a convolution, whose result stays float, by
        ``MatMulIntegerToFloat``, and that takes a float bias.
        """
        product = site.is_convolution or (site.node.target is aten.linear.default and len(shape(site.node)) > 2)
        return product and site.result not in self.specs and not self.target.signed_activations

    def stands_for_limits(self, site: Site, spec: QuantSpec) -> bool:
        """Return whether the integers of ``spec`` cannot leave the limits between a call and its result."""
        low, high = spec.range
        return all(
            (lowest is None or low >= lowest) and (highest is None or high <= highest * (1 + _COVERED))
            for lowest, highest in site.limits()
        )


def bias_of(site: Site) -> torch.fx.Node | None:
    """Return the node that reads the bias of a layer, or None if it has none."""
    held = arg(site.node, site.kernel.bias) if site.kernel.bias is not None else None
    return held if isinstance(held, torch.fx.Node) else None


def input_of(site: Site) -> torch.fx.Node:
    """Return the activation that a layer multiplies its weight by."""
    return next(operand for operand in site.operands if operand is not site.weight)


__all__ += ["bias_of", "input_of"]
