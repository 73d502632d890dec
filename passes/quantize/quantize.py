"""Quantize a graph: prepare it, place the quantizers, calibrate them, put them in.

    Quantize()                         8 bits, for ONNX Runtime on a CPU
    plan = Quantize().make_plan(gm)    the plan alone, to print and edit; Quantize(plan=plan) applies it

The graph that results is for evaluation. Its weights are integers; to train it further, use ``prepare-qat``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch

from fxopt.changes import Skip
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import LossyPass, run_passes
from fxopt.passes.quantize.budget import DEFAULT_WIDTHS, Budget, WidthSearch
from fxopt.passes.quantize.calibrate import Progress
from fxopt.passes.quantize.correct_bias import shift_biases
from fxopt.passes.quantize.embedding_tables import has_tables, store_tables, store_tables_within
from fxopt.passes.quantize.insert_qdq import InsertQdq, refuse_quantized
from fxopt.passes.quantize.placement import place
from fxopt.passes.quantize.precision import Precision
from fxopt.passes.quantize.preparation import PREPARATION, preparation_for
from fxopt.passes.quantize.ranges import RangeMethod
from fxopt.passes.quantize.recipe import METHODS_TRIED, Recipe, Search
from fxopt.passes.quantize.simulate import Simulation, run_by_node, signal_to_noise
from fxopt.passes.quantize.spec import WIDTHS, QuantPlan
from fxopt.passes.quantize.target import TARGETS
from fxopt.passes.quantize.trials import Candidate
from fxopt.rewriter import Rewriter

__all__ = ["PREPARATION", "Quantize"]


@dataclasses.dataclass(frozen=True)
class Quantize(LossyPass):
    """Compute in integers what the target can compute in integers.

    Attributes:
        bits: Width of activations: 8 or 16 in files for ORT, any of 2 to 8 and 16 in the graph.
        weight_bits: Width of weights; that of activations, but at most 8, if None.
        recipe: ``"fast"`` tries nothing; ``"auto"`` measures range methods, bias correction and smoothing on 64 rows at
            most, and keeps what helps; ``"accurate"`` tries equalization and learned rounding too, which takes minutes.
        method: How a range is chosen: ``"mse"``, ``"minmax"``, ``"percentile:99.99"``, ``"entropy"``,
            ``"moving-average"``; ``"auto"`` is the better of the first two, or the first if the recipe tries nothing.
        target: The runtime: ``"ort-cpu"`` or ``"onnx"``.
        plan: What to quantize; scales that it leaves open are calibrated. Made by the pass if None.
        skip: Patterns of what stays float: names of calls, parameters or modules, ``"features.0.*"``.
        embeddings: Whether tables that rows are looked up in are stored in 8 bits; see :mod:`embedding_tables`.
        min_sqnr_db: Signal to quantization noise that every output must keep on the example inputs, in dB. Where a
            recipe that tries falls short of it, layers stay float, those first of which that costs least.
        no_saturation: Choose weight scales with which the 16-bit sums of CPUs without VNNI cannot overflow.
        metric: Takes what is called as the model is, and returns how good it is, higher for better. With it, layers get
            the cheapest widths with which it falls by at most ``max_drop``; see :mod:`fxopt.passes.quantize.budget`.
        max_drop: By how much the metric may fall below that of the float model.
        widths: What a layer may get: bits of 2 to 8 for its weight (activations then have 8), 16 for its activations,
            ``"float"``; 8 and ``"float"`` if empty.
        costs: Measured times by name of a layer in the prepared graph and by width; multiply-accumulates if None.
        checkpoint: A file that the run over all calibration inputs keeps what it saw in, to go on there after a crash;
            removed in the end.

    Calibration inputs are read one by one, a few are read again; with a recipe that tries, those of an iterator, which
    gives them once, are all kept in memory.

    Where processes of ``torch.distributed`` run, each calls the pass with its share of the calibration inputs, and all
    get the scales of all shares, bit for bit. Trials would be of one share each, so that the recipe is ``"fast"`` then.
    """

    name: ClassVar[str] = "quantize"
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    ends: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    remedy: ClassVar[str] = (
        "metric=..., max_drop=... leaves float what costs accuracy, skip=('NAME*',) what you name; "
        "recipe='accurate' tries more; min_sqnr_db=... if less will do"
    )
    bits: int = 8
    weight_bits: int | None = None
    method: str = "auto"
    recipe: Recipe = "auto"
    target: str = "ort-cpu"
    plan: QuantPlan | None = dataclasses.field(default=None, repr=False)
    skip: tuple[str, ...] = ()
    embeddings: bool = True
    min_sqnr_db: float = 10.0
    no_saturation: bool = True
    checkpoint: str | None = None
    metric: Callable[[Callable[..., Any]], float] | None = dataclasses.field(default=None, repr=False)
    max_drop: float = 0.0
    widths: tuple[int | str, ...] = ()
    costs: Mapping[str, Mapping[int | str, float]] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option has a value that does not exist.
        """
        for name, bits in (("bits", self.bits), ("weight_bits", self.weight_bits)):
            if bits is not None and bits not in WIDTHS:
                raise ValueError(f"{name} is {bits!r}; wanted one of {', '.join(map(str, WIDTHS))}")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; wanted one of {', '.join(TARGETS)}")
        if self.recipe not in get_args(Recipe):
            raise ValueError(f"recipe is {self.recipe!r}; wanted one of {', '.join(get_args(Recipe))}")
        if self.method != "auto":
            RangeMethod.of(self.method)
        if self.metric is None and (self.max_drop or self.widths or self.costs is not None):
            raise ValueError("max_drop, widths and costs are for a metric, and none is given")
        if self.metric is not None and (self.plan is not None or not self._in_8_bits):
            raise ValueError("a metric chooses the widths: leave out plan, bits and weight_bits, and use widths")
        self._budget()

    def run(self, rw: Rewriter) -> None:
        """Prepare, plan and insert.

        Raises:
            PassError: the graph is quantized already or in train mode, or the plan does not fit it.
            CalibrationError: the calibration data do not fit.
        """
        refuse_quantized(rw, self.name)
        self._prepare(rw)
        floats = self._with_tables(rw)
        rw.gm.recompile()
        found = self._search(rw.gm, floats, None, rw.notes)
        if found.gm is not rw.gm:
            rw.adopt(found.gm, why="; ".join(note for note in rw.notes if note.endswith(", kept")))
        rw.skips += [Skip(node, reason, None, self.name) for node, reason in found.plan.notes.items()]
        shift_biases(rw, Simulation(rw.gm, found.plan, TARGETS[self.target]), found.shifts)
        InsertQdq(found.plan, self.target, self.min_sqnr_db).run(rw)

    def make_plan(
        self, gm: CapturedModule, calibration: Iterable[Any] | None = None, *, progress: Progress | None = None
    ) -> QuantPlan:
        """Return the plan that the pass would apply, scales included.

        Its names are those of the graph after ``preparation_for(target)``, which the pass runs first in any case.

        Args:
            gm: A captured graph in eval mode; it is left alone.
            calibration: Inputs; those that the graph carries, or its examples, if not given.
            progress: See :func:`resolve`.
        """
        rw = Rewriter(gm.clone(), self.name)
        refuse_quantized(rw, self.name)
        self._prepare(rw)
        floats = self._with_tables(rw)
        rw.finish()
        if calibration is not None:
            rw.gm.calibration = calibration
        fixed = dataclasses.replace(self, recipe="fast")  # other recipes change weights, which a plan does not hold
        return fixed._search(rw.gm, floats, progress, []).plan

    def _prepare(self, rw: Rewriter) -> None:
        if rw.gm.training:
            raise PassError(
                describe(
                    "the graph is in train mode, and integers are for evaluation",
                    try_="graph.eval(); to train with quantizers in place, use prepare-qat",
                )
            )
        run_passes(rw, preparation_for(TARGETS[self.target]))

    def _with_tables(self, rw: Rewriter) -> CapturedModule:
        """Store the tables of embeddings as integers, and return the float graph that others are compared with."""
        target = TARGETS[self.target]
        if not self.embeddings or not target.block_tables or not has_tables(rw.gm):
            return rw.gm
        floats = rw.gm.clone()
        floats.recompile()
        if self.metric is not None:
            store_tables_within(rw, floats, target, self.skip, self.metric, self.max_drop)
        else:
            store_tables(rw, target, self.skip)
        return floats

    @property
    def _in_8_bits(self) -> bool:
        return self.bits == 8 and self.weight_bits in (None, 8)

    def _budget(self) -> Budget | None:
        if self.metric is None:
            return None
        return Budget(self.metric, self.max_drop, self.widths or DEFAULT_WIDTHS, self.costs)

    def _enough(self, found: Candidate, gm: CapturedModule, floats: CapturedModule) -> Budget | None:
        """Return the budget by which layers stay float if what was found is measured to be too noisy."""
        if math.isnan(found.sqnr_db) or not self._in_8_bits:
            return None  # nothing was measured, or other widths are asked for
        left = found.sqnr_db
        if floats.samples and left >= self.min_sqnr_db:  # a quiet one may lie far below what all have together
            simulation = Simulation(found.gm, found.plan, TARGETS[self.target])
            examples = simulation.run_shifted(floats.samples, found.shifts)
            left = min(left, signal_to_noise(run_by_node(floats, floats.samples), examples))
        return Budget(Precision(floats, gm), 0.0, least=self.min_sqnr_db) if left < self.min_sqnr_db else None

    def _search(
        self, gm: CapturedModule, floats: CapturedModule, progress: Progress | None, notes: list[str]
    ) -> Candidate:
        found = self._uniform(gm, progress, notes)
        budget = self._budget() or self._enough(found, gm, floats)
        if budget is None:
            return found
        if _several_processes():
            raise PassError(
                describe(
                    "several processes quantize under an accuracy budget, and each would choose by its own metric",
                    try_="make_plan in one process, and Quantize(plan=plan) in all",
                )
            )
        widths = WidthSearch(
            found,
            TARGETS[self.target],
            budget,
            skip=self.skip,
            method="minmax" if self.method == "auto" else self.method,
            no_saturation=self.no_saturation,
        )
        try:
            return widths.run(floats)
        finally:
            notes += widths.ledger

    def _uniform(self, gm: CapturedModule, progress: Progress | None, notes: list[str]) -> Candidate:
        target = TARGETS[self.target]
        search = Search(gm, target, no_saturation=self.no_saturation, progress=progress, checkpoint=self.checkpoint)
        methods = METHODS_TRIED if self.method == "auto" else (self.method,)
        if self.recipe != "fast" and self.plan is None and _several_processes():
            notes.append("several processes calibrate, each on its share: nothing was tried")
        if self.recipe == "fast" or self.plan is not None or _several_processes():
            return search.fast(self._plan(gm), methods[0])
        found = search.best(self._plan, methods, self.recipe)
        notes += search.ledger
        return found

    def _plan(self, gm: CapturedModule, floats: Sequence[str] = ()) -> QuantPlan:
        if self.plan is not None:
            return self.plan
        bits, weight_bits = self.bits, self.weight_bits
        return place(gm, TARGETS[self.target], bits=bits, weight_bits=weight_bits, skip=self.skip, floats=floats)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
