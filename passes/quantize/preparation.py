"""What makes a graph ready for quantizers: evaluation alone, and operators that have integer kernels."""

from __future__ import annotations

from fxopt.pass_base import Pass
from fxopt.passes.cleanup import (
    FoldBatchNorm,
    FoldConstants,
    FoldScale,
    FreezeMode,
    FuseActivations,
    FuseAttention,
    MergeCommonSubexpressions,
    RemoveDeadCode,
    RemoveIdentities,
    SimplifyAlgebra,
)
from fxopt.passes.quantize.lower_for_integers import LowerForIntegers
from fxopt.passes.quantize.sink_constants import SinkConstants
from fxopt.passes.quantize.target import ORT_CPU, Target

__all__ = ["BEFORE_NORMS", "BEHIND_NORMS", "PREPARATION", "preparation_for"]

BEFORE_NORMS: tuple[Pass, ...] = (
    FreezeMode(),
    SinkConstants(),
    RemoveIdentities(),
    SimplifyAlgebra(),
    FoldConstants(parameters=True),
    FuseActivations(),
)
"""What comes before scales and batch norms go into the layers in front of them.

Functions that are spelled out are among it: their constants are no scale of the layer that they read.
"""

BEHIND_NORMS: tuple[Pass, ...] = (LowerForIntegers(), MergeCommonSubexpressions(), RemoveDeadCode())
"""What comes behind that."""

PREPARATION: tuple[Pass, ...] = (*BEFORE_NORMS, FoldScale(), FoldBatchNorm(), FoldScale(), *BEHIND_NORMS)
"""All of it, for a graph whose weights are trained no more."""


def preparation_for(target: Target) -> tuple[Pass, ...]:
    """Return all of it, and what makes operators that only one runtime has."""
    return (*PREPARATION, FuseAttention()) if target is ORT_CPU else PREPARATION
