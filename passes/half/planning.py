"""Make a precision plan from rules, whole numbers and measured noise, and try it under emulation.

    rules      what has no form in half, what the user denies, constants that half does not hold
    data       values that leave the range, or whose smallest numbers must not become 0
    integers   what counts beyond the whole numbers that half holds
    noise      a minimum cut, with the smallest weight of noise that is predicted to be enough

The first two cost no more than a run of the model, the cut costs none. The plan is then run under emulation; where the
prediction, which is of first order, was too good, the allowed noise is lowered by as much, a few times at most.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.args import module_path, source_line
from fxopt.calibration_data import calibration_of, calibration_samples
from fxopt.graph_module import graph_modules
from fxopt.metric import Metric, measured
from fxopt.moves import base_name
from fxopt.name_patterns import names_fitting
from fxopt.numerics import measure
from fxopt.passes.half.apply import apply_plan
from fxopt.passes.half.cut import Assignments, in_decibels
from fxopt.passes.half.emulate import Accumulate, Emulated
from fxopt.passes.half.integers import Whole, exact_limit, whole_numbers
from fxopt.passes.half.noise import NOISE_SAMPLES, Measured, Settings, measure_noise
from fxopt.passes.half.operators import half_candidates, is_float, takes_numbers
from fxopt.passes.half.plan import PrecisionPlan, dtype_name
from fxopt.rewriter import Rewriter

__all__ = ["Found", "Goal", "Planner", "labels_of"]

_TRIES = 4
"""Plans that are run under emulation; with the run of the float32 graph, five evaluations."""

_MARGIN_DB = 1.5
"""By how much more than what is asked for a plan must reach under emulation: kernels add up in orders of their own."""

_SHARE = 0.05
"""Share of the allowed noise from which on it is noise that a node stays float32 for, not the casts around it."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a plan must reach.

    Attributes:
        min_sqnr_db: Signal to noise of every output on every sample, in dB.
        metric: Takes what is called as the model is, and returns how good it is; None to go by the signal alone.
        max_drop: By how much the metric may fall.
    """

    min_sqnr_db: float
    metric: Metric | None = None
    max_drop: float = 0.0


@dataclasses.dataclass(frozen=True)
class Found:
    """A plan and how good it is.

    Attributes:
        plan: The plan; nothing in it is half if no trial reached the goal.
        predicted_db: Signal to noise by the first-order model, in dB.
        emulated_db: That of the emulated run, in dB.
        notes: What was tried.
    """

    plan: PrecisionPlan
    predicted_db: float
    emulated_db: float
    notes: tuple[str, ...]


class Planner:
    """Plans one float32 graph that is frozen to evaluation.

    Args:
        rw: Of the graph, which is only read.
        dtype: The type of half precision.
        allow: Patterns of nodes that the rules must not keep in float32.
        deny: Patterns of nodes that stay float32.
        headroom: How many times larger than seen a value may get.
        accumulate: How the emulated device adds up.
        keep_io: Whether inputs and outputs stay float32.
    """

    def __init__(
        self,
        rw: Rewriter,
        dtype: torch.dtype,
        *,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        headroom: float = 2.0,
        accumulate: Accumulate = "float32",
        keep_io: bool = True,
    ) -> None:
        self.rw, self.dtype, self.keep_io = rw, dtype, keep_io
        self.headroom, self.accumulate = headroom, accumulate
        self.names = {node: rw.site_name(node) for module in graph_modules(rw.gm) for node in module.graph.nodes}
        self.nodes, self.reasons = half_candidates(rw, dtype)
        labels = labels_of(self.nodes)
        self.allowed = nodes_fitting(labels, allow)
        for name in nodes_fitting(labels, deny):
            self.reasons[name] = "it is denied"

    def run(self, goal: Goal) -> Found:
        """Return the plan that computes the most in half and reaches the goal.

        Raises:
            CalibrationError: the calibration inputs do not fit the graph.
        """
        found = self._measured()
        self.reasons |= {name: why for name, why in found.operators.items() if name not in self.allowed}
        self._mind_whole_numbers(found)
        found.values = {name: why for name, why in found.values.items() if name not in self.allowed}
        free = [name for name in self.nodes if name not in self.reasons]
        assignments = Assignments(self.rw.gm, self.names, free, found, keep_io=self.keep_io)
        self.reasons |= assignments.bound
        return self._search(assignments, found, goal)

    # ---- rules and data

    def _measured(self) -> Measured:
        settings = Settings(self.dtype, self.headroom, self.accumulate, self.names.__getitem__, frozenset(self.nodes))
        return measure_noise(self.rw.gm, calibration_samples(self.rw.gm, calibration_of(self.rw.gm)), settings)

    def _mind_whole_numbers(self, found: Measured) -> None:
        """Keep what counts beyond the whole numbers of half in float32, and what reads integers beyond them."""
        whole = whole_numbers(self.rw.gm)
        for node, known in whole.items():
            name = self.names[node]
            bound = known.bound
            if not known.counts and name in found.largest:
                bound = min(bound, found.largest[name] * self.headroom)
            if bound <= exact_limit(self.dtype) or self._is_exact(node):
                continue
            if is_float(node.meta.get("val")) and node.op != "get_attr":
                found.values.setdefault(name, self._counting(known, bound))
                continue
            for reader in node.users:
                if takes_numbers(reader.target) or (node.op == "get_attr" and is_float(node.meta.get("val"))):
                    self.reasons.setdefault(self.names[reader], f"it reads {name}: {self._counting(known, bound)}")

    def _is_exact(self, node: torch.fx.Node) -> bool:
        """Return whether a node reads a constant that half holds as it is."""
        if node.op != "get_attr":
            return False
        tensor = self.rw.tensor(node).detach().to(torch.float32)
        return torch.equal(tensor.to(self.dtype).to(torch.float32), tensor)

    def _counting(self, known: Whole, bound: float) -> str:
        size = f"up to {bound:.0f}" if bound < math.inf else "up to a size that is not known"
        limit = f"{dtype_name(self.dtype)} holds each of them to {exact_limit(self.dtype)} only"
        return f"it {'counts' if known.counts else 'holds whole numbers'} {size}, and {limit}"

    # ---- the cut and its trials

    def _search(self, assignments: Assignments, found: Measured, goal: Goal) -> Found:
        trials = _Trials(self, goal)
        allowed_db = goal.min_sqnr_db + _MARGIN_DB
        for attempt in range(1, _TRIES + 1):
            allowed = 10 ** (-allowed_db / 10)
            assignment = assignments.bounded(allowed)
            plan, predicted_db = self._plan(assignment.half, found, allowed), in_decibels(assignment.noise)
            reached, emulated_db = trials.run(plan, predicted_db)
            if reached or not plan.half:
                return Found(plan, predicted_db, emulated_db, tuple(trials.notes))
            missed_db = goal.min_sqnr_db + _MARGIN_DB - emulated_db
            step_db = 6.0 if missed_db <= 0 else min(missed_db + 0.5, 20.0)  # by the metric, or by the signal
            allowed_db = max(allowed_db, min(predicted_db, allowed_db + 20.0)) + attempt * step_db
        trials.notes.append("no plan reached the goal: all stays float32")
        return Found(self._plan(frozenset(), found, 0.0), math.inf, math.inf, tuple(trials.notes))

    def _plan(self, half: frozenset[str], found: Measured, allowed: float) -> PrecisionPlan:
        dtypes = {name: self.dtype if name in half else torch.float32 for name in self.nodes}
        return PrecisionPlan(dtypes, self._reasons(half, found, allowed), dtype=self.dtype)

    def _reasons(self, half: frozenset[str], found: Measured, allowed: float) -> dict[str, str]:
        """Return why each node stays float32, with the user's line; ``allowed`` is the noise that outputs may have."""
        nodes = {name: node for node, name in self.names.items()}
        reasons = {}
        for name in [*self.nodes, *(name for name in self.reasons if name not in self.nodes)]:
            if name in half:
                continue
            reason = self.reasons.get(name)
            noise = found.noise.get(name, 0.0)
            if reason is None and noise > _SHARE * allowed:
                reason = f"it would add noise of {-in_decibels(noise):.0f} dB to the outputs"
            reason = reason or "casts around it would cost more than half saves"
            line = source_line(nodes[name])
            reasons[name] = f"{reason} ({line})" if line else reason
        return reasons


