"""Distillation: one graph of student, teacher and losses, and the student taken out again."""

from fxopt.pass_base import Pass
from fxopt.passes.distill.distilled_student import distilled_student
from fxopt.passes.distill.extract_student import ExtractStudent
from fxopt.passes.distill.merge_teacher import MergeTeacher
from fxopt.passes.distill.terms import (
    AttentionLoss,
    CustomLoss,
    DistillationLoss,
    HintLoss,
    ResponseLoss,
    SimilarityLoss,
)

PASSES: tuple[type[Pass], ...] = (MergeTeacher, ExtractStudent)

__all__ = [
    "PASSES",
    "AttentionLoss",
    "CustomLoss",
    "DistillationLoss",
    "ExtractStudent",
    "HintLoss",
    "MergeTeacher",
    "ResponseLoss",
    "SimilarityLoss",
    "distilled_student",
]
