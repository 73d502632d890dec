"""Measure ways to quantize one graph on some of its calibration inputs.

What a way learns, ranges of values aside, it learns of the first half of these inputs, and it is measured on the other
half, by the signal to quantization noise of the worst output in a simulation of the integer graph. Every try stands in
a ledger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxopt.calibration_data import calibration_samples
from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.node_costs import NodeCosts
from fxopt.passes.quantize.calibrate import Progress, calibrate
from fxopt.passes.quantize.correct_bias import ChannelMeans, corrections
from fxopt.passes.quantize.memory_layout import channels_last, takes_any_layout
from fxopt.passes.quantize.merged_rows import (
    LeftOut,
    MergedRows,
    first_rows,
    halved_rows,
    regrouped_rows,
    row_count,
)
from fxopt.passes.quantize.noisy_products import noisy_products
from fxopt.passes.quantize.observations import DrawnRows, Observations
from fxopt.passes.quantize.resolve import WeightScales, open_activations, resolve, resolve_with, used_channels
from fxopt.passes.quantize.simulate import Simulation, signal_to_noise
from fxopt.passes.quantize.smooth_quant import values_to_smooth
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.split_outliers import inputs_of_wide_layers
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.window_scales import Moments, WindowMoments
from fxopt.regions import results_of

__all__ = ["GAIN", "Candidate", "Trial", "Trials"]

GAIN = 0.1
"""By how many dB a way must be better to be worth its while."""

_ROWS = 32  # of calibration inputs to learn from, and again to measure on
_ROWS_TOGETHER = 16  # that calibration runs at once
_BYTES = 2**30  # of all values of the graph for all of these; from there on half of the rows do
_BYTES_TOGETHER = 2**25  # of one value in one run: malloc gets larger ones anew each time, which takes longer than sums


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to quantize.

    Attributes:
        gm: The float graph, maybe transformed.
        plan: The plan for it, with scales.
        shifts: What to add to the bias of each layer, f32[channels] by node name.
        sqnr_db: Signal to noise of the worst output; NaN if it was not measured.
    """

    gm: CapturedModule
    plan: QuantPlan
    shifts: Mapping[str, torch.Tensor]
    sqnr_db: float = float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Candidate):
    """One way to quantize that was measured.

    Attributes:
        asked: The plan without scales.
        method: How ranges of activations were chosen.
        means: The mean of each channel of each layer in the float graph, f64[channels] by node name.
    """

    asked: QuantPlan
    method: str
    means: Mapping[str, torch.Tensor]


