"""Compute in half precision what can be, and keep in float32 what cannot.

    CastHalf("float16")                            plans by the calibration inputs, and applies the plan
    plan = CastHalf("float16").make_plan(gm)       the plan alone, to print and edit; CastHalf(plan=plan) applies it

The graph that results is for evaluation. Its weights are stored in half; to train in half precision, use
``mixed-precision``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree

from fxopt.changes import Skip
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.interface import Interface
from fxopt.manager import tensor_bytes
from fxopt.metric import Metric
from fxopt.pass_base import LossyPass, Pass, run_passes
from fxopt.passes.cleanup import (
    FoldBatchNorm,
    FoldConstants,
    FreezeMode,
    MergeCommonSubexpressions,
    RemoveDeadCode,
    RemoveIdentities,
    SimplifyAlgebra,
)
from fxopt.passes.half.apply import apply_plan
from fxopt.passes.half.emulate import ACCUMULATE, Accumulate
from fxopt.passes.half.operators import half_candidates
from fxopt.passes.half.plan import PrecisionPlan, dtype_name, half_dtype
from fxopt.passes.half.planning import Found, Goal, Planner
from fxopt.rewriter import Rewriter

__all__ = ["CastHalf"]

_PREPARATION: tuple[Pass, ...] = (
    FreezeMode(),
    RemoveIdentities(),
    SimplifyAlgebra(),
    FoldConstants(parameters=True),
    FoldBatchNorm(),
    MergeCommonSubexpressions(),
    RemoveDeadCode(),
)

_LISTED = 24  # reasons that a report lists


@dataclasses.dataclass(frozen=True)
class CastHalf(LossyPass):
    """Compute in half precision.

    Attributes:
        dtype: ``"float16"`` or ``"bfloat16"``, or the torch type.
        plan: What to compute in which type; made by the pass if None.
        keep_io: Inputs and outputs stay float32, and are cast at the border.
        allow: Patterns of what the rules must not keep in float32: nodes, operators such as ``"aten.softmax"``, or
            modules such as ``"layer1.*"``.
        deny: Patterns of what stays float32.
        min_sqnr_db: Signal to noise that every output must keep, in dB, on the example inputs and under emulation on
            the first of the calibration inputs.
        metric: Takes what is called as the model is, and returns how good it is, higher for better.
        max_drop: By how much the metric may fall below that of the float32 model.
        headroom: How many times larger than seen in calibration a value may get.
        accumulate: How the emulated device adds up: ``"float32"``, or ``"half"``, which is pessimistic.
    """

    name: ClassVar[str] = "cast-half"
    evaluation_only: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    dtype: torch.dtype | str = "float16"
    plan: PrecisionPlan | None = dataclasses.field(default=None, repr=False)
    keep_io: bool = True
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    min_sqnr_db: float = 30.0
    metric: Metric | None = dataclasses.field(default=None, repr=False)
    max_drop: float | None = None
    headroom: float = 2.0
    accumulate: Accumulate = "float32"

    @property
    def interface(self) -> Interface:  # type: ignore[override]  # an option here, a constant in other passes
        """What becomes of inputs and outputs."""
        return "kept" if self.keep_io else "retyped"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option has a value that does not exist.
            TypeError: plan or metric are something else.
        """
        half_dtype(self.dtype)
        if self.plan is not None and not isinstance(self.plan, PrecisionPlan):
            raise TypeError(f"plan is a {type(self.plan).__name__}; wanted a PrecisionPlan")
        if self.plan is not None and (self.allow or self.deny or self.metric is not None):
            raise ValueError("a plan says what is half: leave out allow, deny and metric, or edit the plan")
        if self.metric is not None and not callable(self.metric):
            raise TypeError(
                f"metric is a {type(self.metric).__name__}; wanted what takes the model and returns a number"
            )
        if self.max_drop is not None and self.metric is None:
            raise ValueError("max_drop is for a metric, and none is given")
        if self.max_drop is not None and not self.max_drop >= 0:
            raise ValueError(f"max_drop is {self.max_drop}; wanted 0 or more")
        if not self.headroom >= 1:
            raise ValueError(f"headroom is {self.headroom}; wanted 1 or more")
        if self.accumulate not in ACCUMULATE:
            raise ValueError(f"accumulate is {self.accumulate!r}; wanted one of {', '.join(ACCUMULATE)}")

    def run(self, rw: Rewriter) -> None:
        """Prepare, plan and cast.

        Raises:
            PassError: the graph is in train mode, has no floats, or the plan does not fit it.
            CalibrationError: the calibration data do not fit.
        """
        if not self._prepare(rw):
            rw.skips.append(Skip("output", "no operator is left that computes in float32", None, self.name))
            return
        before = tensor_bytes(rw.gm)
        if self.plan is None:
            found = self._planned(rw)
            plan = found.plan
            rw.notes += found.notes
        else:
            plan = self.plan
        if not plan.half:
            rw.skips.append(Skip("output", "nothing of the graph may compute in half", None, self.name))
        casts = apply_plan(rw, plan, keep_io=self.keep_io) if plan.half or not self.keep_io else 0
        rw.notes.append(
            f"{len(plan.half)} of {len(plan)} nodes compute in {dtype_name(plan.dtype)}, with {casts} casts; "
            f"parameters and buffers take {tensor_bytes(rw.gm)} bytes instead of {before}"
        )
        islands = [f"float32: {', '.join(nodes)}: {reason}" for reason, nodes in plan.islands.items()]
        rw.notes += islands[:_LISTED]
        if len(islands) > _LISTED:
            rw.notes.append(f"float32: for {len(islands) - _LISTED} other reasons, which the plan lists")

    def make_plan(self, gm: CapturedModule, calibration: Iterable[Any] | None = None) -> PrecisionPlan:
        """Return the plan that the pass would apply.

        Its names are those of the graph after the clean-up that the pass does first in any case.

        Args:
            gm: A captured graph in eval mode; it is left alone.
            calibration: Inputs; those that the graph carries, or its examples, if not given.
        """
        rw = Rewriter(gm.clone(), self.name)
        if calibration is not None:
            rw.gm.calibration = calibration
        if not self._prepare(rw):
            return PrecisionPlan({}, dtype=self.dtype)
        return self._planned(rw).plan

    def _prepare(self, rw: Rewriter) -> bool:
        """Clean the graph up, and return whether something of it can become half."""
        if rw.gm.training:
            raise PassError(
                describe(
                    "the graph is in train mode, and cast-half is for evaluation",
                    try_="graph.eval(); to train in half precision, use mixed-precision",
                )
            )
        skips = len(rw.skips)
        run_passes(rw, _PREPARATION)
        del rw.skips[skips:]  # what those passes left alone is not what this one is asked about
        nodes = [node for module in graph_modules(rw.gm) for node in module.graph.nodes]
        if not any(_is_floating(node.meta.get("val")) for node in nodes if node.op == "call_function"):
            raise PassError(
                describe(
                    "nothing of the graph computes on floats, so there is nothing to cast",
                    got=", ".join(map(str, rw.gm.inputs)) or "no inputs",
                    wanted="a model that computes on float32 tensors",
                )
            )
        return bool(half_candidates(rw, half_dtype(self.dtype))[0])

    def _planned(self, rw: Rewriter) -> Found:
        planner = Planner(
            rw,
            half_dtype(self.dtype),
            allow=self.allow,
            deny=self.deny,
            headroom=self.headroom,
            accumulate=self.accumulate,
            keep_io=self.keep_io,
        )
        return planner.run(Goal(self.min_sqnr_db, self.metric, self.max_drop or 0.0))


def _is_floating(value: Any) -> bool:
    """Return whether a value is a tensor of floats, or a tuple that has one."""
    return any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(value))
