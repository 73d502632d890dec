"""Run a float graph as the integer graph of a plan would run, without making that graph.

Every value is quantized and dequantized where the plan says so, for the readers that would read integers. Biases stay
floats: their 32 bits lose nothing. So a plan can be tried, corrected and tried again for the cost of a run, or less:
what this machine computes in integers it does (:mod:`fxopt.passes.quantize.integer_products`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.quantize.graph_walk import Walk
from fxopt.passes.quantize.integer_products import IntegerInput, IntegerLayer, integer_layer
from fxopt.passes.quantize.layout import Layout, bias_of, input_of
from fxopt.passes.quantize.memory_layout import takes_any_layout
from fxopt.passes.quantize.placement import Site
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.weights import constant_of, parameters_of, weight_integers
from fxopt.quantized_ops import DEQUANTIZE, rounded
from fxopt.regions import results_of

__all__ = [
    "Shift", "Simulation", "Watch", "along_channels", "run_by_node", "signal_to_noise",
]  # fmt: skip

Watch = Callable[[torch.fx.Node, list[torch.Tensor]], list[torch.Tensor]]
Shift = Callable[[Site, Callable[[], list[torch.Tensor]]], torch.Tensor | None]
"""Gets a layer, and what computes its results; returns what to add to its bias, f32[channels], or None."""


@dataclasses.dataclass(frozen=True)
class _Requantized:
    """A layer of whose result nothing but integers is read.

    Attributes:
        result: The value that the integers stand for, behind the limits that saturation replaces.
        becomes: How it becomes integers.
        replaced: What need not be computed on the way from the layer to it, the result included.
    """

    result: torch.fx.Node
    becomes: IntegerInput
    replaced: frozenset[torch.fx.Node]


class Simulation:
    """The outer graph of a model under a plan.

    Attributes:
        layout: Which calls are integer kernels.
        readers: Who reads what a value or weight is rounded to, as floats.
        layers: The layers that are computed in integers here, and read those of their input.
        requantized: Those of them whose result becomes integers at once.
    """

    def __init__(self, gm: CapturedModule, plan: QuantPlan, target: Target) -> None:
        self.gm = gm
        self.layout = Layout(gm.graph, plan, target, "")
        self.layers: dict[torch.fx.Node, IntegerLayer] = {}
        self.readers: dict[torch.fx.Node, set[torch.fx.Node]] = {}
        self._weights: dict[torch.fx.Node, torch.Tensor] = {}
        self._any_layout = takes_any_layout(gm)
        for node, spec in self.layout.specs.items():
            if spec.role == "weight":
                self._add_weight(node, spec, [site for site in self.layout.sites.values() if site.weight is node])
        for node, spec in self.layout.specs.items():
            if spec.role != "weight":
                self.readers[node] = set(self.layout.readers(node)) - self.layers.keys()
        self.requantized = {
            node: found for node in self.layers if (found := self._requantized(self.layout.sites[node])) is not None
        }

    def _add_weight(self, node: torch.fx.Node, spec: QuantSpec, sites: Sequence[Site]) -> None:
        integers = weight_integers(constant_of(node), spec)
        for site in sites:
            bias = bias_of(site)
            held = None if bias is None else constant_of(bias)
            read = self.layout.specs[input_of(site)]
            layer = integer_layer(site, read, spec, integers, held, any_layout=self._any_layout)
            if layer is not None:
                self.layers[site.node] = layer
        self.readers[node] = {site.node for site in sites} - self.layers.keys()
        if self.readers[node]:
            self._weights[node] = DEQUANTIZE(integers, *parameters_of(spec), spec.axis or 0)

    def _requantized(self, site: Site) -> _Requantized | None:
        spec = self.layout.specs.get(site.result)
        becomes = None if spec is None else IntegerInput.of(spec)
        if spec is None or becomes is None or not becomes.saturates:
            return None
        if not self.layout.stands_for_limits(site, spec):
            return None
        if set(self.layout.readers(site.result)) != set(site.result.users):
            return None
        return _Requantized(site.result, becomes, frozenset({site.node, *site.limit_nodes()}))

    def run(self, samples: Sequence[Sample], shift: Shift | None = None) -> list[list[torch.Tensor]]:
        """Return the float outputs for each sample; all samples are held in memory at once.

        Args:
            samples: They run through a node together before any goes on to the next.
            shift: Tells what to add to the bias of a layer.
        """
        with isolated(self.gm):
            return _SimulatedRun(self, samples, shift).outputs()

    def run_shifted(self, samples: Sequence[Sample], shifts: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return the outputs with something added to the bias of layers, f32[channels] by node name."""
        return self.run(samples, lambda site, _: shifts.get(site.node.name))

    def rounded(self, node: torch.fx.Node, value: Any) -> Any:
        """Return what the readers of the integers of a value read as floats."""
        if node in self._weights:
            return self._weights[node]
        spec = self.layout.specs[node]
        if value.ndim == 3:  # torch takes twice as long for a linear layer of what is transposed
            value = value.contiguous()
        return rounded(value, spec.scale[0], spec.zero_point[0], *spec.limits)

    def inputs_of_layers(self, node: torch.fx.Node) -> IntegerInput | None:
        """Return how a value becomes the integers that layers read; None if none of them does."""
        inputs = (
            self.layers[user].product.inputs
            for user in node.users
            if user in self.layers and input_of(self.layout.sites[user]) is node
        )
        return next(inputs, None)


