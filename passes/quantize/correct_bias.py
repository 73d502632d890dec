"""Add to each bias what quantization takes from the mean of its channel.

    before:  y = conv2d(x, w, b)         of which the integer graph computes another mean, channel by channel
    after:   y = conv2d(x, w, b + d)     d = E[y of the float graph] - E[y of the integer graph]

Rounding a weight of few elements, such as that of a depthwise convolution, shifts the mean of what it computes; layers
behind it see that shift as signal. The layers are taken in their order, each with all corrections before it in place.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.2 and
appendix D (empirical bias correction).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from fxopt.args import arg
from fxopt.calibration_data import calibration_of, calibration_samples
from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.placement import Site, integer_sites
from fxopt.passes.quantize.planned_pass import PlannedPass
from fxopt.passes.quantize.simulate import Simulation, run_by_node
from fxopt.passes.quantize.target import TARGETS, Target
from fxopt.rewriter import Rewriter

__all__ = ["ChannelMeans", "CorrectBias", "channel_means", "corrections", "shift_biases"]


@dataclasses.dataclass(frozen=True)
class CorrectBias(PlannedPass):
    """Correct the biases of the layers that a plan quantizes; runs before the plan is applied.

    Attributes:
        plan: The plan, with scales.
        target: Name of the runtime that the plan was made for.
        batches: How many calibration batches to average over, all of which are held in memory at once.
        min_sqnr_db: Signal to noise that every output keeps beside the uncorrected graph, in dB.
    """

    name: ClassVar[str] = "correct-bias"
    batches: int = 8
    min_sqnr_db: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.batches < 1:
            raise ValueError(f"batches is {self.batches}; wanted 1 or more")

    def run(self, rw: Rewriter) -> None:
        """Run on the outer graph: the sides of a branch see other inputs each, and are left as they are."""
        samples = list(itertools.islice(calibration_samples(rw.gm, calibration_of(rw.gm)), self.batches))
        simulation = Simulation(rw.gm, self.plan, TARGETS[self.target])
        shifts = corrections(simulation, samples, channel_means(rw.gm, TARGETS[self.target], samples))
        shift_biases(rw, simulation, shifts)


class ChannelMeans:
    """The mean of each channel of each layer of a graph, gathered value by value."""

    def __init__(self, gm: CapturedModule, target: Target) -> None:
        self._layers = {site.node.name: site for site in integer_sites(gm.graph, target, {}) if site.is_layer}
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, node: torch.fx.Node, value: Any) -> None:
        """Take in what a node of the graph, or of a copy, yields for one input."""
        if node.name in self._layers:
            total, count = _channel_sums(self._layers[node.name], value)
            self._sums[node.name] = self._sums.get(node.name, 0) + total
            self._counts[node.name] = self._counts.get(node.name, 0) + count

    def found(self) -> dict[str, torch.Tensor]:
        """Return the means of what was taken in, f64[channels] by node name."""
        return {name: total / max(self._counts[name], 1) for name, total in self._sums.items()}


def channel_means(gm: CapturedModule, target: Target, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return the mean of each channel of each layer in the float graph, f64[channels] by node name."""
    means = ChannelMeans(gm, target)

    def note(node: torch.fx.Node, values: list[torch.Tensor]) -> list[torch.Tensor]:
        for value in values:
            means.add(node, value)
        return values

    run_by_node(gm, samples, note)
    return means.found()


def corrections(
    simulation: Simulation, samples: Sequence[Sample], means: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what each bias lacks, f32[channels] by node name: a layer is corrected before the next one is run."""
    shifts: dict[str, torch.Tensor] = {}

    def correct(site: Site, results: Callable[[], list[torch.Tensor]]) -> torch.Tensor | None:
        if not site.is_layer:
            return None
        shifts[site.node.name] = (means[site.node.name] - _channel_mean(site, results())).float()
        return shifts[site.node.name]

    simulation.run(samples, correct)
    return shifts


def shift_biases(rw: Rewriter, simulation: Simulation, shifts: Mapping[str, torch.Tensor]) -> None:
    """Add the shifts to the biases of the layers."""
    for site in simulation.layout.sites.values():
        if site.node.name in shifts:
            _shift_bias(rw, site, shifts[site.node.name])


def _channel_mean(site: Site, values: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean of each channel over everything else and all batches, f64[channels]."""
    found = [_channel_sums(site, value) for value in values]
    return torch.stack([total for total, _ in found]).sum(0) / max(sum(count for _, count in found), 1)


def _channel_sums(site: Site, value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of each channel, f64[channels], and of how many numbers it is.

    Sums of one value are of 32 bits, which are close enough, and take a twentieth of the time.
    """
    axis = site.channel_axis % value.ndim
    others = [other for other in range(value.ndim) if other != axis]
    total = value.sum(others) if others else value
    return total.double(), value.numel() // max(value.shape[axis], 1)


def _shift_bias(rw: Rewriter, site: Site, shift: torch.Tensor) -> None:
    if not bool(shift.isfinite().all()) or not bool(shift.any()) or site.kernel.bias is None:
        return
    held: Any = arg(site.node, site.kernel.bias)
    why = f"the mean of its channels moved by up to {float(shift.abs().max()):.3g}"
    if held is None:
        rw.set_arg(site.node, site.kernel.bias, rw.constant(f"{site.node.name}_bias", shift, near=site.node), why=why)
    elif rw.readers(str(held.target), held.graph) > 1 or len(held.users) > 1:
        rw.skip(site.node, f"its bias {held.target} is read by others too")
    else:
        rw.set_tensor(held, rw.tensor(held).detach() + shift, why=why)
