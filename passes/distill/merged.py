"""The teacher inside the graph of the student."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxopt.args import value
from fxopt.attributes import fresh_name
from fxopt.graph_module import CapturedModule
from fxopt.inline import inline
from fxopt.passes.distill.shared_work import erase_unread, share_work, stop_gradients
from fxopt.passes.distill.teacher import matching_inputs
from fxopt.passes.distill.teacher_outputs import outputs, tapped
from fxopt.rewriter import Rewriter

__all__ = ["Merged"]

Node = torch.fx.Node
aten = torch.ops.aten


class Merged:
    """Puts a frozen teacher behind the student.

    Attributes:
        values: The value in the graph for each text that names one of the teacher's; no gradient flows from it.
        roots: The first part of the name of each attribute that came with the teacher.
    """

    def __init__(self, rw: Rewriter, teacher: CapturedModule, taps: Mapping[str, Node]) -> None:
        """Args: rw: of the student. teacher: a frozen one. taps: nodes of it by the text that names them."""
        self._rw, self._teacher, self._taps = rw, teacher, taps
        self._before = rw.gm.clone()
        self._output = rw.gm.graph.output_node()
        student = set(rw.gm.graph.nodes)
        root = fresh_name(rw.gm, "teacher", ())
        why = "the teacher"
        inlined = inline(rw, teacher, self._inputs(), before=self._output, prefix=root, why=why)
        self.roots = {root, *inlined.roots}
        theirs = [node for node in rw.gm.graph.nodes if node not in student]
        self._nodes = set(theirs)
        became = share_work(rw, theirs, why="student and teacher share it")
        stop_gradients(rw, theirs, why="no gradient flows into the teacher")
        found = {name: inlined.nodes[node] for name, node in taps.items()}
        self.values = {name: self._detached(became.get(node, node)) for name, node in found.items()}

    def cached(self) -> dict[str, Node]:
        """Return an argument of the graph for each of the values, to be read in its place."""
        teacher = tapped(self._teacher, self._taps)
        examples = [outputs(teacher, self._before, sample) for sample in self._before.samples]
        fakes = {name: value(node) for name, node in self.values.items()}
        found: dict[str, Node] = self._rw.add_argument("cache", fakes, examples, why="what the teacher yields")
        return found

    def erase_unread(self) -> None:
        """Erase what no loss reads of the teacher; all of it, if its values come from a cache."""
        read = any(value.users for value in self.values.values() if not value._erased)
        erase_unread(self._rw, [*self._nodes, *self.values.values()], why="no loss reads it", effects=not read)

    def _inputs(self) -> dict[str, Node]:
        """Return the student's input for each of the teacher's, cast where the teacher takes another element type."""
        placeholders = {node.name: node for node in self._rw.gm.graph.nodes if node.op == "placeholder"}
        bound = {}
        for name, own in matching_inputs(self._teacher, self._rw.gm).items():
            node = placeholders[own]
            wanted = next(spec.dtype for spec in self._teacher.inputs if spec.name == name)
            if self._rw.dtype(node) != wanted:
                why = f"the teacher takes {wanted}"
                node = self._rw.insert_call(aten.to.dtype, (node, wanted), before=self._output, why=why, sources=[node])
            bound[name] = node
        return bound

    def _detached(self, node: Node) -> Node:
        if node in self._nodes:
            return node
        why = "student and teacher share it, and no gradient flows through the teacher's"
        return self._rw.insert_call(aten.detach.default, (node,), before=self._output, why=why, sources=[node])
