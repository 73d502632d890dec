"""The terms of the loss, as options of :class:`MergeTeacher`: which values are compared, how, and with what weight.

Each makes a module of two values, and of the labels if it takes them. The module is captured like any model, so a loss
of one's own, with Python in it, is no other case than those of the papers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fxopt.args import shape_text
from fxopt.errors import PassError, describe
from fxopt.normalization_ops import widened
from fxopt.passes.distill.adapters import Resize, adapter, channel_axis_of, resizing
from fxopt.passes.distill.losses import attention_loss, hint_loss, response_loss, similarity_loss

__all__ = ["AttentionLoss", "CustomLoss", "DistillationLoss", "HintLoss", "ResponseLoss", "SimilarityLoss"]


class Term(nn.Module):
    """Computes one term; what it trains beside the student are its parameters.

    Attributes:
        resize: Brings the student's value to the teacher's sizes.
        project: Brings it to the teacher's channels or features; trained.
    """

    def __init__(self, resize: Resize | None = None, project: nn.Module | None = None) -> None:
        super().__init__()
        self.resize, self.project = resize, project

    def adapted(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the student's value in the shape of the teacher's."""
        if self.resize is not None:
            student = self.resize(student, teacher)
        if self.project is not None:
            student = self.project(widened(student))
        return student


