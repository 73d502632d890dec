"""fxopt.passes: the passes, one file each, one folder for each capability."""

from fxopt.pass_base import Pass
from fxopt.passes import branches as _branches
from fxopt.passes import cleanup as _cleanup
from fxopt.passes.branches import (
    BranchCount,
    BranchesToSelect,
    BranchProfile,
    Dispatch,
    SimplifyBranches,
    SpecializeBranches,
    profile_branches,
)
from fxopt.passes.cleanup import (
    FoldBatchNorm,
    FoldConstants,
    FreezeMode,
    MergeCommonSubexpressions,
    RemoveDeadCode,
    RemoveIdentities,
    SimplifyAlgebra,
)

PASSES: tuple[type[Pass], ...] = (*_branches.PASSES, *_cleanup.PASSES)

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
    "BranchCount",
    "BranchProfile",
    "BranchesToSelect",
    "Dispatch",
    "FoldBatchNorm",
    "FoldConstants",
    "FreezeMode",
    "MergeCommonSubexpressions",
    "RemoveDeadCode",
    "RemoveIdentities",
    "SimplifyAlgebra",
    "SimplifyBranches",
    "SpecializeBranches",
    "profile_branches",
]
