"""Run a float graph as the integer graph of a plan would run, without making that graph.

Every value is quantized and dequantized where the plan says so, for the readers that would read integers. Biases stay
floats: their 32 bits lose nothing. So a plan can be tried, corrected and tried again for the cost of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.quantize.layout import Layout
from fxopt.passes.quantize.placement import Site
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.weights import constant_of, parameters_of, weight_integers
from fxopt.quantized_ops import DEQUANTIZE

__all__ = [
    "Simulation", "Watch", "along_channels", "channel_axis", "float_outputs", "run_by_node", "signal_to_noise",
]  # fmt: skip

Watch = Callable[[torch.fx.Node, list[torch.Tensor]], list[torch.Tensor]]


class Simulation:
    """The outer graph of a model under a plan.

    Attributes:
        layout: Which calls are integer kernels.
    """

    def __init__(self, gm: CapturedModule, plan: QuantPlan, target: Target) -> None:
        self.gm = gm
        self.layout = Layout(gm.graph, plan, target, "")
        self._weights: dict[torch.fx.Node, torch.Tensor] = {}
        self._readers: dict[torch.fx.Node, set[torch.fx.Node]] = {}
        for node, spec in self.layout.specs.items():
            if spec.role == "weight":
                scale, zero_point = parameters_of(spec)
                integers = weight_integers(constant_of(node), spec)
                self._weights[node] = DEQUANTIZE(integers, scale, zero_point, spec.axis or 0)
                readers = {site.node for site in self.layout.sites.values() if site.weight is node}
            else:
                readers = set(self.layout.readers(node))
            self._readers[node] = readers

    def run(self, samples: Sequence[Sample], watch: Watch | None = None) -> list[list[torch.Tensor]]:
        """Return the float outputs for each sample; see :func:`run_by_node`."""
        return run_by_node(self.gm, samples, watch, self._quantized)

    def run_shifted(self, samples: Sequence[Sample], shifts: Mapping[str, torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return the outputs with something added to the bias of layers, f32[channels] by node name."""

        def shifted(node: torch.fx.Node, values: list[torch.Tensor]) -> list[torch.Tensor]:
            site = self.layout.sites.get(node)
            if site is None or node.name not in shifts:
                return values
            return [value + along_channels(site, shifts[node.name], value) for value in values]

        return self.run(samples, shifted)

    def _quantized(self, node: torch.fx.Node, value: Any) -> tuple[set[torch.fx.Node], Any] | None:
        """Return who reads the integers of a value, and what they read."""
        readers = self._readers.get(node)
        if not readers:
            return None
        if node in self._weights:
            return readers, self._weights[node]
        spec = self.layout.specs[node]
        # One kernel in place of six; it multiplies by 1 / scale, and so may round a tie the other way.
        return readers, torch.fake_quantize_per_tensor_affine(value, spec.scale[0], spec.zero_point[0], *spec.limits)


Quantized = Callable[[torch.fx.Node, Any], "tuple[set[torch.fx.Node], Any] | None"]


class _Run(torch.fx.Interpreter):
    """An interpreter whose calls may read another value than the node yields."""

    def __init__(self, gm: CapturedModule, sample: Sample) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.env: dict[torch.fx.Node, Any] = {}
        self.integers: dict[torch.fx.Node, tuple[set[torch.fx.Node], Any]] = {}
        self.args_iter = iter(gm.flatten_inputs(*sample.args, **dict(sample.kwargs)))

    def fetch_args_kwargs_from_env(self, n: torch.fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def read(source: torch.fx.Node) -> Any:
            held = self.integers.get(source)
            return held[1] if held is not None and n in held[0] else self.env[source]

        found: tuple[tuple[Any, ...], dict[str, Any]] = torch.fx.map_arg((n.args, n.kwargs), read)
        return found


def run_by_node(
    gm: CapturedModule, samples: Sequence[Sample], watch: Watch | None = None, quantized: Quantized | None = None
) -> list[list[torch.Tensor]]:
    """Run every sample through a node before any goes on to the next, and return the float outputs of each sample.

    Args:
        gm: A graph in evaluation.
        samples: All of them are held in memory at once.
        watch: Gets each node that yields tensors with the tensors of all samples, and returns them or others.
        quantized: Says for a node which readers read something else, and what.
    """
    with isolated(gm):
        runs = [_Run(gm, sample) for sample in samples]
        for node, dead in _last_uses(gm.graph):
            if node.op == "output":
                return [[leaf for leaf in _outputs(run, node) if _is_float(leaf)] for run in runs]
            values = [run.run_node(node) for run in runs]
            if watch is not None and values and all(isinstance(value, torch.Tensor) for value in values):
                values = watch(node, values)
            for run, value in zip(runs, values, strict=True):
                run.env[node] = value
                if quantized is not None and (found := quantized(node, value)) is not None:
                    run.integers[node] = found
                for other in dead:
                    run.env.pop(other, None)
                    run.integers.pop(other, None)
    return []


def _outputs(run: _Run, node: torch.fx.Node) -> list[Any]:
    args, _ = run.fetch_args_kwargs_from_env(node)
    return list(args[0]) if isinstance(args[0], tuple | list) else [args[0]]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _last_uses(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, list[torch.fx.Node]]]:
    """Yield each node with the nodes that nobody reads after it."""
    last = {source: node for node in graph.nodes for source in node.all_input_nodes}
    dead: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for source, node in last.items():
        dead.setdefault(node, []).append(source)
    for node in graph.nodes:
        yield node, dead.get(node, [])


def channel_axis(site: Site) -> int:
    """Return the axis of a layer's result along which its bias lies."""
    return 1 if site.is_convolution else -1


def along_channels(site: Site, numbers: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return one number a channel, shaped to lie along the channels of a layer's result."""
    shape = [1] * value.ndim
    shape[channel_axis(site)] = -1
    return numbers.reshape(shape)


def float_outputs(
    gm: CapturedModule, samples: Sequence[Sample], watch: Watch | None = None
) -> list[list[torch.Tensor]]:
    """Return the float outputs of the graph as it is; see :func:`run_by_node`."""
    return run_by_node(gm, samples, watch)


def signal_to_noise(want: Sequence[Sequence[torch.Tensor]], got: Sequence[Sequence[torch.Tensor]]) -> float:
    """Return the smallest signal to noise ratio of any output, over all samples, in dB; inf if all are equal.

    Args:
        want: For each sample its outputs.
        got: The same of the other graph.
    """
    worst = math.inf
    for wanted, have in zip(zip(*want, strict=True), zip(*got, strict=True), strict=True):
        signal = sum(float(one.double().square().sum()) for one in wanted)
        noise = sum(
            float((one.double() - other.double()).square().sum()) for one, other in zip(wanted, have, strict=True)
        )
        if math.isnan(noise):
            return -math.inf
        if noise > 0:
            worst = min(worst, 10 * math.log10(signal / noise) if signal > 0 else -math.inf)
    return worst
