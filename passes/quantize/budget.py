"""Choose the width of each layer so that the model stays within an accuracy budget at the least cost.

1. Sensitivity: each layer is quantized alone, in a simulation, and the noise at the outputs is measured.
2. Everything at its cheapest width: if the metric of that graph is within the budget, there is nothing to choose.
3. Else the widths of least noise for their cost are computed, for all costs. Those are kept, by another simulation,
   that are better than whatever is cheaper, and of these the cheapest within the budget is looked for. The noise only
   orders the choices; the metric of the true graph decides.
4. A metric of few examples, or of one output of several, need not fall with the noise. If no choice so far is within
   the budget, or none that saves three quarters of what integers everywhere would, the metric itself is asked about
   each layer quantized alone, or each of 16 parts if there are more layers. Its falls are taken to add up, and the
   cheapest choice that should be within the budget is tried first.

What is returned was measured: the graph that the metric saw is the graph that the pass makes. Every try is in the
ledger. At most eight calls of the metric, and at most 22 more for step 4, which a metric that is the noise itself
(``Budget.least``) does not need.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fxopt.args import module_path
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.metric import Metric, measured
from fxopt.passes.quantize.correct_bias import channel_means, corrections, shift_biases
from fxopt.passes.quantize.costs import FLOAT, Costs, Width, WidthTable, converted_numbers, macs_of, weight_elements
from fxopt.passes.quantize.insert_qdq import InsertQdq
from fxopt.passes.quantize.layout import Layout
from fxopt.passes.quantize.merged_rows import calibration_rows
from fxopt.passes.quantize.placement import Site, integer_sites, path_of, place
from fxopt.passes.quantize.resolve import WeightScales, resolve, resolve_weights
from fxopt.passes.quantize.simulate import Simulation, run_by_node, signal_to_noise
from fxopt.passes.quantize.spec import WIDTHS, QuantPlan
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.trials import Candidate
from fxopt.passes.quantize.width_tries import NAMED, WidthTries, decibels
from fxopt.rewriter import Rewriter

__all__ = ["DEFAULT_WIDTHS", "Budget", "WidthSearch"]

DEFAULT_WIDTHS: tuple[Width, ...] = (8, FLOAT)
"""What ONNX Runtime has kernels of its own for on a CPU."""

_ROWS = 16  # of calibration inputs that the sensitivities are measured on
_ROUNDING = 2.0**-22  # relative; a metric that is a mean in 32 bits must not miss the budget by its last bit


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the user asked for.

    Attributes:
        metric: How good a model is.
        max_drop: By how much the metric may fall below that of the float model.
        widths: What may be chosen for a layer: bits of 2 to 8 for its weight (activations then have 8), 16 for its
            activations, ``"float"``.
        costs: Measured times by name of layer and width; multiply-accumulates if None.
        least: What the metric must be, whatever it is for the float model, which is not asked about then; the metric
            has to rise where noise falls.
    """

    metric: Metric
    max_drop: float
    widths: tuple[Width, ...] = DEFAULT_WIDTHS
    costs: Costs | None = None
    least: float | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TypeError: the metric cannot be called.
            ValueError: the drop is negative or not finite, or a width is none that a layer can have.
        """
        if not callable(self.metric):
            raise TypeError(f"metric is a {type(self.metric).__name__}; wanted a function of a model")
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop is {self.max_drop!r}; wanted a finite number of at least 0")
        _check_widths(self.widths)


def _check_widths(widths: Sequence[Width]) -> None:
    for width in widths:
        if width != FLOAT and (isinstance(width, bool) or width not in WIDTHS):
            raise ValueError(f"a width is {width!r}; wanted one of {', '.join(map(str, WIDTHS))} or {FLOAT!r}")
    if len(set(widths)) < len(widths):
        raise ValueError(f"a width is named twice: {', '.join(map(str, widths))}")
    if all(width == FLOAT for width in widths):
        raise ValueError("widths names no integers: nothing would be quantized")


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A heavy kernel: its name in plans, a pattern that fits no other, and where it is."""

    name: str
    pattern: str
    prefix: str
    site: Site


