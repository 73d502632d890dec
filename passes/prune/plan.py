"""Make plans of masks from groups of channels, and find out which groups can be removed at all."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from fxopt.args import source_line
from fxopt.attributes import get_path
from fxopt.errors import PassError, PreconditionError, describe
from fxopt.graph_module import CapturedModule
from fxopt.normalization_ops import MASKED_GROUP_NORM
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.ends import MaskedEnd
from fxopt.passes.prune.groups import Family, Group, families_of
from fxopt.passes.prune.insert_masks import InsertMasks
from fxopt.passes.prune.layers import layer_axes
from fxopt.passes.prune.masks import MaskPlan, kept_slices
from fxopt.passes.prune.removal import Removal
from fxopt.passes.prune.shrinking import remaining, removal_of
from fxopt.passes.prune.structure import Structure
from fxopt.quantized_ops import quantizer_in
from fxopt.rewriter import Rewriter

__all__ = ["Prunable", "channel_plan", "check_not_quantized", "masked_last", "names_that_fit", "prunable"]

_GROUP_NORMS = (torch.ops.aten.group_norm.default, MASKED_GROUP_NORM)


@dataclasses.dataclass(frozen=True)
class Prunable:
    """What of a graph can be pruned.

    Attributes:
        structure: Its index maps.
        families: Groups that go if they are masked.
        refused: Families that do not, and layers whose outputs cannot go at all, with the reason.
    """

    structure: Structure
    families: tuple[Family, ...]
    refused: Mapping[str, str]


def prunable(gm: CapturedModule, *, heads: bool = False, skip: Sequence[str] = ()) -> Prunable:
    """Return what of a graph can be pruned; found by masking one group of each family and looking what would go.

    Args:
        gm: The graph.
        heads: Whether heads of attention are asked for, and nothing else.
        skip: Patterns of names of parameters; a family with such a parameter is left out.

    Raises:
        PassError: a pattern fits no parameter.
    """
    left_out = {id(get_path(gm, name)) for name in names_that_fit(gm, skip)}
    structure = Structure(gm)
    every = families_of(structure, prefer="heads" if heads else "longest")
    found = [
        family
        for family in every
        if len(family.groups) > 1
        and _parameters(gm, family)
        and not any(id(get_path(gm, name)) in left_out for name, _ in family.axes)
    ]
    refused = _refused(gm, structure, found)
    families = tuple(f for f in found if f.name not in refused)
    if heads:
        return Prunable(
            structure, families, refused if every else {"heads": "the graph computes no attention by heads"}
        )
    return Prunable(structure, families, refused | _layers_that_stay(gm, structure, every))


def names_that_fit(gm: CapturedModule, patterns: Iterable[str]) -> set[str]:
    """Return the names of all parameters that one of the patterns fits, tied ones under each of their names.

    Raises:
        PassError: a pattern fits none.
    """
    named = list(gm.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for pattern in patterns:
        fitting = {id(parameter) for name, parameter in named if fnmatch.fnmatch(name, pattern)}
        if not fitting:
            raise PassError(
                describe(
                    f"skip names {pattern!r}, and no parameter fits it",
                    wanted=", ".join(name for name, _ in named[:8]),
                    try_="a pattern of names, such as 'layer1.*'",
                )
            )
        found |= fitting
    return {name for name, parameter in named if id(parameter) in found}


def channel_plan(
    gm: CapturedModule, structure: Structure, groups: Iterable[Group], notes: Mapping[str, str] | None = None
) -> MaskPlan:
    """Return the plan that masks all weights of the groups, and leaves them out of layer and group norms."""
    groups = list(groups)
    first = {id(parameter): name for name, parameter in gm.named_parameters() if parameter.is_floating_point()}
    masks: dict[str, torch.Tensor] = {}
    for group in groups:
        for part in group.parts:
            tensor = get_path(gm, part.name)
            if (name := first.get(id(tensor))) is not None:
                if name not in masks:
                    masks[name] = torch.ones(tensor.shape, dtype=torch.bool)
                masks[name].index_fill_(part.dim, torch.tensor(part.places), False)
    gone = np.zeros(structure.count, bool)
    for group in groups:
        gone[group.indices] = True
    channels = {}
    for end in structure.ends:
        if (end.normalizes or isinstance(end, MaskedEnd)) and end.node.graph is structure.module.graph:
            axis = structure.axis(end.node, 1 if end.node.target in _GROUP_NORMS else -1)
            if axis is not None and gone[axis].any():
                channels[end.node.name] = torch.from_numpy(~gone[axis])
    return MaskPlan(masks, channels, notes)


def masked_last(
    gm: CapturedModule, families: Iterable[Family], scores: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the scores of groups, f32[groups] by family, with -inf for those that are masked already."""
    held = MaskPlan.of(gm)
    first = {id(parameter): name for name, parameter in gm.named_parameters()}
    found = dict(scores)
    for family in families:
        if family.name not in scores:
            continue
        gone = torch.ones(len(family.groups), dtype=torch.bool)
        for at, (name, dim) in enumerate(family.axes):
            canonical = first.get(id(get_path(gm, name)))
            if canonical is None:
                continue
            if canonical not in held:
                gone[:] = False
                break
            rows = ~kept_slices(held[canonical], dim)
            gone &= rows[torch.tensor([group.parts[at].places for group in family.groups])].all(dim=1)
        found[family.name] = scores[family.name].masked_fill(gone, -torch.inf)
    return found


def check_not_quantized(gm: CapturedModule) -> None:
    """Check that a graph has no quantizers.

    Raises:
        PreconditionError: it has.
    """
    quantizer = quantizer_in(gm)
    if quantizer is not None:
        raise PreconditionError(
            describe(
                "prune works on a graph without quantizers",
                got=f"{quantizer.name}, a call of {quantizer.target}",
                source=source_line(quantizer),
                try_="prune first, then quantize",
            )
        )


def _layers_that_stay(gm: CapturedModule, structure: Structure, families: Sequence[Family]) -> dict[str, str]:
    """Return the layers none of whose outputs can go, and why, by name of the weight."""
    offered = {axis for family in families for axis in family.axes}
    wanted = {name: outputs for name, (_, outputs) in layer_axes(gm).items() if (name, outputs) not in offered}
    removal = Removal(structure, Constants(structure))
    found: dict[str, str] = {}
    for name, outputs in wanted.items():
        axes = structure.attributes.get(name)  # none where a tied weight is read under another name
        axis = None if axes is None else axes[outputs]
        if axis is not None and (reasons := removal.reasons(axis)):
            found[name] = f"its outputs stay: {reasons[0][1]}"
    return found


def _parameters(gm: CapturedModule, family: Family) -> bool:
    return any(isinstance(get_path(gm, name), torch.nn.Parameter) for name, _ in family.axes)


def _refused(gm: CapturedModule, structure: Structure, families: Sequence[Family]) -> dict[str, str]:
    """Return the families whose groups would stay though they are masked, and why."""
    first = {family.name: family.groups[0] for family in families}
    rw = Rewriter(gm.clone(), "prune")
    InsertMasks(channel_plan(gm, structure, first.values())).run(rw)
    left = remaining(removal_of(rw.gm), first.values())
    return {name: left[group] for name, group in first.items() if group in left}
