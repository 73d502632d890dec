"""Remove from a graph whatever can go; what ``shrink-masked`` does, without the proof."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fxopt.passes.prune.bake_masks import drop_full_masks
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.groups import Group
from fxopt.passes.prune.masks import kept_slices, masked_parts
from fxopt.passes.prune.removal import Removal
from fxopt.passes.prune.structure import Indices, Structure
from fxopt.resizing import Resizing
from fxopt.rewriter import Rewriter

__all__ = ["remaining", "removal_of", "shrink"]


def removal_of(gm: torch.fx.GraphModule) -> Removal:
    """Return the most that can go without a change of what the graph computes."""
    structure = Structure(gm)
    return Removal(structure, Constants(structure))


def shrink(rw: Rewriter, *, to_run: bool = False) -> Removal:
    """Remove what can go, record masked rows and columns that stay with the reason, and return what went.

    Args:
        rw: Changes the graph.
        to_run: Make a graph that can be run and no more, in a fraction of the time; masks that are full stay in it.
    """
    removal = removal_of(rw.gm)
    for weight, reason in _masked_in_vain(rw, removal):
        rw.skip(weight, reason)
    why = "channels of it, or that it reads, have no effect"
    with torch.no_grad(), Resizing(rw, why, values=not to_run) as resizing:
        Cut(removal, resizing).run()
    if not to_run:
        drop_full_masks(rw)
    return removal


def remaining(removal: Removal, groups: Iterable[Group]) -> dict[Group, str]:
    """Return the groups of which something stays, with the reason."""
    axes = removal.structure.attributes
    found: dict[Group, str] = {}
    for group in groups:
        for part in group.parts:
            axis = axes[part.name][part.dim]
            wanted = None if axis is None else axis[list(part.places)]
            if wanted is not None and not removal.removed(wanted).all():
                found[group] = _first_reason(removal, wanted)
                break
    return found


def _first_reason(removal: Removal, indices: Indices) -> str:
    reasons = removal.reasons(indices)
    return reasons[0][1] if reasons else "what it is computed together with stays"


def _masked_in_vain(rw: Rewriter, removal: Removal) -> Iterator[tuple[torch.fx.Node, str]]:
    """Yield masked weights with slices that are masked as a whole and yet stay, and why."""
    for node in rw.gm.graph.nodes:
        parts = masked_parts(node)
        if parts is None:
            continue
        mask = rw.tensor(parts[1])
        for dim, axis in enumerate(removal.structure.axes(parts[0])):
            if axis is None or mask.ndim < 2:
                continue
            slices = ~kept_slices(mask, dim).cpu().numpy()
            stays = axis[slices][~removal.removed(axis[slices])]
            if len(stays):
                word = ("rows", "columns")[dim] if dim < 2 else f"slices of axis {dim}"
                yield parts[0], f"{len(stays)} of {slices.sum()} masked {word} stay: {_first_reason(removal, stays)}"
