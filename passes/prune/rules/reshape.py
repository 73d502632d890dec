"""Views: the same elements in the same order, in other axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from fxopt.args import arg, tensor_arg
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.rules.folded import relate_folded, sizes_of_fold
from fxopt.passes.prune.structure import Indices, Structure

__all__ = ["matching_axes", "sizes_after"]

aten = torch.ops.aten
_SIZES: dict[Any, str] = {
    aten.view.default: "size", aten.reshape.default: "shape", aten._unsafe_view.default: "size",
    aten.unflatten.int: "sizes",
}  # fmt: skip
_LIKE_ANOTHER = (aten.view_as.default, aten.reshape_as.default)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@handles(
    *_SIZES, *_LIKE_ANOTHER, *_SQUEEZES, aten.flatten.using_ints, aten.unsqueeze.default, aten.ravel.default,
    aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default,
)  # fmt: skip
class _Reshape(Rule):
    """Axes that hold the same elements on both sides are related as factors of one flat axis."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source = tensor_arg(node, "self")
        before, after = structure.value(source).shape, structure.value(node).shape
        if 0 in (*before, *after):
            structure.pin_all(node, "it is empty")
            return
        for ins, outs in matching_axes(before, after):
            if not relate_folded(node, ins, outs, structure, matching_axes):
                self._group(
                    [structure.axis(source, dim) for dim in ins], [structure.axis(node, dim) for dim in outs], structure
                )
        if node.target in _LIKE_ANOTHER:
            for axis, to in zip(structure.axes(tensor_arg(node, "other")), structure.axes(node), strict=True):
                structure.same(axis, to)

    @staticmethod
    def _group(ins: list[Indices | None], outs: list[Indices | None], structure: Structure) -> None:
        fixed_ins, fixed_outs = [a for a in ins if a is not None], [a for a in outs if a is not None]
        if len(fixed_ins) < len(ins) or len(fixed_outs) < len(outs):
            for axis in (*fixed_ins, *fixed_outs):
                structure.pin(axis, "a reshape joins it with a size that is not fixed")
        elif len(ins) == 1 and len(outs) == 1:
            structure.move(fixed_ins[0], fixed_outs[0])
        elif len(ins) == 1:
            structure.split(fixed_ins[0], fixed_outs)
        elif len(outs) == 1:
            structure.merge(fixed_ins, fixed_outs[0])
        else:
            flat = structure.fresh(math.prod(len(axis) for axis in fixed_ins))
            structure.merge(fixed_ins, flat)
            structure.split(flat, fixed_outs)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        source = tensor_arg(node, "self")
        if node.target in _SIZES:
            name = _SIZES[node.target]
            first = arg(node, "dim") % cut.structure.rank(source) if node.target is aten.unflatten.int else 0
            sizes = sizes_of_fold(node, sizes_after(node, arg(node, name), first, cut), cut)
            if node.target in _VIEWS and cut.leaves_one:  # an axis of size 1 lets others share memory in other ways
                cut.set_call(node, aten.reshape.default, (source, sizes))
            else:
                cut.set_arg(node, name, sizes)
        elif node.target in _SQUEEZES:
            _cut_squeeze(node, source, cut)


def _cut_squeeze(node: torch.fx.Node, source: torch.fx.Node, cut: Cut) -> None:
    """Name the axes that were squeezed, if one of those that were not is of size 1 by now."""
    sizes = cut.structure.value(source).shape
    asked = list(range(len(sizes)))
    if node.target is not aten.squeeze.default:
        dims = arg(node, "dim")
        asked = [dim % len(sizes) for dim in (dims if isinstance(dims, list | tuple) else [dims])]
    if any(sizes[dim] != 1 and cut.size(source, dim) == 1 for dim in asked if isinstance(sizes[dim], int)):
        gone = [dim for dim in asked if isinstance(sizes[dim], int) and sizes[dim] == 1]
        cut.set_call(node, *((aten.squeeze.dims, (source, gone)) if gone else (aten.alias.default, (source,))))


def sizes_after(node: torch.fx.Node, sizes: Sequence[Any], first: int, cut: Cut) -> list[Any]:
    """Return sizes as they are after the cut; what is computed, or left open by -1, stays so.

    Args:
        node: What has these sizes.
        sizes: Of its axes, as it was called.
        first: Number of the axis that has the first of them.
        cut: What goes.
    """
    return [
        cut.size(node, first + place) if isinstance(size, int) and size != -1 else size
        for place, size in enumerate(sizes)
    ]


def matching_axes(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of axes that hold the same number of elements on both sides of a reshape.

    Axes of size 1 belong to no group, and no size may be 0. A size that is not fixed is a group with itself where it
    is on both sides, and else part of a larger one.
    """
    stand_ins: dict[Any, int] = {}
    left, right = (
        [(dim, number) for dim, size in enumerate(sizes) if (number := _as_number(size, stand_ins)) != 1]
        for sizes in (before, after)
    )
    found: list[tuple[list[int], list[int]]] = []
    while left or right:
        ins: list[int] = []
        outs: list[int] = []
        counts = [1, 1]
        while (left or right) and (counts[0] != counts[1] or not ins or not outs):
            side = 0 if left and (counts[0] <= counts[1] or not right) else 1
            dim, number = (left, right)[side].pop(0)
            (ins, outs)[side].append(dim)
            counts[side] *= number
        found.append((ins, outs))
    return found


def _as_number(size: Any, stand_ins: dict[Any, int]) -> int:
    """Return a size; with a prime number for each symbol, so that products are equal only where they always are."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        stand_ins.setdefault(symbol, int(sympy.nextprime(1000000 + 1000 * len(stand_ins))))
    return max(int(expression.subs(stand_ins)), 2)
