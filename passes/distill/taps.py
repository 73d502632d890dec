"""Find the value of a graph that a text names, to compare it with one of another graph.

    "output", or the name of an output     what the graph returns
    "layer2", "encoder.layer.1@1"          the result of a module; its second call
    "relu_3"                               a node by its name
    "net.py:42"                            what that line computed; of its last run, where each run goes into the next

``module:`` and ``node:`` before a name say which is meant where both exist.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from fxopt.args import shape_text, source_line, source_location
from fxopt.attributes import made_of_attributes
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule

__all__ = ["find_tap"]

Node = torch.fx.Node
_LINE = re.compile(r"(?P<file>.+):(?P<line>\d+)")


def find_tap(gm: CapturedModule, where: str, *, of: str) -> Node:
    """Return the node whose value ``where`` names.

    Args:
        gm: The graph.
        where: See the top of this module.
        of: Whose graph it is, for messages: ``"student"``.

    Raises:
        PassError: nothing of the graph has this name, several values have it, or the value is no floating tensor.
    """
    found: dict[Node, str] = {}
    kind, _, name = where.rpartition(":")
    if kind in ("module", "node"):
        lookups = {kind: name}
    else:
        lookups = {"output": where, "line": where, "module": where, "node": where}
    for how, text in lookups.items():
        for node in _LOOKUPS[how](gm, text):
            found.setdefault(node, how)
        if found and how in ("output", "line"):
            break
    if not found:
        raise _unknown(gm, where, of)
    if len(found) > 1:
        raise _ambiguous(where, of, found)
    (node,) = found
    if not _is_floating(node):
        raise PassError(
            describe(
                f"the {of}'s {where!r} holds no numbers to compare",
                got=f"{node.name}: {shape_text(node.meta.get('val'), gm.symbol_names)}",
                wanted="a tensor of floating point numbers",
                source=source_line(node),
            )
        )
    return node


def _outputs(gm: CapturedModule, name: str) -> list[Node]:
    returned = [item for item in gm.graph.output_node().args[0] if item is not None]  # type: ignore[union-attr]  # outputs are one tuple
    named = [item for item, given in zip(returned, gm.output_names, strict=True) if given == name]
    chosen = named or (returned if name == "output" else [])
    return [item for item in chosen if isinstance(item, Node)]


def _module_results(gm: CapturedModule, path: str) -> list[Node]:
    """Return the values that each call of a module hands out; all calls, if the path names none."""
    calls: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        for call in _calls(node):
            if (
                call == path
                or (call.endswith("@0") and call[:-2] == path)
                or ("@" not in path and call.split("@")[0] == path)
            ):
                calls.setdefault(call, []).append(node)
    return [node for inside in calls.values() for node in _handed_out(inside)]


def _calls(node: Node) -> Iterator[str]:
    """Yield the module calls that a node belongs to: ``"layer@0"`` for the first call of ``layer``."""
    for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
        if path:
            yield f"{path}@{key.rpartition('@')[2] if '@' in key else 0}"


def _handed_out(inside: Sequence[Node]) -> list[Node]:
    """Return those of some nodes that others read; the last one, if there is none."""
    weights = made_of_attributes(inside[0].graph) if inside else set()
    inside = [node for node in inside if node not in weights]  # quantized or masked ones, which no input goes into
    members = set(inside)
    read = [
        node for node in inside if isinstance(node.meta.get("val"), torch.Tensor) and not members.issuperset(node.users)
    ]
    floating = [node for node in read if _is_floating(node)]
    return floating or read or list(inside[-1:])


def _line_results(gm: CapturedModule, text: str) -> list[Node]:
    wanted = _LINE.fullmatch(text)
    if wanted is None:
        return []
    file, line = wanted["file"].replace("\\", "/"), int(wanted["line"])
    inside = []
    for node in gm.graph.nodes:
        place = source_location(node)
        if node.op == "call_function" and place is not None and place[1] == line:
            path = place[0].replace("\\", "/")
            if path == file or path.endswith(f"/{file}"):
                inside.append(node)
    return _handed_out(inside)


def _nodes(gm: CapturedModule, name: str) -> list[Node]:
    return [node for node in gm.graph.nodes if node.name == name and isinstance(node.meta.get("val"), torch.Tensor)]


_LOOKUPS = {"output": _outputs, "line": _line_results, "module": _module_results, "node": _nodes}


def _is_floating(node: Node) -> bool:
    found = node.meta.get("val")
    return isinstance(found, torch.Tensor) and found.is_floating_point()


def _known(gm: CapturedModule) -> Iterable[str]:
    names = dict.fromkeys(gm.output_names)
    names |= dict.fromkeys(call.removesuffix("@0") for node in gm.graph.nodes for call in _calls(node))
    return [*names, *(node.name for node in gm.graph.nodes if _is_floating(node) and node.op == "call_function")]


def _unknown(gm: CapturedModule, where: str, of: str) -> PassError:
    known = list(dict.fromkeys(_known(gm)))
    close = difflib.get_close_matches(where, known, n=3, cutoff=0.5)
    return PassError(
        describe(
            f"the {of} has no value {where!r}",
            wanted=", ".join(known[:12]) + (", ..." if len(known) > 12 else ""),
            try_=" or ".join(close) if close else "a module, a node, or a line such as net.py:42",
        )
    )


def _ambiguous(where: str, of: str, found: dict[Node, str]) -> PassError:
    listed = list(found)[:6]
    calls = dict.fromkeys(call for node in listed for call in _calls(node) if call.split("@")[0] == where)
    if len(calls) > 1:
        choices = list(calls)
    elif len(set(found.values())) > 1:
        choices = [f"{how}:{where}" for how in dict.fromkeys(found.values())]
    else:
        choices = [f"node:{node.name}" for node in listed]
    return PassError(
        describe(
            f"the {of}'s {where!r} is several values",
            got="; ".join(f"{node.name} ({source_line(node)})" for node in listed),
            try_=" or ".join(choices),
        )
    )