class Trials:
    """The inputs to try ways on, and the outputs of the float graph for them.

    Args:
        gm: The float graph.
        data: Its calibration inputs; see :func:`fxopt.calibration_data.calibration_samples`.
        target: The runtime.
        no_saturation: See :func:`fxopt.passes.quantize.resolve.resolve`.
        merge: Whether inputs may be run together, which takes less time, and one alone be halved.

    Attributes:
        items: The inputs.
        more: Whether there are others.
        ledger: What was tried, with what came of it.
    """

    def __init__(
        self, gm: CapturedModule, data: Any, target: Target, *, no_saturation: bool, merge: bool = True
    ) -> None:
        self.target = target
        self.ledger: list[str] = []
        self._gm, self._data, self._merge = gm, data, merge
        self._scales = WeightScales(no_saturation=no_saturation)
        (rows, self._together_at_most), samples = _rows_to_try(gm), calibration_samples(gm, data)
        held = list(first_rows(samples, rows))
        self._counted = len(held)
        self.more = next(samples, None) is not None
        if merge and len(held) == 1:
            (whole,) = held
            held = halved_rows(gm, whole, rows)
            self.more |= sum(map(row_count, held)) < row_count(whole)
        middle = (len(held) + 1) // 2
        learned, measured = (
            regrouped_rows(gm, part, self._together_at_most) if merge else part
            for part in (held[:middle], held[middle:])
        )
        self.items = [*learned, *measured]
        if takes_any_layout(gm):
            self.items = [channels_last(item) for item in self.items]
        self._learned = range(len(learned))
        self._measured = range(len(learned), len(self.items)) or self._learned  # the same if there is only one
        self._want: list[list[torch.Tensor]] = []
        self._seen: _Seen | None = None

    def tried(
        self,
        gm: CapturedModule,
        plan: QuantPlan,
        methods: Sequence[str],
        label: str = "",
        progress: Progress | None = None,
    ) -> Trial:
        """Calibrate a plan, and return the better of the range methods. The first graph must be the float graph."""
        seen = self._observed(gm, plan, progress)
        plans = resolve_with(gm, plan, self.target, seen.told.sketches, methods, self._scales, seen.moments)
        trials = [
            self.corrected(Trial(gm, found, {}, asked=plan, method=method, means=seen.means), f"{label}{method}")
            for method, found in zip(methods, plans, strict=True)
        ]
        return max(trials, key=lambda trial: trial.sqnr_db)

    def _observed(self, gm: CapturedModule, plan: QuantPlan, progress: Progress | None) -> _Seen:
        """Return what a plan is to know of the float graph, for which that is run if it was not for another plan."""
        names, only = open_activations(plan), used_channels(gm, plan, self.target)
        if self._seen is not None and self._seen.covers(gm, names, only):
            return self._seen
        wide, smooth = inputs_of_wide_layers(gm), values_to_smooth(gm)  # for what is to be tried without another run
        means, outputs, drawn = ChannelMeans(gm, self.target), _Outputs(gm), DrawnRows(smooth)
        moments = WindowMoments(gm, self.target)

        def watch(item: int, node: torch.fx.Node, value: Any) -> None:
            if item in self._measured and not self._want:
                outputs.add(item, node, value)
            if isinstance(value, torch.Tensor) and not value.numel():
                return  # as of experts that no token chose: there is nothing to learn of it
            drawn.add(node, value)
            if item in self._learned:
                means.add(node, value)
                moments.add(node, value)

        along = {name: -1 for name in names if name in wide | smooth and name not in only}
        sketches = calibrate(gm, names, self.items, only=only, channels=along, progress=progress, watch=watch)
        self._want = self._want or [outputs.of(item) for item in self._measured]
        self._seen = _Seen(gm, Observations(sketches, drawn.found()), only, means.found(), moments.found())
        return self._seen

    def not_measured(self) -> Any:
        """Return the calibration inputs without those that ways are measured on, which one could learn by heart."""
        if self._counted == 1:
            return self._together(LeftOut(self._gm, self._data, 0, 1, instead=self._samples(self._learned)))
        return self._together(LeftOut(self._gm, self._data, (self._counted + 1) // 2, self._counted))

    def everything(self) -> Any:
        """Return all calibration inputs."""
        return self._together(self._data) if self.more else self.items

    def _together(self, data: Any) -> Any:
        return MergedRows(self._gm, data, min(_ROWS_TOGETHER, self._together_at_most)) if self._merge else data

    def seen_of(self, gm: CapturedModule) -> Observations:
        """Return what is known of the values of a graph."""
        return self._seen.told if self._seen is not None and self._seen.gm is gm else Observations()

    def noisy_products(self, trial: Trial) -> dict[str, float]:
        """Return the products of activations of which a way leaves little; see :func:`noisy_products`."""
        return noisy_products(trial.gm, trial.plan, self.target, self._samples(self._learned))

    def corrected(self, trial: Trial, label: str) -> Trial:
        """Measure a way without and with bias correction, and return the better of both."""
        simulation = Simulation(trial.gm, trial.plan, self.target)
        learned, measured = self._samples(self._learned), self._samples(self._measured)
        plain = signal_to_noise(self._want, simulation.run(measured))
        shifts = corrections(simulation, learned, trial.means)
        corrected = signal_to_noise(self._want, simulation.run_shifted(measured, shifts))
        self.ledger.append(f"{label}: {plain:.1f} dB, with correct-bias {corrected:.1f} dB")
        if corrected > plain + GAIN:
            return dataclasses.replace(trial, shifts=shifts, sqnr_db=corrected)
        return dataclasses.replace(trial, shifts={}, sqnr_db=plain)

    def better(self, best: Trial, other: Trial, name: str, gain: float = GAIN) -> Trial:
        """Return the better way; the second only if it is so by ``gain``, in dB."""
        kept = other.sqnr_db > best.sqnr_db + gain
        self.ledger.append(f"{name}: {best.sqnr_db:.1f} to {other.sqnr_db:.1f} dB, {'kept' if kept else 'not kept'}")
        return other if kept else best

    def with_all(self, best: Trial, progress: Progress | None = None, checkpoint: str | None = None) -> Trial:
        """Return the way with scales of all calibration inputs, where these are more than it was tried on."""
        if not self.more:
            return best
        weights = {name: spec for name, spec in best.plan.items() if spec.role == "weight"}
        plan = best.asked.with_specs(weights)  # a rounding that was learned holds for its scale alone
        best.gm.calibration = self.everything()
        (found,) = resolve(
            best.gm,
            plan,
            self.target,
            (best.method,),
            progress=progress,
            checkpoint=checkpoint,
            no_saturation=self._scales.no_saturation,
        )
        simulation, shifts = Simulation(best.gm, found, self.target), best.shifts
        if best.shifts:
            shifts = corrections(simulation, self._samples(self._learned), best.means)
        sqnr = signal_to_noise(self._want, simulation.run_shifted(self._samples(self._measured), shifts))
        self.ledger.append(f"{best.method} of all calibration inputs: {sqnr:.1f} dB")
        return dataclasses.replace(best, plan=found, shifts=shifts, sqnr_db=sqnr)

    def _samples(self, part: range) -> list[Sample]:
        return [self.items[item] for item in part]


def _rows_to_try(gm: CapturedModule) -> tuple[int, int]:
    """Return how many rows to try on, half to learn from, and how many of them to run at once.

    Fewer of what is large, which has many numbers of each kind: a mean of a channel over 16 rows of an image or a text
    is close enough; one over 16 numbers is not.
    """
    costs = NodeCosts(gm)
    sizes = [costs.bytes(node) or 0 for node in gm.graph.nodes if node.op == "call_function"]
    rows = row_count(gm.samples[0]) if gm.samples else 1
    tried = _BYTES * rows // max(sum(sizes), 1)
    together = _BYTES_TOGETHER * rows // max([*sizes, 1])
    return max(_ROWS, min(2 * _ROWS, tried)), max(1, min(_ROWS, together))


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What one run of a float graph told, of which channels of its values, and the means and inputs of layers."""

    gm: CapturedModule
    told: Observations
    only: Mapping[str, torch.Tensor]
    means: Mapping[str, torch.Tensor]
    moments: Mapping[str, Moments]

    def covers(self, gm: CapturedModule, names: Sequence[str], only: Mapping[str, torch.Tensor]) -> bool:
        """Return whether these values of a graph are among them, and each with the channels that count."""
        return gm is self.gm and all(name in self.told.sketches and self._counts_as(name, only) for name in names)

    def _counts_as(self, name: str, only: Mapping[str, torch.Tensor]) -> bool:
        mine, other = self.only.get(name), only.get(name)
        return mine is other if mine is None or other is None else torch.equal(mine, other)


class _Outputs:
    """The float outputs of a graph, gathered value by value."""

    def __init__(self, gm: CapturedModule) -> None:
        self._leaves = [leaf.name for leaf in results_of(gm) if isinstance(leaf, torch.fx.Node)]
        self._names = frozenset(self._leaves)
        self._values: dict[tuple[int, str], Any] = {}

    def add(self, item: int, node: torch.fx.Node, value: Any) -> None:
        if node.name in self._names:
            self._values[item, node.name] = value

    def of(self, item: int) -> list[torch.Tensor]:
        """Return those of one item."""
        found = (self._values[item, name] for name in self._leaves)
        return [value for value in found if isinstance(value, torch.Tensor) and value.is_floating_point()]
