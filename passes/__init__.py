"""fxopt.passes: the passes, one file each, one folder for each capability."""

from fxopt.pass_base import Pass
from fxopt.passes.cleanup import (
    FoldBatchNorm,
    FoldConstants,
    FreezeMode,
    MergeCommonSubexpressions,
    RemoveDeadCode,
    RemoveIdentities,
    SimplifyAlgebra,
)

PASSES: tuple[type[Pass], ...] = (
    FoldBatchNorm,
    FoldConstants,
    FreezeMode,
    MergeCommonSubexpressions,
    RemoveDeadCode,
    RemoveIdentities,
    SimplifyAlgebra,
)

# What ``optimize(model)`` runs: identities first, so that batch norms stand next to their layers; dead code last.
DEFAULT: tuple[Pass, ...] = (
    RemoveIdentities(),
    SimplifyAlgebra(),
    FoldConstants(),
    FoldBatchNorm(),
    MergeCommonSubexpressions(),
    RemoveDeadCode(),
)

__all__ = [
    "DEFAULT",
    "PASSES",
    "FoldBatchNorm",
    "FoldConstants",
    "FreezeMode",
    "MergeCommonSubexpressions",
    "RemoveDeadCode",
    "RemoveIdentities",
    "SimplifyAlgebra",
]
