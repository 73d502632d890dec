"""Let the teacher read what the student computes already, and stop gradients where values go into the teacher.

    before:  student: p = div(image, 255); ...     teacher: q = div(image, 255);  y = conv2d(q, ...)
    after:   student: p = div(image, 255); ...     d = detach(p);  y = conv2d(d, ...)

Only calls that depend on an input are shared. A buffer of the student that equals one of the teacher's stays the
student's own: it may be changed from outside, as a pruning mask is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fxopt.args import value
from fxopt.effects import has_effect
from fxopt.passes.cleanup.memory import Memory, same_layout
from fxopt.passes.cleanup.merge_common_subexpressions import equal_values
from fxopt.rewriter import Rewriter

__all__ = ["erase_unread", "share_work", "stop_gradients"]

Node = torch.fx.Node
aten = torch.ops.aten


def share_work(rw: Rewriter, teacher: Iterable[Node], *, why: str) -> Mapping[Node, Node]:
    """Replace calls of the teacher by equal ones of the student; return what each became."""
    first, _ = equal_values(rw.gm, Memory(rw.gm))
    own = list(teacher)
    theirs = set(own)
    from_inputs = _from_inputs(rw.gm.graph)
    replaced = {}
    for node in own:
        twin = first[node]
        alike = twin not in theirs and twin in from_inputs and same_layout(node.meta.get("val"), twin.meta.get("val"))
        if node.op == "call_function" and twin is not node and alike:
            replaced[node] = twin
            rw.replace_value(node, twin, why=f"{why}: equals {twin.name}")
    return replaced


def _from_inputs(graph: torch.fx.Graph) -> set[Node]:
    """Return the calls that depend on an input."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and any(n.op == "placeholder" or n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def stop_gradients(rw: Rewriter, teacher: Iterable[Node], *, why: str) -> None:
    """Detach every value that the nodes of the teacher read from outside of it."""
    theirs = {node for node in teacher if not node._erased}
    detached: dict[Node, Node] = {}
    for node in [node for node in rw.gm.graph.nodes if node in theirs]:
        for source in node.all_input_nodes:
            if source in theirs or source.op == "get_attr" or not _has_gradients(source):
                continue
            if source not in detached:
                detached[source] = rw.insert_call(
                    aten.detach.default, (source,), before=node, why=why, sources=[source]
                )
            rw.replace_argument(node, source, detached[source], why=why)


def _has_gradients(node: Node) -> bool:
    found = value(node)
    return isinstance(found, torch.Tensor) and (found.is_floating_point() or found.is_complex())


def erase_unread(rw: Rewriter, nodes: Iterable[Node], *, why: str, effects: bool = False) -> None:
    """Erase those of the nodes that nothing reads; those with an effect only if ``effects``."""
    chosen = {node for node in nodes if not node._erased}
    for node in [node for node in reversed(rw.gm.graph.nodes) if node in chosen]:
        if node._erased or node.users or node.op in ("placeholder", "output"):
            continue
        if not has_effect(node):
            rw.erase(node, why=why)
        elif effects:
            rw.discard(node, why=why)
