"""A smaller student of a model, and the model as its teacher, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fxopt.capture import capture
from fxopt.graph_module import CapturedModule
from fxopt.manager import PassManager
from fxopt.passes.distill.merge_teacher import MergeTeacher
from fxopt.passes.distill.terms import DistillationLoss, ResponseLoss

__all__ = ["distilled_student"]


def distilled_student(
    model: torch.nn.Module | Callable[..., Any],
    passes: str | Iterable[Any],
    example_inputs: Any = None,
    *,
    losses: Sequence[DistillationLoss] = (ResponseLoss(),),
    labels: Any = None,
    teacher: torch.nn.Module | Callable[..., Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    **options: Any,
) -> CapturedModule:
    """Return a student that passes make of a model, merged with the model itself, or another, as the teacher.

    The student has weights of its own; the teacher shares its weights with the model, which stays as it is.

    Args:
        model: A module, a function, or a captured graph.
        passes: What makes the student: ``["prune{...}"]``, ``[PrepareQat()]``, both.
        example_inputs: See :func:`fxopt.capture`.
        losses: See :class:`MergeTeacher`.
        labels: See :class:`MergeTeacher`.
        teacher: Another teacher than the model, of the same inputs.
        dynamic_shapes: See :func:`fxopt.capture`.
        calibration: See :func:`fxopt.optimize`.
        options: Others of :class:`MergeTeacher`.

    Raises:
        FxoptError: the model cannot be captured, or a pass fails: nothing is left out.
    """
    graph = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    student = graph.clone(copy_tensors=True)
    if calibration is not None:
        student.calibration = calibration
    student = PassManager(passes, strict=True).run(student)
    merge = MergeTeacher(graph if teacher is None else teacher, losses, labels, **options)
    merged = PassManager([merge], strict=True).run(student)
    if student.report is not None and merged.report is not None:
        merged.report.steps[:0] = student.report.steps
    return merged
