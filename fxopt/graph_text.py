"""A canonical text of a graph, for tests, reports and terminals.

    %x : f32[batch, 3]
    %fc.weight = attribute f32[10, 3]
    %0 : f32[batch, 10] = aten.linear(%x, %fc.weight, None)
    return %0

Values are numbered, so that a text does not depend on how nodes happen to be called; arguments at their default are
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.args import argument_positions, shape_text
from fxopt.graph_module import CapturedModule

__all__ = ["graph_text"]


def graph_text(gm: torch.fx.GraphModule) -> str:
    """Return the canonical text of a graph and of the graphs inside it."""
    names = gm.symbol_names if isinstance(gm, CapturedModule) else {}
    sections = ["\n".join(_lines(gm, names))]
    for path, module in gm.named_modules():
        if path and isinstance(module, torch.fx.GraphModule):
            sections.append(f"{path}:\n" + "\n".join("  " + line for line in _lines(module, names)))
    return "\n".join(sections)


def _lines(gm: torch.fx.GraphModule, names: dict[str, str]) -> Iterator[str]:
    labels: dict[torch.fx.Node, str] = {}
    count = 0
    for node in gm.graph.nodes:
        kind = shape_text(node.meta["val"], names) if node.meta.get("val") is not None else "?"
        if node.op == "placeholder":
            labels[node] = f"%{node.target}"
            yield f"{labels[node]} : {kind}"
        elif node.op == "get_attr":
            labels[node] = f"%{node.target}"
            yield f"{labels[node]} = attribute {kind}" if kind != "?" else f"{labels[node]} = graph"
        elif node.op == "output":
            yield f"return {', '.join(_text(item, labels) for item in node.args[0])}"
        else:
            labels[node] = f"%{count}"
            count += 1
            yield f"{labels[node]} : {kind} = {_target(node.target)}({', '.join(_arguments(node, labels))})"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        namespace, name = target._schema.name.split("::")
        return f"{namespace}.{name}"
    return str(getattr(target, "__name__", target))


def _arguments(node: torch.fx.Node, labels: dict[torch.fx.Node, str]) -> list[str]:
    positional, keywords = list(node.args), dict(node.kwargs)
    if isinstance(node.target, OpOverload):
        table = argument_positions(node.target)
        defaults = [default for _, default, has_default in table.values() if has_default]
        required = len(table) - len(defaults)
        ordered = list(table.values())
        while len(positional) > required and _is_default(positional[-1], ordered[len(positional) - 1]):
            positional.pop()
        keywords = {key: item for key, item in keywords.items() if not _is_default(item, table[key])}
    return [_text(item, labels) for item in positional] + [
        f"{key}={_text(item, labels)}" for key, item in keywords.items()
    ]


def _is_default(item: Any, entry: tuple[Any, Any, bool]) -> bool:
    return entry[2] and type(item) is type(entry[1]) and item == entry[1]


def _text(item: Any, labels: dict[torch.fx.Node, str]) -> str:
    if isinstance(item, torch.fx.Node):
        return labels[item]
    if isinstance(item, list | tuple):
        return f"[{', '.join(_text(part, labels) for part in item)}]"
    if isinstance(item, torch.dtype):
        return str(item).removeprefix("torch.")
    return str(item)
