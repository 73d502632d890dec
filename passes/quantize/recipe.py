"""Try ways to quantize a graph on calibration inputs, measure each, and keep what helps.

    fast        the range method that was asked for, no trial
    auto        range methods, bias correction, and smoothing where layer norms feed the layers
    accurate    besides, equalization of channels and learned rounding of weights

A way is measured by the signal to quantization noise of the worst output, in a simulation of the integer graph. Where
there are inputs enough, what a way learns of some is measured on others. Every try stands in the ledger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch

from fxopt.calibration_data import calibration_samples
from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import Pass
from fxopt.passes.quantize.adaround import AdaRound
from fxopt.passes.quantize.calibrate import Progress
from fxopt.passes.quantize.calibration_source import calibration_of
from fxopt.passes.quantize.correct_bias import channel_means, corrections
from fxopt.passes.quantize.equalize_channels import EqualizeChannels
from fxopt.passes.quantize.gptq import Gptq
from fxopt.passes.quantize.resolve import resolve
from fxopt.passes.quantize.simulate import Simulation, run_by_node, signal_to_noise
from fxopt.passes.quantize.smooth_quant import SmoothQuant
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.split_outliers import SplitOutliers
from fxopt.passes.quantize.target import Target

__all__ = ["METHODS_TRIED", "Candidate", "Recipe", "Search", "merged_rows"]

Recipe = Literal["fast", "auto", "accurate"]
METHODS_TRIED = ("mse", "minmax")
"""The range methods that ``"auto"`` tries."""

_TRIED_ROWS = 32  # rows of calibration inputs to learn from, and again to measure on
_GAIN = 0.1  # dB by which a way must be better to be worth its while


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
        self, make_plan: Callable[[CapturedModule], QuantPlan], methods: Sequence[str], recipe: Recipe
    ) -> Candidate:
        """Return the best of the ways of a recipe.

        Args:
            make_plan: Makes the plan, with or without scales, of a graph.
            methods: Range methods to try.
            recipe: ``"auto"`` or ``"accurate"``.
        """
        learn, measure = self._samples()
        want = run_by_node(self.gm, measure)
        best = self._tried(self.gm, make_plan(self.gm), methods, learn, measure, want, "")
        for item in self._transformations(recipe):
            changed = item(best.gm)
            if not changed.modified:
                continue
            changed.gm.recompile()
            label = f"{item.spec()}, "
            best = self._better(
                best, self._tried(changed.gm, make_plan(changed.gm), methods, learn, measure, want, label), item.spec()
            )
        if recipe == "accurate":
            best = self._rounded(best, learn, measure, want)
        return best

    def _transformations(self, recipe: Recipe) -> Iterator[Pass]:
        yield SplitOutliers()
        yield SmoothQuant(alpha=None, insert_mul=True)
        if recipe == "accurate":
            yield EqualizeChannels(by="weights")
            yield EqualizeChannels(by="activations")

    def _rounded(
        self, best: Candidate, learn: list[Sample], measure: list[Sample], want: list[list[torch.Tensor]]
    ) -> Candidate:
        start = best
        for item in (Gptq(plan=start.plan), AdaRound(plan=start.plan)):
            changed = item(start.gm)
            if changed.modified:
                changed.gm.recompile()
                means = channel_means(changed.gm, self.target, learn)
                tried = self._corrected(changed.gm, start.plan, means, learn, measure, want, f"{item.name}, ")
                best = self._better(best, tried, item.name)
        return best

    def _better(self, best: Candidate, other: Candidate, name: str) -> Candidate:
        kept = other.sqnr_db > best.sqnr_db + _GAIN
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

    def _samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return samples to learn from and samples to measure on; the same ones if there is only one."""
        held = list(_first_rows(calibration_samples(self.gm, calibration_of(self.gm)), 2 * _TRIED_ROWS))
        middle = (len(held) + 1) // 2
        learn, measure = held[:middle], held[middle:] or held
        return merged_rows(self.gm, learn), merged_rows(self.gm, measure)


def _first_rows(samples: Iterator[Sample], rows: int) -> Iterator[Sample]:
    """Yield samples until they have so many rows together, counted along the first axis of their first tensor."""
    for sample in samples:
        yield sample
        tensors = (leaf for leaf in sample.leaves() if isinstance(leaf, torch.Tensor) and leaf.ndim)
        rows -= next((int(tensor.shape[0]) for tensor in tensors), 1)
        if rows <= 0:
            return


def merged_rows(gm: CapturedModule, samples: list[Sample]) -> list[Sample]:
    """Return the samples as one, its rows all of theirs, where the graph takes any number of rows; else themselves."""
    counts = {spec.shape[0] if spec.shape else None for spec in gm.inputs if spec.is_tensor}
    rows = next(iter(counts)) if len(counts) == 1 else None
    if not isinstance(rows, str) or rows not in gm.dims:
        return samples
    leaves = [gm.flatten_inputs(*sample.args, **dict(sample.kwargs)) for sample in samples]
    tensors = [place for place, spec in enumerate(gm.inputs) if spec.is_tensor]
    alike = len({tuple(one[place].shape[1:] for place in tensors) for one in leaves}) == 1
    total = sum(int(one[tensors[0]].shape[0]) for one in leaves)
    if not alike or not gm.dims[rows].allows(total):
        return samples
    together = list(leaves[0])
    for place in tensors:
        together[place] = torch.cat([one[place] for one in leaves])
    return [samples[0].with_leaves(together)]
