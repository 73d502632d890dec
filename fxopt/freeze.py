"""Specialize a graph to the mode it is in."""

from __future__ import annotations

from fxopt.effects import has_effect, is_random
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.ops import SELECT_MODE, UPDATE_BUFFER
from fxopt.rewriter import Rewriter

__all__ = ["freeze_mode", "frozen"]


def frozen(gm: CapturedModule) -> CapturedModule:
    """Return a copy that is valid in the current mode only, without what belongs to the other one."""
    rw = Rewriter(gm.clone(), "freeze-mode")
    freeze_mode(rw)
    rw.finish()
    return rw.gm


def freeze_mode(rw: Rewriter) -> None:
    """Make the current mode the only one: selections are taken, inactive updates and what only they need are erased."""
    gm = rw.gm
    mode = "train" if gm.training else "eval"
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            rw.fix_mode(node, why=f"the graph is fixed to {mode} mode")
    for node in rw.calls(SELECT_MODE):
        train, evaluation, training = node.args
        rw.replace_value(node, train if training else evaluation, why=f"the graph is fixed to {mode} mode")  # type: ignore[arg-type]  # both arguments are nodes
    for node in rw.calls(UPDATE_BUFFER):
        if not node.args[2]:
            rw.discard(node, why=f"inactive in {mode} mode")
    for module in graph_modules(gm):
        for node in reversed(module.graph.nodes):
            if (
                node.op == "call_function"
                and not node.users
                and not has_effect(node)
                and not (gm.training and is_random(node))
            ):
                rw.erase(node, why=f"nothing reads it in {mode} mode")
    if gm.modes == "both":
        gm.modes, gm.modes_reason = mode, "it was frozen to that mode"  # type: ignore[assignment]  # one of the three texts, by its origin
