"""What passes that work by a plan have in common: its options, their checks, and the promise."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fxopt.pass_base import LossyPass
from fxopt.passes.quantize.spec import QuantPlan
from fxopt.passes.quantize.target import TARGETS

__all__ = ["PlannedPass"]


@dataclasses.dataclass(frozen=True)
class PlannedPass(LossyPass):
    """A pass on the prepared float graph that a plan, with its scales, was made for.

    Attributes:
        plan: ``{node: QuantSpec}``; see :class:`QuantPlan`.
        target: Name of the runtime that the plan was made for.
        min_sqnr_db: Signal to quantization noise that every output must keep on the example inputs, in dB.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    plan: QuantPlan = dataclasses.field(default_factory=lambda: QuantPlan({}), repr=False)
    target: str = "ort-cpu"
    min_sqnr_db: float = 10.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; wanted one of {', '.join(TARGETS)}")
        if not isinstance(self.plan, QuantPlan):
            raise TypeError(f"plan is a {type(self.plan).__name__}; wanted a QuantPlan")
