"""Make one graph of a student, a frozen teacher, and the losses that compare them.

    before:  output = student(x)
    after:   output = student(x);  z = teacher(detach(x));  term = loss(output, z, labels);  ...
             return {"output": output, "loss": sum of weight * term, "terms": {"response": term, ...}}

The student's nodes and outputs are what they were. The teacher runs in evaluation whatever mode the graph is in: its
mode arguments are fixed, its parameters want no gradient, and what it reads is detached, so that no step of it is
recorded. What both compute of the inputs alike, such as pre-processing, is computed once. The tensors of the teacher
stand under ``teacher.``, those that the losses train, such as adapters, under ``adapters.``.

``extract-student`` takes the student out again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from fxopt.calibration_data import calibration_samples
from fxopt.contracts import Contract
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.interface import Interface, argument_names, output_tree
from fxopt.pass_base import Pass
from fxopt.passes.distill.merged import Merged
from fxopt.passes.distill.student_record import StudentRecord, listing
from fxopt.passes.distill.taps import find_tap
from fxopt.passes.distill.teacher import frozen_teacher, refuse_shared_tensors
from fxopt.passes.distill.teacher_outputs import all_outputs, tapped
from fxopt.passes.distill.term_builder import TermBuilder
from fxopt.passes.distill.terms import DistillationLoss, ResponseLoss
from fxopt.rewriter import Rewriter

__all__ = ["MergeTeacher"]


@dataclasses.dataclass(frozen=True)
class MergeTeacher(Pass):
    """Merge a teacher and losses with the graph, which becomes the student.

    Attributes:
        teacher: A module or function of the student's inputs, or a captured graph of them.
        losses: The terms of the loss: :class:`ResponseLoss`, :class:`HintLoss`, :class:`AttentionLoss`,
            :class:`SimilarityLoss`, :class:`CustomLoss`.
        labels: Example labels for the graph's sample, or a list of them, one for each sample. The graph takes labels
            as its last argument then.
        half: Run a module as the teacher in this element type, ``torch.bfloat16`` or ``torch.float16``.
        teacher_passes: Passes to run over the graph of the teacher alone.
        cached: Take what the teacher yields as an argument ``cache``, ``{value: tensor}``, instead of computing it;
            :meth:`teacher_outputs` computes it once for all data.
        seed: Of the adapters' first values.
    """

    name: ClassVar[str] = "merge-teacher"
    contract: ClassVar[Contract] = Contract.EXACT
    divisible: ClassVar[bool] = False
    interface: ClassVar[Interface] = "extended"
    teacher: torch.nn.Module | Callable[..., Any] | None = dataclasses.field(default=None, repr=False)
    losses: Sequence[DistillationLoss] = dataclasses.field(default=(ResponseLoss(),), repr=False)
    labels: Any = dataclasses.field(default=None, repr=False)
    half: torch.dtype | None = None
    teacher_passes: Sequence[Any] = dataclasses.field(default=(), repr=False)
    cached: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.losses:
            raise ValueError("losses is empty; wanted at least one, such as ResponseLoss()")
        for loss in self.losses:
            if not isinstance(loss, DistillationLoss):
                raise TypeError(f"losses holds {loss!r}; wanted a DistillationLoss; CustomLoss(function=...) makes one")
        labels = [loss.label for loss in self.losses]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(f"two losses are called {twice[0]!r}; wanted one for each value, or CustomLoss(name=...)")
        if self.half not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"half is {self.half}; wanted torch.bfloat16 or torch.float16")

    def run(self, rw: Rewriter) -> None:
        """Merge.

        Raises:
            PassError: there is no teacher, it takes other inputs, shares tensors with the student, or a loss finds no
                value, or none that it can compare.
            CaptureError: teacher or loss cannot become a graph.
        """
        if self.name in rw.gm.records:
            raise PassError("the graph has a teacher already; extract-student takes the student out again")
        record = StudentRecord(listing(rw.gm), list(rw.gm.output_names), [], [])
        arguments, results = argument_names(rw.gm), output_tree(rw.gm)
        teacher = self._frozen(rw.gm)
        students = {loss.student: find_tap(rw.gm, loss.student, of="student") for loss in self.losses}
        taps = {loss.teacher: find_tap(teacher, loss.teacher, of="teacher") for loss in self.losses}
        merged = Merged(rw, teacher, taps)
        builder = TermBuilder(rw, self.losses, students, self.labels, self.seed)
        terms = builder.add(merged.cached() if self.cached else merged.values)
        tree = {"output": results, "loss": builder.total(terms), "terms": terms}
        rw.set_outputs(tree, record.outputs, why="the losses")
        merged.erase_unread()
        added = [name for name in argument_names(rw.gm) if name not in arguments]
        roots = sorted({*merged.roots, *builder.roots})
        rw.leave(self.name, dataclasses.replace(record, arguments=added, roots=roots).to_json())

    def teacher_outputs(self, student: CapturedModule, data: Any) -> dict[str, torch.Tensor]:
        """Return what the teacher yields for all inputs, one tensor for each value that the losses compare.

        Args:
            student: The graph that the teacher is to be merged with.
            data: The inputs, as calibration data: any iterable of batches, with labels or without.

        Returns:
            ``{value: tensor}``, joined along axis 0. With ``cached=True``, pass the rows of a batch as ``cache``.

        Raises:
            CalibrationError: the data do not fit the student.
            PassError: the values of two batches differ in size behind axis 0.
        """
        teacher = self._frozen(student)
        taps = {loss.teacher: find_tap(teacher, loss.teacher, of="teacher") for loss in self.losses}
        return all_outputs(tapped(teacher, taps), student, calibration_samples(student, data))

    def _frozen(self, student: CapturedModule) -> CapturedModule:
        if self.teacher is None:
            raise PassError(
                describe("merge-teacher has no teacher", try_="passes.MergeTeacher(teacher, losses=[...]) in Python")
            )
        teacher = frozen_teacher(self.teacher, student, half=self.half, passes=self.teacher_passes)
        refuse_shared_tensors(student, teacher)
        return teacher
