"""Take the student out of a graph that ``merge-teacher`` made, with its trained weights.

    before:  return {"output": student(x), "loss": ..., "terms": ...}         inputs x, labels
    after:   return student(x)                                                 input x

What goes is what only the losses read: teacher, adapters, the losses and their arguments. That the rest is the student
is proved: its nodes are compared, one by one, with those that were listed when the teacher was merged. Where later
passes changed some, the report names these passes and nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch.utils import _pytree as pytree

from fxopt.args import source_line
from fxopt.contracts import Contract
from fxopt.effects import has_effect
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.interface import Interface, argument_leaves, output_tree
from fxopt.pass_base import Pass
from fxopt.passes.distill.student_record import StudentRecord, differences, listing
from fxopt.rewriter import Rewriter

__all__ = ["ExtractStudent"]

Node = torch.fx.Node
_MERGE = "merge-teacher"


@dataclasses.dataclass(frozen=True)
class ExtractStudent(Pass):
    """Remove teacher, adapters, losses and their arguments."""

    name: ClassVar[str] = "extract-student"
    contract: ClassVar[Contract] = Contract.EXACT
    divisible: ClassVar[bool] = False
    interface: ClassVar[Interface] = "reduced"

    def run(self, rw: Rewriter) -> None:
        """Extract.

        Raises:
            PassError: no teacher was merged, the outputs are no longer those of the merge, or the student reads what
                came with the teacher.
        """
        if _MERGE not in rw.gm.records:
            raise PassError(
                describe(
                    "the graph has no teacher to take the student from",
                    try_="the graph that passes.MergeTeacher(teacher, losses=[...]) made",
                )
            )
        record = StudentRecord.from_json(rw.gm.records[_MERGE])
        tree = output_tree(rw.gm)
        if not isinstance(tree, dict) or set(tree) != {"output", "loss", "terms"}:
            raise PassError("the graph no longer returns output, loss and terms, so that the student cannot be told")
        foreign = _foreign(rw.gm, record)
        student = _student(rw.gm, [node for node in pytree.tree_leaves(tree["output"]) if isinstance(node, Node)])
        _refuse_inseparable(student, foreign)
        rw.set_outputs(tree["output"], record.outputs, why="the student's own outputs")
        _erase(rw, record, student, foreign)
        for name in record.arguments:
            rw.remove_argument(name, why="only the losses read it")
        rw.leave(_MERGE, None)
        rw.notes.append(_proof(rw.gm, record))


def _foreign(gm: CapturedModule, record: StudentRecord) -> set[Node]:
    """Return what came with the teacher, and all that depends on it."""
    leaves = argument_leaves(gm)
    arguments = {gm.inputs[index].name for name in record.arguments for index in leaves[name]}
    found: set[Node] = set()
    for node in gm.graph.nodes:
        came = (node.op == "placeholder" and node.name in arguments) or (
            node.op == "get_attr" and str(node.target).split(".")[0] in record.roots
        )
        if node.op != "output" and (came or any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _student(gm: CapturedModule, outputs: Iterable[Node]) -> set[Node]:
    """Return the nodes that these outputs depend on."""
    found: set[Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _refuse_inseparable(student: set[Node], foreign: set[Node]) -> None:
    mixed = [node for node in foreign if node in student]
    if mixed:
        first = min(mixed, key=lambda node: len(node.all_input_nodes))
        raise PassError(
            describe(
                "the student cannot be taken out: it reads what came with the teacher",
                got=f"{first.name} is part of its outputs",
                source=source_line(first),
                try_="the graph before the pass that let the student read it",
            )
        )


def _erase(rw: Rewriter, record: StudentRecord, student: set[Node], foreign: set[Node]) -> None:
    """Erase what is no part of the student: what came with the teacher, and what nothing reads and was not there."""
    own = record.names()
    for node in reversed(list(rw.gm.graph.nodes)):
        if node._erased or node.op in ("placeholder", "output") or node in student or node.users:
            continue
        made = node.meta.get("fxopt")
        came = node in foreign or (made is not None and made.pass_name == _MERGE)
        if has_effect(node) and came:
            rw.discard(node, why="it came with the teacher")
        elif not has_effect(node) and (came or node.name not in own):
            rw.erase(node, why="only the losses read it")


def _proof(gm: CapturedModule, record: StudentRecord) -> str:
    """Return what the comparison with the recorded student shows, in words."""
    found = list(differences(record.nodes, listing(gm)))
    if not found:
        count = sum(len(nodes) for nodes in record.nodes.values())
        return f"the student is, node for node, the graph that went in ({count} nodes)"
    history = gm.records["passes"]
    since = history[len(history) - history[::-1].index(_MERGE) :]
    shown = ", ".join(f"{name} {what}" for what, name in found[:8]) + (", ..." if len(found) > 8 else "")
    return f"the student was changed since the teacher was merged, by {' and '.join(dict.fromkeys(since))}: {shown}"
