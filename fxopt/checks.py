"""What holds for every graph, before and after every pass: one table, all violations reported."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable

import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.attributes import hasattr_path
from fxopt.effects import is_in_place
from fxopt.errors import InvariantError, describe
from fxopt.graph_module import CapturedModule, graph_modules

__all__ = ["INVARIANTS", "fingerprint", "verify"]

_SYMBOLIC_MODULES = ("_operator", "math", "torch", "builtins", "torch.fx.experimental.symbolic_shapes")


def _has_value(node: torch.fx.Node) -> str | None:
    return None if node.op in ("output", "get_attr") or "val" in node.meta else "has no meta['val']"


def _calls_an_operator(node: torch.fx.Node) -> str | None:
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    if node.op != "call_function":
        return f"is a {node.op}, where a graph has operator calls only"
    if isinstance(node.target, OpOverload | HigherOrderOperator) or node.target is operator.getitem:
        return None
    if getattr(node.target, "__module__", "") in _SYMBOLIC_MODULES:
        return None
    return f"calls {node.target}, which is not an operator"


def _is_functional(node: torch.fx.Node) -> str | None:
    return f"writes in place ({node.target})" if node.op == "call_function" and is_in_place(node.target) else None


def _reads_what_exists(node: torch.fx.Node) -> str | None:
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    return (
        None
        if hasattr_path(node.graph.owning_module, str(node.target))
        else f"reads {node.target!r}, which does not exist"
    )


INVARIANTS: dict[str, Callable[[torch.fx.Node], str | None]] = {
    "values are known": _has_value,
    "operators only": _calls_an_operator,
    "no in-place op": _is_functional,
    "attributes exist": _reads_what_exists,
}


def violations(gm: torch.fx.GraphModule) -> list[str]:
    """Return every violation in the graph and the graphs inside it, each as ``node: what``."""
    found: list[str] = []
    for module in graph_modules(gm):
        seen: set[torch.fx.Node] = set()
        names: set[str] = set()
        outputs = 0
        for node in module.graph.nodes:
            found += [f"{node.name}: {problem}" for rule in INVARIANTS.values() if (problem := rule(node))]
            found += [
                f"{node.name}: reads {n.name} before it is computed" for n in node.all_input_nodes if n not in seen
            ]
            if node.name in names:
                found.append(f"{node.name}: two nodes have this name")
            seen.add(node)
            names.add(node.name)
            outputs += node.op == "output"
        if outputs != 1:
            found.append(f"the graph has {outputs} output nodes")
    return found


def verify(gm: torch.fx.GraphModule, *, after: str = "") -> None:
    """Check every invariant.

    Args:
        gm: The graph.
        after: Name of the pass that made it, for the message.

    Raises:
        InvariantError: naming all violations (the first 20 of many).
    """
    found = violations(gm)
    found += _interface_violations(gm) if isinstance(gm, CapturedModule) else []
    if found:
        rest = f"\n... and {len(found) - 20} more" if len(found) > 20 else ""
        raise InvariantError(
            describe(f"malformed graph{f' after {after}' if after else ''}", found="\n".join(found[:20]) + rest)
        )


def _interface_violations(gm: CapturedModule) -> list[str]:
    placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    wanted = [spec.name for spec in gm.inputs]
    found = [] if placeholders == wanted else [f"the inputs are {placeholders}, and were {wanted}"]
    returned = [item for item in gm.graph.output_node().args[0] if item is not None]  # type: ignore[union-attr]  # outputs are one tuple
    if len(returned) != len(gm.output_names):
        found.append(f"the graph returns {len(returned)} values, and returned {len(gm.output_names)}")
    return found


def fingerprint(gm: torch.fx.GraphModule) -> str:
    """Return a digest that changes when any node, argument or tensor does: the check on a pass's own report.

    Tensors count by identity and version, so that the cost does not grow with their size.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in gm.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                digest.update(
                    f"{name}|{node.name}|{node.op}|{node.target}|{node.args}|{node.kwargs}|{node.meta.get('modes')}\n".encode()
                )
    for table in (gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False)):
        for name, tensor in table:
            digest.update(f"{name}|{id(tensor)}|{tensor._version}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
    return digest.hexdigest()
