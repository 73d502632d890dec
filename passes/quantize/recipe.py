"""Try ways to quantize a graph on calibration inputs, measure each, and keep what helps.

    fast        the range method that was asked for, no trial
    auto        range methods, bias correction, smoothing where layer norms feed the layers, floats for layers that
                integers make no faster, and for results of convolutions that floats alone read
    accurate    besides, equalization of channels and learned rounding of weights

A way is measured by the signal to quantization noise of the worst output, in a simulation of the integer graph. Where
there are inputs enough, what a way learns of some is measured on others. Every try stands in the ledger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch

from fxopt.calibration_data import calibration_of, calibration_samples
from fxopt.dimensions import Sample
from fxopt.errors import CalibrationError
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import Pass
from fxopt.passes.quantize.adaround import AdaRound
from fxopt.passes.quantize.calibrate import Progress
from fxopt.passes.quantize.correct_bias import channel_means, corrections
from fxopt.passes.quantize.equalize_channels import EqualizeChannels
from fxopt.passes.quantize.float_results import results_for_floats
from fxopt.passes.quantize.gptq import Gptq
from fxopt.passes.quantize.merged_rows import LeftOut, MergedRows, first_rows, merged_rows
from fxopt.passes.quantize.no_gain import layers_without_gain
from fxopt.passes.quantize.resolve import resolve
from fxopt.passes.quantize.simulate import Simulation, run_by_node, signal_to_noise
from fxopt.passes.quantize.smooth_quant import SmoothQuant
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.split_outliers import SplitOutliers
from fxopt.passes.quantize.target import Target

__all__ = ["METHODS_TRIED", "Candidate", "Recipe", "Search"]

Recipe = Literal["fast", "auto", "accurate"]
METHODS_TRIED = ("mse", "minmax")
"""The range methods that ``"auto"`` tries."""

_TRIED_ROWS = 32  # rows of calibration inputs to learn from, and again to measure on
_TRIED_NUMBERS = 2**22  # numbers in all of these, with which half of the rows do: large images have many of each kind
_ROWS_TOGETHER = 16  # that calibration runs at once
_GAIN = 0.1  # dB by which a way must be better to be worth its while
_PRECISE = 30.0  # dB from which on speed counts for more: the noise is a thousandth of the signal's power
_FLOAT_GAIN = 1.0  # dB by which it must be better to leave layers out of the integers


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


class Search:
    """Tries ways to quantize one graph.

    Attributes:
        ledger: What was tried, with what came of it.
    """

    def __init__(
        self,
        gm: CapturedModule,
        target: Target,
        *,
        no_saturation: bool,
        progress: Progress | None = None,
        checkpoint: str | None = None,
    ) -> None:
        self.gm, self.target, self.no_saturation, self.progress = gm, target, no_saturation, progress
        self.checkpoint = checkpoint
        self.ledger: list[str] = []
        self._calibrations = 0

    def fast(self, plan: QuantPlan, method: str) -> Candidate:
        """Return the one way that needs no trial."""
        (resolved,) = self._resolved(self.gm, plan, (method,))
        return Candidate(self.gm, resolved, {})

    def best(
        self, make_plan: Callable[[CapturedModule, Sequence[str]], QuantPlan], methods: Sequence[str], recipe: Recipe
    ) -> Candidate:
        """Return the best of the ways of a recipe.

        Args:
            make_plan: Makes the plan, without scales, of a graph, in which the named calls stay float.
            methods: Range methods to try.
            recipe: ``"auto"`` or ``"accurate"``.
        """
        given = self.gm.calibration
        together = MergedRows(self.gm, calibration_of(self.gm), _ROWS_TOGETHER)
        try:
            self.gm.calibration = together
            found = self._best(make_plan, methods, recipe)
        except CalibrationError:
            self.gm.calibration = given  # so that the error tells which of the user's items it is
            found = self._best(make_plan, methods, recipe)
        finally:
            self.gm.calibration = given
        found.gm.calibration = given
        return found

    def _best(
        self, make_plan: Callable[[CapturedModule, Sequence[str]], QuantPlan], methods: Sequence[str], recipe: Recipe
    ) -> Candidate:
        learn, measure = self._samples()
        want = run_by_node(self.gm, measure)
        best = self._tried(self.gm, make_plan(self.gm, ()), methods, learn, measure, want, "")
        slow = layers_without_gain(self.gm, best.plan, self.target)
        if slow:
            tried = self._tried(self.gm, make_plan(self.gm, tuple(slow)), methods, learn, measure, want, "floats, ")
            best = self._better(best, tried, f"floats for {', '.join(slow)}", _FLOAT_GAIN)
            slow = slow if best is tried else {}
        for item in self._transformations(recipe, methods[0]):
            changed = item(best.gm)
            if not changed.modified:
                continue
            changed.gm.recompile()
            plan = make_plan(changed.gm, tuple(slow))
            tried = self._tried(changed.gm, plan, methods, learn, measure, want, f"{item.spec()}, ")
            best = self._better(best, tried, item.spec())
        best = self._with_float_results(best, learn, measure, want)
        if recipe == "accurate":
            best = self._rounded(best, learn, measure, want)
        notes = {name: f"integers would make it no faster: {why}" for name, why in slow.items()}
        return dataclasses.replace(best, plan=QuantPlan(best.plan, best.plan.notes | notes))

    def _with_float_results(
        self, best: Candidate, learn: list[Sample], measure: list[Sample], want: list[list[torch.Tensor]]
    ) -> Candidate:
        names = results_for_floats(best.gm, best.plan, self.target)
        if not names:
            return best
        if best.sqnr_db >= _PRECISE:  # they take longer, and buy what nobody needs
            self.ledger.append(f"float results of {', '.join(names)}: not tried, {best.sqnr_db:.1f} dB are enough")
            return best
        means = channel_means(best.gm, self.target, learn)
        tried = self._corrected(best.gm, best.plan.without(*names), means, learn, measure, want, "float results")
        return self._better(best, tried, f"float results of {', '.join(names)}", _FLOAT_GAIN)

    def _transformations(self, recipe: Recipe, method: str) -> Iterator[Pass]:
        yield SplitOutliers()
        yield SmoothQuant(alpha=None, insert_mul=True, method=method)
        if recipe == "accurate":
            yield EqualizeChannels(by="weights")
            yield EqualizeChannels(by="activations")

    def _rounded(
        self, best: Candidate, learn: list[Sample], measure: list[Sample], want: list[list[torch.Tensor]]
    ) -> Candidate:
        start, given = best, best.gm.calibration
        apart = self._not_measured(start.gm)
        means = channel_means(start.gm, self.target, learn)  # of the float weights: that is what biases are to restore
        rounding = Gptq(plan=start.plan), AdaRound(plan=start.plan), AdaRound(plan=start.plan, asymmetric=False)
        for item in rounding:
            start.gm.calibration = apart
            try:
                changed = item(start.gm)
            finally:
                start.gm.calibration = given
            if changed.modified:
                changed.gm.recompile()
                name = "adaround, to its own float weights" if item == rounding[2] else item.name
                tried = self._corrected(changed.gm, start.plan, means, learn, measure, want, name)
                best = self._better(best, tried, name)
        return best

    def _better(self, best: Candidate, other: Candidate, name: str, gain: float = _GAIN) -> Candidate:
        kept = other.sqnr_db > best.sqnr_db + gain
        self.ledger.append(f"{name}: {best.sqnr_db:.1f} to {other.sqnr_db:.1f} dB, {'kept' if kept else 'not kept'}")
        return other if kept else best

    def _tried(
        self,
        gm: CapturedModule,
        plan: QuantPlan,
        methods: Sequence[str],
        learn: list[Sample],
        measure: list[Sample],
        want: list[list[torch.Tensor]],
        label: str,
    ) -> Candidate:
        means = channel_means(gm, self.target, learn)
        candidates = [
            self._corrected(gm, resolved, means, learn, measure, want, f"{label}{method}")
            for method, resolved in zip(methods, self._resolved(gm, plan, methods), strict=True)
        ]
        return max(candidates, key=lambda candidate: candidate.sqnr_db)

    def _corrected(
        self,
        gm: CapturedModule,
        plan: QuantPlan,
        means: Mapping[str, torch.Tensor],
        learn: list[Sample],
        measure: list[Sample],
        want: list[list[torch.Tensor]],
        label: str,
    ) -> Candidate:
        """Measure a plan without and with bias correction, and return the better of both."""
        simulation = Simulation(gm, plan, self.target)
        plain = signal_to_noise(want, simulation.run(measure))
        shifts = corrections(simulation, learn, means)
        corrected = signal_to_noise(want, simulation.run_shifted(measure, shifts))
        self.ledger.append(f"{label}: {plain:.1f} dB, with correct-bias {corrected:.1f} dB")
        if corrected > plain + _GAIN:
            return Candidate(gm, plan, shifts, corrected)
        return Candidate(gm, plan, {}, plain)

    def _resolved(self, gm: CapturedModule, plan: QuantPlan, methods: Sequence[str]) -> list[QuantPlan]:
        self._calibrations += 1  # each transformed graph has a file of its own
        return resolve(
            gm,
            plan,
            self.target,
            methods,
            progress=self.progress,
            checkpoint=None if self.checkpoint is None else f"{self.checkpoint}.{self._calibrations}",
            no_saturation=self.no_saturation,
        )

    def _held(self, gm: CapturedModule) -> list[Sample]:
        samples = calibration_samples(gm, calibration_of(gm))
        return list(first_rows(samples, 2 * _TRIED_ROWS, _TRIED_NUMBERS))

    def _samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return samples to learn from and samples to measure on; the same ones if there is only one."""
        held = self._held(self.gm)
        middle = (len(held) + 1) // 2
        learn, measure = held[:middle], held[middle:] or held
        return merged_rows(self.gm, learn), merged_rows(self.gm, measure)

    def _not_measured(self, gm: CapturedModule) -> LeftOut:
        """Return the calibration inputs that a way may learn from if it could learn what it is measured on by heart."""
        count = len(self._held(gm))
        return LeftOut(gm, calibration_of(gm), (count + 1) // 2, count)
