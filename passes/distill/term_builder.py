"""Capture the terms of a loss and put them behind student and teacher."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxopt.args import shape_text, value
from fxopt.attributes import fresh_name
from fxopt.capture import capture
from fxopt.errors import FxoptError, PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.inline import inline
from fxopt.passes.distill.adapters import describe_adapter
from fxopt.passes.distill.labels import add_labels, labels_of_samples
from fxopt.passes.distill.teacher_outputs import on_first_sample
from fxopt.passes.distill.terms import DistillationLoss, ResponseLoss, Term
from fxopt.rewriter import Rewriter

__all__ = ["TermBuilder"]

Node = torch.fx.Node
aten = torch.ops.aten


class TermBuilder:
    """Adds the terms of a loss to a graph.

    Attributes:
        roots: The first part of the name of each attribute that came with them.
    """

    def __init__(
        self,
        rw: Rewriter,
        losses: Sequence[DistillationLoss],
        students: Mapping[str, Node],
        labels: Any,
        seed: int,
    ) -> None:
        """Add the argument for the labels, if there are any.

        Args:
            rw: Of the graph.
            losses: All terms.
            students: The student's value for each text that names one.
            labels: Example labels, or a list of them, one for each sample, or None.
            seed: Of the first values of adapters.

        Raises:
            PassError: labels are given, and no loss takes any; or they do not fit the samples.
        """
        self._rw, self._losses, self._students, self._seed = rw, losses, students, seed
        self._output = rw.gm.graph.output_node()
        self._adapters = fresh_name(rw.gm, "adapters", ())
        self.roots = {self._adapters}
        self._examples = None if labels is None else labels_of_samples(rw.gm, labels)
        self._labels = None if self._examples is None else self._add_labels(self._examples)
        self._values: dict[str, torch.Tensor] = {}

    def add(self, teachers: Mapping[str, Node]) -> dict[str, Node]:
        """Add the terms, and return the node that yields each, a number, by its label.

        Args:
            teachers: The teacher's value for each text that names one.

        Raises:
            PassError: a loss cannot compare its values, or does not yield one number.
            CaptureError: a loss cannot become a graph.
        """
        wanted = {node.name: node for node in (*self._students.values(), *teachers.values(), self._labels) if node}
        self._values = on_first_sample(self._rw.gm, wanted)
        terms = {}
        for loss in self._losses:
            try:
                terms[loss.label] = self._add(loss, self._students[loss.student], teachers[loss.teacher])
            except FxoptError as error:
                values = f"the student's {loss.student!r}, the teacher's {loss.teacher!r}"
                error.add_note(f"in the loss {loss.label!r} of {values}")
                raise
        return terms

    def total(self, terms: Mapping[str, Node]) -> Node:
        """Add the weighted sum of the terms and return the node that yields it."""
        total: Node | None = None
        for loss in self._losses:
            why = f"the weight of {loss.label!r}"
            part = self._call(aten.mul.Tensor, (terms[loss.label], float(loss.weight)), terms[loss.label], why)
            total = part if total is None else self._call(aten.add.Tensor, (total, part), part, "the sum of the terms")
        assert total is not None  # there is a loss
        return total

    def _add(self, loss: DistillationLoss, student: Node, teacher: Node) -> Node:
        wider = torch.promote_types(self._rw.dtype(student), self._rw.dtype(teacher))
        given = {"student": self._in_type(student, wider), "teacher": self._in_type(teacher, wider)}
        if loss.takes_labels and self._labels is not None:
            given["labels"] = self._labels
        graph = self._captured(self._term(loss, given), given)
        slug = re.sub(r"\W+", "_", loss.label)
        inlined = inline(
            self._rw,
            graph,
            given,
            before=self._output,
            prefix=f"loss_{slug}",
            tensors=f"{self._adapters}.{slug}",
            why=f"the term {loss.label!r}",
        )
        self.roots |= set(inlined.roots)
        (term,) = inlined.outputs
        return term  # type: ignore[no-any-return]  # _captured checked that it is a node

    def _in_type(self, node: Node, dtype: torch.dtype) -> Node:
        if self._rw.dtype(node) == dtype:
            return node
        cast = self._call(aten.to.dtype, (node, dtype), node, f"compared in {dtype}")
        self._values[cast.name] = self._values[node.name].to(dtype)
        return cast

    def _add_labels(self, examples: Sequence[torch.Tensor]) -> Node:
        takers = [loss for loss in self._losses if loss.takes_labels]
        if not takers:
            raise PassError(
                describe(
                    "labels are given, and no loss takes them",
                    got=", ".join(loss.label for loss in self._losses),
                    try_="a ResponseLoss, or CustomLoss(function=..., with_labels=True)",
                )
            )
        responses = [loss for loss in takers if isinstance(loss, ResponseLoss)]
        like = value(self._students[(responses or takers)[0].student])
        axis = responses[0].axis(like) if responses else None
        return add_labels(self._rw, examples, like, axis, why="labels for the loss")

    def _term(self, loss: DistillationLoss, given: Mapping[str, Node]) -> Term:
        labels = self._examples[0] if self._examples is not None and "labels" in given else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            term = loss.term(value(given["student"]), value(given["teacher"]), labels)
        does = describe_adapter(term.resize, term.project)
        if does is not None:
            self._rw.notes.append(f"{loss.label}: the student's {loss.student!r} is adapted: {does}")
        return term.train(self._rw.gm.training)

    def _captured(self, term: Term, given: Mapping[str, Node]) -> CapturedModule:
        examples = {name: self._values[node.name] for name, node in given.items()}
        dynamic = {name: _dynamic_axes(value(node)) for name, node in given.items()}
        shapes = dynamic if any(dynamic.values()) else None
        graph = capture(term, examples, dynamic_shapes=shapes)
        returned: Any = graph.graph.output_node().args[0]
        found = returned[0].meta["val"] if len(returned) == 1 and isinstance(returned[0], Node) else None
        if not isinstance(found, torch.Tensor) or found.ndim or not found.is_floating_point():
            raise PassError(
                describe(
                    "a loss must be one floating point number",
                    got=", ".join(shape_text(value(n)) if isinstance(n, Node) else repr(n) for n in returned),
                    try_=".mean(), for one",
                )
            )
        return graph

    def _call(self, target: Any, args: tuple[Any, ...], source: Node, why: str) -> Node:
        return self._rw.insert_call(target, args, before=self._output, why=why, sources=[source])


def _dynamic_axes(fake: torch.Tensor) -> dict[int, Any] | None:
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(fake.shape) if not isinstance(size, int)} or None
