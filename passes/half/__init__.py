"""fxopt.passes.half: computing in half precision."""

from fxopt.pass_base import Pass
from fxopt.passes.half.adaptive import AdaptivePrecision, Move
from fxopt.passes.half.apply import apply_plan
from fxopt.passes.half.cast_half import CastHalf
from fxopt.passes.half.emulate import Emulated
from fxopt.passes.half.mixed_precision import MixedPrecision
from fxopt.passes.half.operators import half_candidates
from fxopt.passes.half.plan import HALF_TYPES, PrecisionPlan, half_dtype

PASSES: tuple[type[Pass], ...] = (CastHalf, MixedPrecision)

__all__ = [
    "HALF_TYPES",
    "PASSES",
    "AdaptivePrecision",
    "CastHalf",
    "Emulated",
    "MixedPrecision",
    "Move",
    "PrecisionPlan",
    "apply_plan",
    "half_candidates",
    "half_dtype",
]
