"""Views that fold a fixed axis into one whose size is not fixed, and take it out again.

    y = view(x, [length, batch * heads, places]);  z = view(transpose(y, 0, 1), [batch, heads, length, places])

``torch.nn.MultiheadAttention`` does so. The folded axis has no fixed size, but a fixed factor, which runs fastest in
it: the heads. Permutations and copies may lie between the two views; with any other reader, the factor stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.rules.base import axis_order
from fxopt.passes.prune.structure import Indices, Structure

__all__ = ["relate_folded", "sizes_of_fold"]

aten = torch.ops.aten
Groups = Callable[[Sequence[Any], Sequence[Any]], list[tuple[list[int], list[int]]]]
_PERMUTATIONS = {
    aten.permute.default,
    aten.transpose.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def relate_folded(node: torch.fx.Node, ins: list[int], outs: list[int], structure: Structure, matching: Groups) -> bool:
    """Relate the axes of a view that folds or unfolds a fixed factor; return whether it does.

    Args:
        node: The view.
        ins: Axes of its input.
        outs: Axes of its output that hold the same elements.
        structure: Where the relation goes.
        matching: Finds the groups of axes that hold the same elements, from the sizes before and after a view.
    """
    source = node.all_input_nodes[0]
    if node.target not in _VIEWS:
        return False
    folded = structure.notes.get((source, f"folded {ins[0]}"))
    if folded is not None and _unfolds(node, ins[0], len(folded), structure, matching):
        structure.move(folded, structure.axis(node, outs[1]))
        return True
    fixed = [structure.axis(source, dim) for dim in ins]
    left = [structure.axis(node, dim) for dim in outs]
    if len(ins) != 2 or len(outs) > 2 or fixed[0] is not None or fixed[1] is None or left[0] is not None:
        return False
    inner = left[1] if len(outs) > 1 else None
    if (len(outs) > 1 and inner is None) or structure.is_one(source, ins[0]):
        return False
    count = len(fixed[1]) // (1 if inner is None else len(inner))
    if count * (1 if inner is None else len(inner)) != len(fixed[1]) or count < 2:
        return False
    factor = structure.fresh(count)
    if inner is None:
        structure.move(fixed[1], factor)
    else:
        structure.split(fixed[1], [factor, inner])
    reached = _reached(node, outs[0], count, structure, matching)
    if reached is None:
        structure.pin(factor, "a reshape joins it with a size that is not fixed")
    else:
        structure.notes |= {(at, f"folded {dim}"): factor for at, dim in reached}
    return True


def sizes_of_fold(node: torch.fx.Node, sizes: list[Any], cut: Cut) -> list[Any]:
    """Return the sizes of a view, with -1 for an axis whose folded factor loses indices."""
    for dim in range(len(sizes)):
        factor: Indices | None = cut.structure.notes.get((node, f"folded {dim}"))
        if factor is not None and cut.loses(factor) and -1 not in sizes:
            sizes = [*sizes[:dim], -1, *sizes[dim + 1 :]]
    return sizes


def _reached(
    node: torch.fx.Node, dim: int, count: int, structure: Structure, matching: Groups
) -> list[tuple[torch.fx.Node, int]] | None:
    """Return the values up to the views that unfold an axis, with its number in each; None with any other reader."""
    found = [(node, dim)]
    for user in node.users:
        if user.target in _PERMUTATIONS:
            behind = _reached(user, axis_order(user, structure.rank(node)).index(dim), count, structure, matching)
            if behind is None:
                return None
            found += behind
        elif not _unfolds(user, dim, count, structure, matching):
            return None
    return found


def _unfolds(node: torch.fx.Node, dim: int, count: int, structure: Structure, matching: Groups) -> bool:
    """Return whether a view makes two axes of an axis of its input, the second one of them of a fixed size."""
    if node.target not in _VIEWS:
        return False
    before, after = structure.value(node.all_input_nodes[0]).shape, structure.value(node).shape
    outs = next((outs for ins, outs in matching(before, after) if ins == [dim]), [])
    return len(outs) == 2 and structure.axis(node, outs[0]) is None and _is_fixed(after[outs[1]], count)


def _is_fixed(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number
