"""Lossless clean-up of a graph."""

from fxopt.pass_base import Pass
from fxopt.passes.cleanup.fold_batch_norm import FoldBatchNorm
from fxopt.passes.cleanup.fold_constants import FoldConstants
from fxopt.passes.cleanup.fold_scale import FoldScale
from fxopt.passes.cleanup.freeze_mode import FreezeMode
from fxopt.passes.cleanup.fuse_activations import FuseActivations
from fxopt.passes.cleanup.fuse_attention import FuseAttention
from fxopt.passes.cleanup.merge_common_subexpressions import MergeCommonSubexpressions
from fxopt.passes.cleanup.remove_dead_code import RemoveDeadCode
from fxopt.passes.cleanup.remove_identities import RemoveIdentities
from fxopt.passes.cleanup.simplify_algebra import SimplifyAlgebra

PASSES: tuple[type[Pass], ...] = (
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

__all__ = [
    "PASSES",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldScale",
    "FreezeMode",
    "FuseActivations",
    "FuseAttention",
    "MergeCommonSubexpressions",
    "RemoveDeadCode",
    "RemoveIdentities",
    "SimplifyAlgebra",
]