@dataclasses.dataclass(frozen=True)
class DistillationLoss:
    """One term of the loss. Subclasses say how the values are compared.

    Attributes:
        student: The value of the student: a module's path, an output, a node, or ``"net.py:42"``; see
            :mod:`fxopt.passes.distill.taps`.
        teacher: The value of the teacher.
        weight: The factor of the term in the sum; the reported term is without it.
    """

    kind: ClassVar[str] = ""
    takes_labels: ClassVar[bool] = False
    student: str = "output"
    teacher: str = "output"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        _check(self.weight > 0 and self.weight < float("inf"), "weight", self.weight, "a number above 0")

    @property
    def label(self) -> str:
        """The name of the term in the outputs and of its adapter: kind and value."""
        return f"{self.kind} {self.student}"

    def term(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None) -> Term:
        """Return the module that computes the term, its parameters initialized by torch's random state.

        Args:
            student: The student's value, a fake one, whose sizes may be symbolic.
            teacher: The teacher's value.
            labels: The example labels, or None if there are none.

        Raises:
            PassError: these values cannot be compared.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ResponseLoss(DistillationLoss):
    """Soft targets: the divergence of the softened predictions, and the cross entropy of the labels.

    See :func:`fxopt.passes.distill.losses.response_loss`, which has the paper.

    Attributes:
        temperature: What both logits are divided by.
        alpha: Share of the soft term; without labels it is all.
        standardize: Compare standardized logits (Sun et al., CVPR 2024).
        class_axis: Axis of the classes; needed where the logits have more than two axes: 1 for [batch, classes, ...],
            -1 for [batch, seq, classes].
        ignore_index: Class index of positions that do not count.
    """

    kind: ClassVar[str] = "response"
    takes_labels: ClassVar[bool] = True
    temperature: float = 4.0
    alpha: float = 0.9
    standardize: bool = False
    class_axis: int | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        _check(0 < self.temperature < float("inf"), "temperature", self.temperature, "a number above 0")
        _check(0 <= self.alpha <= 1, "alpha", self.alpha, "a share from 0 to 1")

    @property
    def label(self) -> str:
        """The name of the term."""
        return self.kind if self.student == "output" else super().label

    def axis(self, logits: torch.Tensor) -> int:
        """Return the axis of the classes, counted from 0.

        Raises:
            PassError: it is not given, and could be one of several; or there is no such axis.
        """
        wanted = 1 if self.class_axis is None else self.class_axis
        axis = wanted + logits.ndim if wanted < 0 else wanted
        if self.class_axis is None and logits.ndim > 2:
            raise PassError(
                describe(
                    "which axis of the logits has the classes is not known",
                    got=shape_text(logits),
                    try_="class_axis=1 for [batch, classes, ...], class_axis=-1 for [batch, ..., classes]",
                )
            )
        if not 0 < axis < logits.ndim or not isinstance(logits.shape[axis], int):
            raise PassError(
                describe(
                    f"axis {wanted} of the logits has no classes", got=shape_text(logits), wanted="[batch, classes]"
                )
            )
        return axis

    def term(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None) -> Term:
        """Return the module; see the base class."""
        axis = self.axis(student)
        _same_shape(student, teacher, "the logits of student and teacher")
        if labels is not None:
            self._check_labels(student, labels, axis)
        options = {name: getattr(self, name) for name in ("temperature", "alpha", "standardize", "ignore_index")}
        return _Function(response_loss, options | {"class_axis": axis})

    def _check_labels(self, logits: torch.Tensor, labels: torch.Tensor, axis: int) -> None:
        classes = logits.shape[axis]
        if labels.is_floating_point():
            fits = labels.ndim == logits.ndim and labels.shape[axis] == classes
        else:
            fits = labels.dtype == torch.int64 and labels.ndim == logits.ndim - 1
        if not fits:
            raise PassError(
                describe(
                    "the labels fit no classes of the logits",
                    got=f"labels {shape_text(labels)}, logits {shape_text(logits)}",
                    wanted="class indices i64 in the shape of the logits without their classes, "
                    "or probabilities in the shape of the logits",
                )
            )
        if not labels.is_floating_point():
            wrong = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= classes))]
            if wrong.numel():
                raise PassError(
                    describe(
                        "the example labels hold class indices that there are not",
                        got=f"{int(wrong[0])}",
                        wanted=f"0 to {int(classes) - 1}, or ignore_index={self.ignore_index}",
                    )
                )


@dataclasses.dataclass(frozen=True)
class HintLoss(DistillationLoss):
    """Hints: the squared difference of two values, the student's through an adapter where shapes differ.

    See :func:`fxopt.passes.distill.losses.hint_loss`, which has the paper, and :mod:`fxopt.passes.distill.adapters`.

    Attributes:
        channel_axis: Axis of the channels or features; 1 for maps of rank 4 and 5 and the last for others, if None.
    """

    kind: ClassVar[str] = "hint"
    channel_axis: int | None = None

    def term(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None) -> Term:
        """Return the module; see the base class."""
        return _Function(hint_loss, {}, *adapter(student, teacher, channel_axis_of(student, self.channel_axis)))


@dataclasses.dataclass(frozen=True)
class AttentionLoss(DistillationLoss):
    """Attention transfer: where a layer has large values, whatever the number of its channels.

    See :func:`fxopt.passes.distill.losses.attention_loss`, which has the paper. Where the sizes of maps differ, the
    student's are averaged or interpolated.

    Attributes:
        channel_axis: Axis of the channels; see :class:`HintLoss`.
    """

    kind: ClassVar[str] = "attention"
    channel_axis: int | None = None

    def term(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None) -> Term:
        """Return the module; see the base class."""
        if min(student.ndim, teacher.ndim) < 3:
            raise PassError(
                describe(
                    "an attention map needs axes beside those of batch and channels",
                    got=f"student {shape_text(student)}, teacher {shape_text(teacher)}",
                    try_="a HintLoss or a SimilarityLoss for values of one row each",
                )
            )
        axis = channel_axis_of(student, self.channel_axis)
        return _Function(attention_loss, {"channel_axis": axis}, resizing(student, teacher, axis))


@dataclasses.dataclass(frozen=True)
class SimilarityLoss(DistillationLoss):
    """Similarity preserving: which examples of a batch are alike, for values of any two shapes.

    See :func:`fxopt.passes.distill.losses.similarity_loss`, which has the paper.
    """

    kind: ClassVar[str] = "similarity"

    def term(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None) -> Term:
        """Return the module; see the base class."""
        if min(student.ndim, teacher.ndim) < 2 or str(student.shape[0]) != str(teacher.shape[0]):
            raise PassError(
                describe(
                    "the values are not of one batch",
                    got=f"student {shape_text(student)}, teacher {shape_text(teacher)}",
                    wanted="[batch, ...] twice",
                )
            )
        return _Function(similarity_loss, {})


@dataclasses.dataclass(frozen=True)
class CustomLoss(DistillationLoss):
    """A loss of one's own.

    Attributes:
        function: Takes the student's value, the teacher's, and the labels if ``with_labels``; returns one number. A
            module, whose parameters are trained with the student, or a function.
        with_labels: Hand on the labels.
        name: Of the term; that of the function if not given.
    """

    function: Callable[..., torch.Tensor] = dataclasses.field(default=hint_loss, kw_only=True)
    with_labels: bool = dataclasses.field(default=False, kw_only=True)
    name: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(f"function is {self.function!r}; wanted a function or module of two values")

    @property
    def takes_labels(self) -> bool:  # type: ignore[override]  # an option here, a constant in other losses
        """Whether labels are handed on."""
        return self.with_labels

    @property
    def label(self) -> str:
        """The name of the term."""
        own = getattr(self.function, "__name__", type(self.function).__name__)
        return self.name or f"{own.strip('<>')} {self.student}"

    def term(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None) -> Term:
        """Return the module; see the base class."""
        if self.with_labels and labels is None:
            raise PassError(
                describe(f"{self.label!r} takes labels, and there are none", try_="MergeTeacher(..., labels=example)")
            )
        return _Function(self.function, {})


class _Function(Term):
    """A term that a function, or a module, computes of the adapted values."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        options: dict[str, Any],
        resize: Resize | None = None,
        project: nn.Module | None = None,
    ) -> None:
        super().__init__(resize, project)
        self.function, self.options = function, options

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        given = () if labels is None else (labels,)
        return self.function(self.adapted(student, teacher), teacher, *given, **self.options)


def _same_shape(student: torch.Tensor, teacher: torch.Tensor, what: str) -> None:
    if [str(size) for size in student.shape] != [str(size) for size in teacher.shape]:
        raise PassError(
            describe(
                f"{what} differ in shape",
                got=f"student {shape_text(student)}, teacher {shape_text(teacher)}",
                wanted="one shape: the loss compares class by class",
            )
        )


def _check(holds: bool, option: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{option} is {value!r}; wanted {wanted}")