class _Run(Walk):
    """A walk through the whole graph."""

    def __init__(self, gm: CapturedModule, samples: Sequence[Sample]) -> None:
        super().__init__(gm, [gm.flatten_inputs(*sample.args, **dict(sample.kwargs)) for sample in samples], [])

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


class _WatchedRun(_Run):
    """A run that shows what its calls yield, and lets it be changed."""

    def __init__(self, gm: CapturedModule, samples: Sequence[Sample], watch: Watch) -> None:
        super().__init__(gm, samples)
        self._watch = watch

    def _run(self, node: torch.fx.Node) -> list[Any]:
        found = super()._run(node)
        return self._watch(node, found) if all(isinstance(value, torch.Tensor) for value in found) else found


class _SimulatedRun(_Run):
    """A run in which calls read another value than a node yields: what its integers stand for, or the integers."""

    def __init__(self, simulation: Simulation, samples: Sequence[Sample], shift: Shift | None) -> None:
        super().__init__(simulation.gm, samples)
        self._simulation, self._shift = simulation, shift
        self._replaced = {node: one.result for one in simulation.requantized.values() for node in one.replaced}
        self._rounded: dict[torch.fx.Node, list[Any]] = {}
        self._integers: dict[torch.fx.Node, list[torch.Tensor]] = {}

    def _run(self, node: torch.fx.Node) -> list[Any]:
        found = self._simulation.requantized.get(node)
        if found is not None:
            self._keep(found.result, found.becomes, self._layer(node, found.becomes))
        if node in self._replaced:
            return [None] * len(self._integers[self._replaced[node]])
        values = self._layer(node) if node in self._simulation.layers else self._floats(node)
        inputs = self._simulation.inputs_of_layers(node)
        if inputs is not None:
            self._integers[node] = [inputs.integers(value) for value in values]
        if self._simulation.readers.get(node):
            self._rounded[node] = [self._simulation.rounded(node, value) for value in values]
        return values

    def _floats(self, node: torch.fx.Node) -> list[Any]:
        values, site = super()._run(node), self._simulation.layout.sites.get(node)
        shift = None if site is None or self._shift is None else self._shift(site, lambda: values)
        if site is None or shift is None:
            return values
        return [value + along_channels(site, shift, value) for value in values]

    def _layer(self, node: torch.fx.Node, becomes: IntegerInput | None = None) -> list[torch.Tensor]:
        layer, site = self._simulation.layers[node], self._simulation.layout.sites[node]
        read = self._integers[input_of(site)]
        shift = None if self._shift is None else self._shift(site, lambda: [layer(integers) for integers in read])
        return [layer(integers, shift, becomes) for integers in read]

    def _keep(self, node: torch.fx.Node, becomes: IntegerInput, integers: list[torch.Tensor]) -> None:
        """Keep the integers of a value that is not computed itself."""
        self._integers[node] = integers
        if self._simulation.readers[node]:
            self._rounded[node] = [becomes.floats(each) for each in integers]

    def _read(self, reader: torch.fx.Node, node: torch.fx.Node, item: int) -> Any:
        if reader in self._simulation.readers.get(node, ()):
            found = self._rounded[node]
            return found[item if len(found) > 1 else 0]
        return super()._read(reader, node, item)

    def _drop(self, node: torch.fx.Node) -> None:
        super()._drop(node)
        if node not in self._values:
            self._rounded.pop(node, None)
            self._integers.pop(node, None)


def run_by_node(gm: CapturedModule, samples: Sequence[Sample], watch: Watch | None = None) -> list[list[torch.Tensor]]:
    """Run every sample through a node before any goes on to the next, and return the float outputs of each sample.

    Args:
        gm: A graph in evaluation.
        samples: All of them are held in memory at once.
        watch: Gets each node that yields tensors with the tensors of all samples, and returns them or others.
    """
    with isolated(gm):
        run = _Run(gm, samples) if watch is None else _WatchedRun(gm, samples, watch)
        return run.outputs()


def along_channels(site: Site, numbers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return one number a channel, shaped to lie along the channels of a layer's result."""
    shape = [1] * value.ndim
    shape[site.channel_axis] = -1
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
