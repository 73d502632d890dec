"""Train in half precision, with weights, gradients and statistics in float32.

    before:  y = relu(linear(x, w, b));  z = softmax(y, -1)
    after:   y = relu(linear(to(x, half), to(w, half), to(b, half)));  z = softmax(to(y, float32), -1)

Both modes stay in the graph, which is trained as any other module. Parameters are the float32 masters of Micikevicius
et al. (Mixed Precision Training, ICLR 2018): they are cast where they are used, their gradients arrive in float32, and
their names and types are those of the model. Running statistics and all other buffers stay float32.

float16 needs a scaled loss, for which torch has all there is::

    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(gm(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.changes import Skip
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import LossyPass, run_passes
from fxopt.passes.cleanup import FreezeMode
from fxopt.passes.half.apply import apply_plan
from fxopt.passes.half.autocast_plan import autocast_plan
from fxopt.passes.half.operators import half_candidates
from fxopt.passes.half.plan import HALF_TYPES, PrecisionPlan, dtype_name, half_dtype
from fxopt.passes.half.planning import Goal, Planner
from fxopt.rewriter import Rewriter

__all__ = ["PLANNERS", "MixedPrecision"]

PLANNERS = ("operators", "calibration")
"""How a plan is made: by operator, as autocast decides, or by measured ranges and noise, as ``cast-half`` does."""


@dataclasses.dataclass(frozen=True)
class MixedPrecision(LossyPass):
    """Compute in half precision in training and evaluation, from parameters in float32.

    Attributes:
        dtype: ``"bfloat16"`` or ``"float16"``, or the torch type.
        plan: What to compute in which type; made by the pass if None.
        by: How a plan is made: by ``"operators"``, or by ``"calibration"`` inputs.
        keep: Patterns of what stays float32: nodes, operators such as ``"aten.linear"``, or modules.
        min_sqnr_db: Signal to noise that every output must have in evaluation, in dB. Training goes on from there.
    """

    name: ClassVar[str] = "mixed-precision"
    evaluation_only: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    dtype: torch.dtype | str = "bfloat16"
    plan: PrecisionPlan | None = dataclasses.field(default=None, repr=False)
    by: str = "operators"
    keep: tuple[str, ...] = ()
    min_sqnr_db: float = 20.0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option has a value that does not exist, or plan and keep are given together.
            TypeError: plan is something else.
        """
        half_dtype(self.dtype)
        if self.plan is not None and not isinstance(self.plan, PrecisionPlan):
            raise TypeError(f"plan is a {type(self.plan).__name__}; wanted a PrecisionPlan")
        if self.plan is not None and self.keep:
            raise ValueError("a plan says what is half: leave out keep, or edit the plan")
        if self.by not in PLANNERS:
            raise ValueError(f"by is {self.by!r}; wanted one of {', '.join(PLANNERS)}")

    def run(self, rw: Rewriter) -> None:
        """Plan and cast.

        Raises:
            PassError: the graph has one mode only or no floats, or the plan does not fit it.
            CalibrationError: the calibration data do not fit.
        """
        plan = self._checked_plan(rw)
        if not plan.half:
            rw.skips.append(Skip("output", "nothing of the graph may compute in half", None, self.name))
            return
        casts = apply_plan(rw, plan, masters=True)
        rw.notes.append(
            f"{len(plan.half)} of {len(plan)} nodes compute in {dtype_name(plan.dtype)}, with {casts} casts"
        )

    def make_plan(self, gm: CapturedModule) -> PrecisionPlan:
        """Return the plan that the pass would apply to a graph, which is left alone.

        Raises:
            PassError: as :meth:`run`.
        """
        return self._checked_plan(Rewriter(gm.clone(), self.name))

    def _checked_plan(self, rw: Rewriter) -> PrecisionPlan:
        if rw.gm.modes != "both":
            raise PassError(
                describe(
                    f"the graph is valid in {rw.gm.modes} mode only, and mixed-precision is for training",
                    because=rw.gm.modes_reason or None,
                    try_="fxopt.capture(model, example_inputs), of the module itself; for evaluation, cast-half",
                )
            )
        dtype = half_dtype(self.dtype)
        if not half_candidates(rw, dtype)[0]:
            if any(_is_half(node) for node in rw.nodes()):
                return PrecisionPlan({}, dtype=dtype)  # it has been done
            raise PassError(
                describe(
                    f"no operator of the graph can compute in {dtype_name(dtype)}",
                    got=", ".join(map(str, rw.gm.inputs)),
                    wanted="a model that computes on float32 tensors",
                )
            )
        if self.plan is not None:
            return self.plan
        return self._measured(rw, dtype) if self.by == "calibration" else autocast_plan(rw, dtype, keep=self.keep)

    def _measured(self, rw: Rewriter, dtype: torch.dtype) -> PrecisionPlan:
        """Return the plan of a twin in evaluation, for the nodes that both graphs have."""
        twin = Rewriter(rw.gm.clone(), self.name)
        twin.gm.eval()
        run_passes(twin, (FreezeMode(),))
        twin.finish()
        plan = Planner(twin, dtype, deny=self.keep).run(Goal(self.min_sqnr_db)).plan
        known = half_candidates(rw, dtype)[0]
        return PrecisionPlan({name: found for name, found in plan.items() if name in known}, plan.reasons, dtype=dtype)


def _is_half(node: torch.fx.Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) in HALF_TYPES.values()