class _Trials:
    """Runs plans under emulation, and compares with the run of the float32 graph."""

    def __init__(self, planner: Planner, goal: Goal) -> None:
        self.planner, self.goal = planner, goal
        self.notes: list[str] = []
        gm = planner.rw.gm
        more = [] if gm.calibration is None else calibration_samples(gm, gm.calibration)
        self._samples = [*gm.samples, *itertools.islice(more, NOISE_SAMPLES)]
        self._reference = self._outputs(Emulated(gm))
        self._floor = -math.inf
        if goal.metric is not None:
            whole = measured(goal.metric, gm, "the float32 graph", of="cast-half", model=Emulated(gm))
            self._floor = whole - goal.max_drop

    def run(self, plan: PrecisionPlan, predicted_db: float) -> tuple[bool, float]:
        """Return whether a plan reaches the goal, and its signal to noise in dB."""
        rw = Rewriter(self.planner.rw.gm.clone(), self.planner.rw.pass_name)
        apply_plan(rw, plan, keep_io=self.planner.keep_io)
        emulated = Emulated(rw.gm, self.planner.accumulate)
        found = signal_to_noise(self._reference, self._outputs(emulated))
        note = (
            f"{len(plan.half)} of {len(plan)} nodes in half: predicted {predicted_db:.1f} dB, emulated {found:.1f} dB"
        )
        reached = found >= self.goal.min_sqnr_db + _MARGIN_DB
        if self.goal.metric is not None and reached:
            value = measured(self.goal.metric, rw.gm, "the emulated graph", of="cast-half", model=emulated)
            note += f", metric {value:.5g}"
            reached = value >= self._floor
        self.notes.append(note)
        return reached, found

    def _outputs(self, graph: Emulated) -> list[tuple[Any, ...]]:
        dtypes = [spec.dtype for spec in graph.gm.inputs]
        found = []
        for sample in self._samples:
            leaves = [
                leaf.to(dtype) if isinstance(leaf, torch.Tensor) else leaf
                for leaf, dtype in zip(
                    self.planner.rw.gm.flatten_inputs(*sample.args, **sample.kwargs), dtypes, strict=True
                )
            ]
            found.append(graph.run(leaves))
        return found


