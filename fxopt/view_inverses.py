"""How a write into a view reaches the tensor behind it: for each view op, the op that puts the value back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fxopt.args import arg, source_line

if TYPE_CHECKING:
    from fxopt.functionalize import Functionalizer

__all__ = ["PART_INVERSES", "VIEW_INVERSES"]

aten = torch.ops.aten
Inverse = Callable[["Functionalizer", torch.fx.Node, torch.fx.Node, torch.fx.Node, torch.fx.Node], torch.fx.Node]
PartInverse = Callable[["Functionalizer", torch.fx.Node, int, torch.fx.Node, torch.fx.Node], torch.fx.Node]


def _inverse_slice(
    f: Functionalizer, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    start, end = (torch.fx.map_arg(arg(view, name), f.current) for name in ("start", "end"))
    return f.call(
        at, aten.slice_scatter.default, (f.current(parent), value, arg(view, "dim"), start, end, arg(view, "step"))
    )


def _inverse_narrow(
    f: Functionalizer, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    start, length = arg(view, "start"), arg(view, "length")
    if not isinstance(start, int) or not isinstance(length, int):
        raise f.refusal(at, "it writes into a narrow() of dynamic size", view=source_line(view))
    end = start + length if start + length != 0 else None
    return f.call(at, aten.slice_scatter.default, (f.current(parent), value, arg(view, "dim"), start, end))


def _inverse_select(
    f: Functionalizer, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    index = torch.fx.map_arg(arg(view, "index"), f.current)
    return f.call(at, aten.select_scatter.default, (f.current(parent), value, arg(view, "dim"), index))


def _inverse_diagonal(
    f: Functionalizer, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    places = tuple(arg(view, name) for name in ("offset", "dim1", "dim2"))
    return f.call(at, aten.diagonal_scatter.default, (f.current(parent), value, *places))


def _inverse_transpose(
    f: Functionalizer, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    return f.call(at, view.target, (value, *view.args[1:]), view.kwargs)


def _inverse_permute(
    f: Functionalizer, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    rank = parent.meta["val"].ndim
    dims = [d % rank for d in arg(view, "dims")]
    return f.call(at, aten.permute.default, (value, [dims.index(d) for d in range(rank)]))


def _inverse_movedim(
    f: Functionalizer, view: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    return f.call(at, view.target, (value, arg(view, "destination"), arg(view, "source")))


def _part_of_split(
    f: Functionalizer, parts: torch.fx.Node, index: int, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    source = arg(parts, "self")
    axis = arg(parts, "dim")
    sizes = [part.shape[axis] for part in parts.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        raise f.refusal(at, f"it writes into a part of {parts.target} of dynamic size", view=source_line(parts))
    start = sum(sizes[:index])
    base = f.current(source)
    return f.call(at, aten.slice_scatter.default, (base, value, axis, start, start + sizes[index]))


def _part_of_unbind(
    f: Functionalizer, parts: torch.fx.Node, index: int, value: torch.fx.Node, at: torch.fx.Node
) -> torch.fx.Node:
    source = arg(parts, "self")
    return f.call(at, aten.select_scatter.default, (f.current(source), value, arg(parts, "dim"), index))


VIEW_INVERSES: dict[str, Inverse] = {
    "aten::slice": _inverse_slice,
    "aten::narrow": _inverse_narrow,
    "aten::select": _inverse_select,
    "aten::diagonal": _inverse_diagonal,
    "aten::transpose": _inverse_transpose,
    "aten::swapaxes": _inverse_transpose,
    "aten::swapdims": _inverse_transpose,
    "aten::t": _inverse_transpose,
    "aten::numpy_T": _inverse_transpose,
    "aten::mT": _inverse_transpose,
    "aten::permute": _inverse_permute,
    "aten::movedim": _inverse_movedim,
}
PART_INVERSES: dict[str, PartInverse] = {
    "aten::split": _part_of_split,
    "aten::split_with_sizes": _part_of_split,
    "aten::chunk": _part_of_split,
    "aten::tensor_split": _part_of_split,
    "aten::unbind": _part_of_unbind,
}
