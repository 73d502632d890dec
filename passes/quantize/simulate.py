"""Run a float graph as the integer graph of a plan would run, without making that graph.

Every value is quantized and dequantized where the plan says so, for the readers that would read integers. Biases stay
floats: their 32 bits lose nothing. So a plan can be tried, corrected and tried again for the cost of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.quantize.graph_walk import Walk
from fxopt.passes.quantize.layout import Layout
from fxopt.passes.quantize.placement import Site
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.weights import constant_of, parameters_of, weight_integers
from fxopt.quantized_ops import DEQUANTIZE, rounded
from fxopt.regions import results_of

__all__ = [
    "Simulation", "Watch", "along_channels", "channel_axis", "run_by_node", "signal_to_noise",
]  # fmt: skip

Watch = Callable[[torch.fx.Node, list[torch.Tensor]], list[torch.Tensor]]


class Simulation:
    """The outer graph of a model under a plan.

    Attributes:
        layout: Which calls are integer kernels.
        readers: Who reads the integers of a value or weight.
    """

    def __init__(self, gm: CapturedModule, plan: QuantPlan, target: Target) -> None:
        self.gm = gm
        self.layout = Layout(gm.graph, plan, target, "")
        self._weights: dict[torch.fx.Node, torch.Tensor] = {}
        self.readers: dict[torch.fx.Node, set[torch.fx.Node]] = {}
        for node, spec in self.layout.specs.items():
            if spec.role == "weight":
                scale, zero_point = parameters_of(spec)
                integers = weight_integers(constant_of(node), spec)
                self._weights[node] = DEQUANTIZE(integers, scale, zero_point, spec.axis or 0)
                readers = {site.node for site in self.layout.sites.values() if site.weight is node}
            else:
                readers = set(self.layout.readers(node))
            self.readers[node] = readers

    def run(self, samples: Sequence[Sample], watch: Watch | None = None) -> list[list[torch.Tensor]]:
        """Return the float outputs for each sample; see :func:`run_by_node`."""
        return run_by_node(self.gm, samples, watch, self)

    def run_shifted(self, samples: Sequence[Sample], shifts: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return the outputs with something added to the bias of layers, f32[channels] by node name."""

        def shifted(node: torch.fx.Node, values: list[torch.Tensor]) -> list[torch.Tensor]:
            site = self.layout.sites.get(node)
            if site is None or node.name not in shifts:
                return values
            return [value + along_channels(site, shifts[node.name], value) for value in values]

        return self.run(samples, shifted)

    def quantized(self, node: torch.fx.Node, value: Any) -> Any:
        """Return what the readers of the integers of a value read."""
        if node in self._weights:
            return self._weights[node]
        spec = self.layout.specs[node]
        if value.ndim == 3:  # torch takes twice as long for a linear layer of what is transposed
            value = value.contiguous()
        return rounded(value, spec.scale[0], spec.zero_point[0], *spec.limits)


class _Run(Walk):
    """A walk through the whole graph in which calls may read another value than a node yields."""

    def __init__(
        self, gm: CapturedModule, samples: Sequence[Sample], watch: Watch | None, simulation: Simulation | None
    ) -> None:
        super().__init__(gm, [gm.flatten_inputs(*sample.args, **dict(sample.kwargs)) for sample in samples], [])
        self._watch, self._simulation = watch, simulation
        self._integers: dict[torch.fx.Node, list[Any]] = {}

    def outputs(self) -> list[list[torch.Tensor]]:
        """Return the float outputs of each sample."""
        if self._pending:
            self.advance(self._pending[0], past=True)
        output = self.gm.graph.output_node()
        nodes = [leaf for leaf in results_of(self.gm) if isinstance(leaf, torch.fx.Node)]
        found = [[self._read(output, node, item) for node in nodes] for item in range(len(self.items))]
        return [
            [value for value in one if isinstance(value, torch.Tensor) and value.is_floating_point()] for one in found
        ]

    def _run(self, node: torch.fx.Node) -> list[Any]:
        found = super()._run(node)
        if self._watch is not None and all(isinstance(value, torch.Tensor) for value in found):
            found = self._watch(node, found)
        if self._simulation is not None and self._simulation.readers.get(node):
            self._integers[node] = [self._simulation.quantized(node, value) for value in found]
        return found

    def _read(self, reader: torch.fx.Node, node: torch.fx.Node, item: int) -> Any:
        if self._simulation is not None and reader in self._simulation.readers.get(node, ()):
            found = self._integers[node]
            return found[item if len(found) > 1 else 0]
        return super()._read(reader, node, item)

    def _drop(self, node: torch.fx.Node) -> None:
        super()._drop(node)
        if node not in self._values:
            self._integers.pop(node, None)


def run_by_node(
    gm: CapturedModule, samples: Sequence[Sample], watch: Watch | None = None, simulation: Simulation | None = None
) -> list[list[torch.Tensor]]:
    """Run every sample through a node before any goes on to the next, and return the float outputs of each sample.

    Args:
        gm: A graph in evaluation.
        samples: All of them are held in memory at once.
        watch: Gets each node that yields tensors with the tensors of all samples, and returns them or others.
        simulation: Says which readers read integers, and what they read.
    """
    with isolated(gm):
        return _Run(gm, samples, watch, simulation).outputs()


def channel_axis(site: Site) -> int:
    """Return the axis of a layer's result along which its bias lies."""
    return 1 if site.is_convolution else -1


def along_channels(site: Site, numbers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return one number a channel, shaped to lie along the channels of a layer's result."""
    shape = [1] * value.ndim
    shape[channel_axis(site)] = -1
    return numbers.reshape(shape)


def _power(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def signal_to_noise(want: Sequence[Sequence[torch.Tensor]], got: Sequence[Sequence[torch.Tensor]]) -> float:
    """Return the smallest signal to noise ratio of any output, over all samples, in dB; inf if all are equal.

    Args:
        want: For each sample its outputs.
        got: The same of the other graph.
    """
    worst = math.inf
    for wanted, have in zip(zip(*want, strict=True), zip(*got, strict=True), strict=True):
        signal = sum(map(_power, wanted))
        noise = sum(_power(one - other) for one, other in zip(wanted, have, strict=True))
        if math.isnan(noise):
            return -math.inf
        if noise > 0:
            worst = min(worst, 10 * math.log10(signal / noise) if signal > 0 else -math.inf)
    return worst
