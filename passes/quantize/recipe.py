"""Try ways to quantize a graph on calibration inputs, and keep what helps.

    fast        the range method that was asked for, no trial
    auto        range methods, bias correction, floats for layers that integers make no faster, outliers of linear
                layers split off, smoothing where layer norms feed them; below 30 dB also floats for products of
                activations of which 8 bits leave little and for results of convolutions that floats alone read,
                composition of layers with nothing between them, and channels evened out
    accurate    besides, channels evened out by weights alone, and learned rounding of weights

How they are measured, and on what: :mod:`fxopt.passes.quantize.trials`. Scales come from all calibration inputs in the
end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from fxopt.calibration_data import calibration_of, calibration_samples
from fxopt.errors import CalibrationError
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import Pass
from fxopt.passes.quantize.adaround import AdaRound
from fxopt.passes.quantize.calibrate import Progress
from fxopt.passes.quantize.compose_layers import ComposeLayers
from fxopt.passes.quantize.equalize_channels import EqualizeChannels
from fxopt.passes.quantize.float_results import results_for_floats
from fxopt.passes.quantize.gptq import Gptq
from fxopt.passes.quantize.no_gain import layers_without_gain
from fxopt.passes.quantize.observations import ObservingPass
from fxopt.passes.quantize.resolve import resolve
from fxopt.passes.quantize.smooth_quant import SmoothQuant
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.split_outliers import SplitOutliers
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.trials import GAIN, Candidate, Trial, Trials

__all__ = ["METHODS_TRIED", "Recipe", "Search"]

Recipe = Literal["fast", "auto", "accurate"]
METHODS_TRIED = ("mse", "minmax")
"""The range methods that ``"auto"`` tries."""

_PRECISE = 30.0  # dB from which on speed counts for more: the noise is a thousandth of the signal's power
_FLOAT_GAIN = 1.0  # dB by which it must be better to leave layers out of the integers
_LONGER_GAIN = 0.5  # and for a graph that takes longer: of more calls, or of more products
_FOR_MORE = (ComposeLayers, EqualizeChannels)  # tried below that precision alone

MakePlan = Callable[[CapturedModule, Sequence[str]], QuantPlan]
"""Makes the plan, without scales, of a graph, in which the named calls stay float."""


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

    def fast(self, plan: QuantPlan, method: str) -> Candidate:
        """Return the one way that needs no trial."""
        (resolved,) = resolve(
            self.gm,
            plan,
            self.target,
            (method,),
            progress=self.progress,
            checkpoint=self.checkpoint,
            no_saturation=self.no_saturation,
        )
        return Candidate(self.gm, resolved, {})

    def best(self, make_plan: MakePlan, methods: Sequence[str], recipe: Recipe) -> Candidate:
        """Return the best of the ways of a recipe.

        Args:
            make_plan: Makes a plan.
            methods: Range methods to try.
            recipe: ``"auto"`` or ``"accurate"``.
        """
        given = self.gm.calibration
        data = calibration_of(self.gm)
        if isinstance(data, Iterator):  # what gives its items once is to be read more than once, here and later
            given = data = list(calibration_samples(self.gm, data))
        try:
            found = self._best(make_plan, methods, recipe, data, merge=True)
        except CalibrationError:  # again, so that the error tells which of the user's items it is
            found = self._best(make_plan, methods, recipe, data, merge=False)
        finally:
            self.gm.calibration = given
        found.gm.calibration = given
        return found

    def _best(
        self, make_plan: MakePlan, methods: Sequence[str], recipe: Recipe, data: Any, *, merge: bool
    ) -> Candidate:
        trials = Trials(self.gm, data, self.target, no_saturation=self.no_saturation, merge=merge)
        self.ledger = trials.ledger
        self.gm.calibration = trials.items
        progress = None if trials.more else self.progress
        best = trials.tried(self.gm, make_plan(self.gm, ()), methods, progress=progress)
        later = methods if recipe == "accurate" else (best.method,)
        best, floats = self._with_floats(best, trials, make_plan, later)
        for item in _transformations(best.method):
            best = self._with(item, best, trials, lambda gm: make_plan(gm, tuple(floats)), later)
        rounded = best.plan
        best = self._with_float_results(best, trials)
        unrounded = tuple(name for name in rounded if name not in best.plan)
        for item in _equalizations(recipe):
            best = self._with(item, best, trials, lambda gm: make_plan(gm, tuple(floats)).without(*unrounded), later)
        if recipe == "accurate":
            best = _rounded(best, trials)
        best = trials.with_all(best, self.progress, self.checkpoint)
        return dataclasses.replace(best, plan=QuantPlan(best.plan, best.plan.notes | floats))

    def _with_floats(
        self, best: Trial, trials: Trials, make_plan: MakePlan, methods: Sequence[str]
    ) -> tuple[Trial, dict[str, str]]:
        """Return the best way with some calls in floats or without, and these calls, with the reason of each."""
        slow = layers_without_gain(self.gm, best.plan, self.target)
        noisy = {} if best.sqnr_db >= _PRECISE else trials.noisy_products(best)
        reasons = {name: f"integers would make it no faster: {why}" for name, why in slow.items()}
        reasons |= {name: f"8 bits leave {ratio:.1f} dB of it" for name, ratio in noisy.items()}
        floats: dict[str, str] = {}
        for names in (slow, noisy):
            if names:
                more = floats | {name: reasons[name] for name in names}
                tried = trials.tried(self.gm, make_plan(self.gm, tuple(more)), methods, "floats, ")
                kept = trials.better(best, tried, f"floats for {', '.join(names)}", _FLOAT_GAIN)
                best, floats = kept, more if kept is tried else floats
        return best, floats

    def _with(
        self,
        item: Pass,
        best: Trial,
        trials: Trials,
        plan_of: Callable[[CapturedModule], QuantPlan],
        methods: Sequence[str],
    ) -> Trial:
        """Return the better of a way and of the same with the graph transformed."""
        name = item.spec()
        if isinstance(item, _FOR_MORE) and self._is_enough(best, name):
            return best
        if isinstance(item, ObservingPass):
            item = dataclasses.replace(item, seen=trials.seen_of(best.gm))
        if isinstance(item, EqualizeChannels):  # what no calibration input reaches is not for a few of them to tell
            best.gm.calibration = trials.everything()
        changed = item(best.gm)
        best.gm.calibration = changed.gm.calibration = trials.items
        if not changed.modified:
            return best
        changed.gm.recompile()
        tried = trials.tried(changed.gm, plan_of(changed.gm), methods, f"{name}, ")
        takes_longer = isinstance(item, ComposeLayers) or len(changed.gm.graph.nodes) > len(best.gm.graph.nodes)
        return trials.better(best, tried, name, _LONGER_GAIN if takes_longer else GAIN)

    def _is_enough(self, best: Trial, name: str) -> bool:
        """Return whether more precision is what nobody needs."""
        if best.sqnr_db < _PRECISE:
            return False
        self.ledger.append(f"{name}: not tried, {best.sqnr_db:.1f} dB are enough")
        return True

    def _with_float_results(self, best: Trial, trials: Trials) -> Trial:
        names = results_for_floats(best.gm, best.plan, self.target)
        if not names:
            return best
        if self._is_enough(best, f"float results of {', '.join(names)}"):
            return best
        fewer = dataclasses.replace(best, plan=best.plan.without(*names), asked=best.asked.without(*names))
        tried = trials.corrected(fewer, "float results")
        return trials.better(best, tried, f"float results of {', '.join(names)}", _FLOAT_GAIN)


def _transformations(method: str) -> Sequence[Pass]:
    return ComposeLayers(), SplitOutliers(), SmoothQuant(alpha=None, insert_mul=True, method=method)


def _equalizations(recipe: Recipe) -> Sequence[Pass]:
    by_activations = EqualizeChannels(by="activations", limits="inert")
    return (by_activations, EqualizeChannels(by="weights")) if recipe == "accurate" else (by_activations,)


def _rounded(best: Trial, trials: Trials) -> Trial:
    """Learn of some inputs how to round the weights; biases are to restore the means of the float weights."""
    start, held = best, best.gm.calibration
    rounding = Gptq(plan=start.plan), AdaRound(plan=start.plan), AdaRound(plan=start.plan, asymmetric=False)
    for item in rounding:
        start.gm.calibration = trials.not_measured()
        try:
            changed = item(start.gm)
        finally:
            start.gm.calibration = held
        if changed.modified:
            changed.gm.recompile()
            name = "adaround, to its own float weights" if item == rounding[2] else item.name
            tried = trials.corrected(dataclasses.replace(start, gm=changed.gm), name)
            best = trials.better(best, tried, name)
    return best