def labels_of(nodes: Mapping[str, torch.fx.Node]) -> dict[str, list[str]]:
    """Return what patterns may name: nodes, operators such as ``aten.softmax``, and modules with all that is inside."""
    labels: dict[str, list[str]] = {}
    for name, node in nodes.items():
        parts = module_path(node).split(".")
        own = {name, *(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))} - {""}
        if isinstance(node.target, OpOverload):
            own.add(f"{node.target.namespace}.{base_name(node)}")
        for label in own:
            labels.setdefault(label, []).append(name)
    return labels


def nodes_fitting(labels: Mapping[str, Sequence[str]], patterns: Sequence[str]) -> set[str]:
    """Return the nodes that one of the patterns names, by whichever label.

    Raises:
        PassError: a pattern names none.
    """
    chosen = names_fitting(labels, patterns, of="node, operator or module")
    return {name for label in chosen for name in labels[label]}


def signal_to_noise(want: Sequence[Sequence[Any]], got: Sequence[Sequence[Any]]) -> float:
    """Return the smallest signal to noise of any float output on any sample, in dB; -inf where one becomes NaN."""
    pairs = [pair for one, other in zip(want, got, strict=True) for pair in zip(one, other, strict=True)]
    found = [
        measure(w, g.to(w.dtype)).sqnr_db for w, g in pairs if isinstance(w, torch.Tensor) and w.is_floating_point()
    ]
    return min(found, default=math.inf)
