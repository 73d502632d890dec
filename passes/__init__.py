"""fxopt.passes: the passes, one file each, one folder for each capability."""

from fxopt.pass_base import Pass
from fxopt.passes import branches as _branches
from fxopt.passes import cleanup as _cleanup
from fxopt.passes import distill as _distill
from fxopt.passes import half as _half
from fxopt.passes import prune as _prune
from fxopt.passes import quantize as _quantize
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
    FuseActivations,
    FuseAttention,
    MergeCommonSubexpressions,
    RemoveDeadCode,
    RemoveIdentities,
    SimplifyAlgebra,
)
from fxopt.passes.distill import (
    AttentionLoss,
    CustomLoss,
    DistillationLoss,
    ExtractStudent,
    HintLoss,
    MergeTeacher,
    ResponseLoss,
    SimilarityLoss,
    distilled_student,
)
from fxopt.passes.half import AdaptivePrecision, CastHalf, MixedPrecision, PrecisionPlan
from fxopt.passes.prune import (
    BakeMasks,
    Cubic,
    InsertMasks,
    Iterative,
    MaskPlan,
    OneShot,
    Prune,
    Pruner,
    ShrinkMasked,
    fine_tune,
)
from fxopt.passes.quantize import (
    AdaRound,
    BinarizeWeights,
    CodebookWeights,
    ConvertQat,
    CorrectBias,
    EqualizeChannels,
    Gptq,
    InsertQdq,
    LowerForIntegers,
    PrepareQat,
    Quantize,
    QuantizeDynamic,
    QuantizeWeights,
    QuantPlan,
    QuantSpec,
    SinkConstants,
    SmoothQuant,
    SplitOutliers,
)

PASSES: tuple[type[Pass], ...] = (
    *_branches.PASSES,
    *_cleanup.PASSES,
    *_distill.PASSES,
    *_half.PASSES,
    *_prune.PASSES,
    *_quantize.PASSES,
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
    "AdaRound",
    "AdaptivePrecision",
    "AttentionLoss",
    "BakeMasks",
    "BinarizeWeights",
    "BranchCount",
    "BranchProfile",
    "BranchesToSelect",
    "CastHalf",
    "CodebookWeights",
    "ConvertQat",
    "CorrectBias",
    "Cubic",
    "CustomLoss",
    "Dispatch",
    "DistillationLoss",
    "EqualizeChannels",
    "ExtractStudent",
    "FoldBatchNorm",
    "FoldConstants",
    "FreezeMode",
    "FuseActivations",
    "FuseAttention",
    "Gptq",
    "HintLoss",
    "InsertMasks",
    "InsertQdq",
    "Iterative",
    "LowerForIntegers",
    "MaskPlan",
    "MergeCommonSubexpressions",
    "MergeTeacher",
    "MixedPrecision",
    "OneShot",
    "PrecisionPlan",
    "PrepareQat",
    "Prune",
    "Pruner",
    "QuantPlan",
    "QuantSpec",
    "Quantize",
    "QuantizeDynamic",
    "QuantizeWeights",
    "RemoveDeadCode",
    "RemoveIdentities",
    "ResponseLoss",
    "ShrinkMasked",
    "SimilarityLoss",
    "SimplifyAlgebra",
    "SimplifyBranches",
    "SinkConstants",
    "SmoothQuant",
    "SpecializeBranches",
    "SplitOutliers",
    "distilled_student",
    "fine_tune",
    "profile_branches",
]