class WidthSearch:
    """Chooses the widths of the layers of one graph.

    Attributes:
        ledger: What was measured and tried, with what came of it.
    """

    def __init__(
        self,
        start: Candidate,
        target: Target,
        budget: Budget,
        *,
        skip: Sequence[str] = (),
        method: Any = "minmax",
        no_saturation: bool = True,
    ) -> None:
        """Take the candidate in which every layer has 8 bits.

        Args:
            start: The float graph and the plan for 8 bits, with scales.
            target: The runtime.
            budget: What is asked for.
            skip: Patterns of what stays float in any case.
            method: How ranges of 16 bits are chosen.
            no_saturation: See :class:`Quantize`.
        """
        self.start, self.gm, self.target, self.budget = start, start.gm, target, budget
        self.skip, self.method, self.no_saturation = tuple(skip), method, no_saturation
        self._scales = WeightScales(no_saturation=no_saturation)
        self.ledger: list[str] = []
        self.layers = list(_layers(self.gm, start.plan, target))
        self._samples = calibration_rows(self.gm, _ROWS)
        self._means: Mapping[str, torch.Tensor] = {}
        self._wide: QuantPlan | None = None
        self._flat = len(list(graph_modules(self.gm))) == 1

    def run(self, gm: CapturedModule) -> Candidate:
        """Return the cheapest candidate that was found within the budget.

        Args:
            gm: The float graph that the metric is compared with.

        Raises:
            PassError: no candidate that quantizes anything is within the budget.
            TypeError, ValueError: the metric returns no number, or no finite one for the float graph.
        """
        if not self.layers:
            self.ledger.append("accuracy budget: no layer has an integer kernel")
            return self.start
        least, reference = self._least(gm)
        table = self._table()
        slack = _ROUNDING * max(abs(least), abs(reference or 0.0))
        tries = WidthTries(table, self._graph_of, self.budget.metric, least - slack, self.ledger)
        if not tries.measure(table.cheapest()):
            tries.find(self._quieter(table))
            if reference is not None and tries.dear:
                tries.find_by_metric(reference)
        if (found := tries.found) is None:
            raise PassError(self._failure(tries, reference, least))
        return found

    def _least(self, gm: CapturedModule) -> tuple[float, float | None]:
        """Return what the metric must be, and what it is for the float graph if that is of interest."""
        if self.budget.least is not None:
            self.ledger.append(f"8 bits everywhere are not enough: wanted {self.budget.least:.6g}")
            return self.budget.least, None
        original = gm.clone()
        original.recompile()
        reference = measured(self.budget.metric, original, "the float graph")
        if not math.isfinite(reference):
            raise ValueError(f"the metric returned {reference} for the float graph; wanted a finite number")
        least = reference - self.budget.max_drop
        self.ledger.append(f"float: metric {reference:.6g}; the budget allows {least:.6g}")
        return least, reference

    def plan_for(self, widths: Mapping[str, Width]) -> QuantPlan:
        """Return the plan, with scales, that gives each layer this width; quantizers are placed anew."""
        floats = [layer.pattern for layer in self.layers if widths[layer.name] == FLOAT]
        placed = place(self.gm, self.target, skip=(*self.skip, *floats))
        base = self.start.plan
        wide = self._wide_values(placed, widths)
        weights = self._weight_bits(widths)
        specs = {}
        for name, spec in placed.items():
            if name not in base:  # no calibration input reaches it
                continue
            source = base[name] if name not in wide else self._wide_plan()[name]
            kept = dataclasses.replace(source, group=spec.group)
            if (bits := weights.get(name, kept.bits)) != kept.bits:
                kept = dataclasses.replace(kept, bits=bits, scale=(), zero_point=())
            specs[name] = kept
        plan = QuantPlan(specs, base.notes)
        return resolve_weights(self.gm, plan, self.target, self._scales)

    def _graph_of(self, widths: Mapping[str, Width]) -> tuple[Candidate, CapturedModule]:
        return self.candidate(self.plan_for(widths))

    def candidate(self, plan: QuantPlan) -> tuple[Candidate, CapturedModule]:
        """Return a plan with its bias corrections, if the recipe has any, and the integer graph of both."""
        shifts: Mapping[str, torch.Tensor] = {}
        if self.start.shifts:
            shifts = corrections(Simulation(self.gm, plan, self.target), self._samples, self._float_means())
        rw = Rewriter(self.gm.clone(), "quantize")
        shift_biases(rw, Simulation(rw.gm, plan, self.target), shifts)
        InsertQdq(plan, self.target.name).run(rw)
        rw.finish()
        rw.gm.recompile()
        return Candidate(self.gm, plan, shifts), rw.gm

    def _weight_bits(self, widths: Mapping[str, Width]) -> dict[str, int]:
        """Return the bits of each weight: the most that a layer asks for that reads it."""
        found: dict[str, int] = {}
        for layer in self.layers:
            width = widths[layer.name]
            if layer.site.weight is not None and isinstance(width, int):
                name = layer.prefix + layer.site.weight.name
                found[name] = max(found.get(name, 0), min(width, 8))
        return found

    def _wide_values(self, placed: QuantPlan, widths: Mapping[str, Width]) -> set[str]:
        """Return the activations of more than 8 bits: around layers that ask for it, and all that share their scale."""
        chosen: set[str] = set()
        for layer in self.layers:
            if isinstance(width := widths[layer.name], int) and width > 8:
                values = [op for op in layer.site.operands if op is not layer.site.weight] + [layer.site.result]
                chosen |= {layer.prefix + value.name for value in values}
        groups = {placed[name].group for name in chosen if name in placed} - {""}
        return {name for name, spec in placed.items() if name in chosen or spec.group in groups}

    def _wide_plan(self) -> QuantPlan:
        if self._wide is None:
            open_plan = place(self.gm, self.target, bits=16, weight_bits=8, skip=self.skip)
            (self._wide,) = resolve(self.gm, open_plan, self.target, (self.method,), no_saturation=self.no_saturation)
        return self._wide

    # -- what is measured ------------------------------------------------------------------------------------------

    def _table(self) -> WidthTable:
        """Measure the noise of each layer alone, and count what it computes."""
        shapes: dict[torch.fx.Node, torch.Size] = {}

        def note_shapes(node: torch.fx.Node, values: list[torch.Tensor]) -> list[torch.Tensor]:
            shapes[node] = values[0].shape
            return values

        want = run_by_node(self.gm, self._samples, note_shapes)
        names = [layer.name for layer in self.layers]
        noise: dict[str, dict[Width, float]] = {name: {} for name in names}
        for name in names:
            for width in self.budget.widths:
                if width != FLOAT:
                    plan = self.plan_for({**dict.fromkeys(names, FLOAT), name: width})
                    noise[name][width] = 10 ** (-signal_to_noise(want, self._outputs(plan)) / 10)
        worst = sorted(names, key=lambda name: -max(noise[name].values()))[:NAMED]
        self.ledger.append(
            "noise of a layer alone: " + ", ".join(f"{name} {decibels(max(noise[name].values()))}" for name in worst)
        )
        return WidthTable.of(
            names, self.budget.widths,
            macs={layer.name: macs_of(layer.site, shapes) for layer in self.layers},
            elements={layer.name: weight_elements(layer.site) for layer in self.layers},
            noise=noise, target=self.target, costs=self.budget.costs,
            converted={layer.name: converted_numbers(layer.site, shapes) for layer in self.layers},
        )  # fmt: skip

    def _quieter(self, table: WidthTable) -> list[tuple[int, ...]]:
        """Return the best choices, cheapest first, of which each has less noise in a simulation than all before it.

        Noise of layers is not quite uncorrelated: what the model takes for better is not always better.
        """
        want = run_by_node(self.gm, self._samples)
        kept: list[tuple[int, ...]] = []
        best = -math.inf
        for choice in dict.fromkeys((table.cheapest(), *table.frontier())):
            if not table.quantizes(choice):
                continue
            widths = table.named(choice)
            ratio = signal_to_noise(want, self._outputs(self.plan_for(widths)))
            if ratio > best or not kept:
                kept.append(choice)
                best = ratio
        return kept[1:]

    def _outputs(self, plan: QuantPlan) -> list[list[torch.Tensor]]:
        """Return the float outputs under a plan for each sample."""
        if not self._flat:  # a simulation does not reach into branches
            return run_by_node(self.candidate(plan)[1], self._samples)
        simulation = Simulation(self.gm, plan, self.target)
        if not self.start.shifts:
            return simulation.run(self._samples)
        shifts = corrections(simulation, self._samples, self._float_means())
        return simulation.run_shifted(self._samples, shifts)

    def _float_means(self) -> Mapping[str, torch.Tensor]:
        if not self._means:
            self._means = channel_means(self.gm, self.target, self._samples)
        return self._means

    def _failure(self, tries: WidthTries, reference: float | None, least: float) -> str:
        widths = ", ".join(map(str, self.budget.widths))
        if reference is None:
            wanted, larger = f"at least {least:.6g} dB", "a smaller min_sqnr_db"
        else:
            below = f"which is {self.budget.max_drop:g} below {reference:.6g} of the float graph"
            wanted, larger = f"at least {least:.6g}, {below}", "a larger max_drop"
        return describe(
            "no choice of widths that quantizes anything is within the accuracy budget",
            got=f"metric {tries.best:.6g} at best, in {tries.count} tries of widths {widths}",
            wanted=wanted,
            try_=f"{larger}, recipe='accurate', more calibration inputs"
            + ("" if FLOAT in self.budget.widths else f", or {FLOAT!r} among the widths"),
        )


def _layers(gm: CapturedModule, plan: QuantPlan, target: Target) -> Iterator[_Layer]:
    """Yield the heavy kernels of a plan, each with a name that fits no other: modules and calls may be namesakes."""
    prefixes = path_of(gm)
    sites = [(prefixes[m.graph], site) for m in graph_modules(gm) for site in integer_sites(m.graph, target, {})]
    fitting = Counter(name for prefix, site in sites for name in set(_names(prefix, site)))
    for module in graph_modules(gm):
        prefix = prefixes[module.graph]
        for site in Layout(module.graph, plan, target, prefix).sites.values():
            if site.kernel.heavy:
                names = _names(prefix, site)
                pattern = next((name for name in names if name and fitting[name] == 1), names[0])
                yield _Layer(names[0], pattern, prefix, site)


def _names(prefix: str, site: Site) -> list[str]:
    """Return the names by which :func:`place` knows a call."""
    weight = [] if site.weight is None else [prefix + site.weight.name, str(site.weight.target)]
    return [prefix + site.node.name, *weight, module_path(site.node)]
