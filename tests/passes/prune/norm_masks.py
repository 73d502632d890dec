"""Prune nets whose norms take statistics over channels: masked norms are put in first, as pruning does."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

import fxopt
from fxopt import Contract, Pass, Rewriter
from fxopt.attributes import get_path
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM
from fxopt.passes.prune.groups import Family, Group, families_of
from fxopt.passes.prune.masked_norms import mask_norm
from fxopt.passes.prune.structure import Structure
from tests.passes.prune.nets import Shrunk, captured, every_other, prove_in_ort, shrink, zero_groups

Prefer = Literal["longest", "heads"]


@dataclasses.dataclass(frozen=True)
class MaskNorms(Pass):
    """Let norms leave channels out: ``masks`` is bool[C] by the name of the call."""

    name: ClassVar[str] = "mask-norms"
    contract: ClassVar[Contract] = Contract.lossy("sqnr_db", -1000.0)
    masks: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def run(self, rw: Rewriter) -> None:
        """Put the masked operators in."""
        for name, kept in self.masks.items():
            mask_norm(rw, name, kept)


def masks_of(structure: Structure, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Return the masks of all norms that normalize over indices of groups, by the name of the call."""
    gone = np.zeros(structure.count, bool)
    for group in groups:
        gone[group.indices] = True
    found = {}
    for end in structure.ends:
        if end.normalizes and gone[end.indices].any():
            dim = 1 if "group_norm" in str(end.node.target) else -1
            found[end.node.name] = torch.from_numpy(~gone[structure.axis(end.node, dim)])
    return found


def shrunk_with_norms(
    model: nn.Module,
    *inputs: Any,
    dynamic: Any = None,
    prefer: Prefer = "longest",
    choose: Callable[[Sequence[Family]], list[Group]] = every_other,
    onnx: bool = False,
    exactly: bool = True,
) -> Shrunk:
    """As :func:`tests.passes.prune.nets.shrunk`, with norms that leave out what is set to 0.

    With ``exactly``, nothing else may go, such as a unit that happens to yield 0 for all that it can be given.
    """
    gm = captured(model, *inputs, dynamic=dynamic)
    structure = Structure(gm)
    families = families_of(structure, prefer=prefer)
    groups = choose(families)
    assert groups, "there is nothing to prune"
    zero_groups(gm, groups)
    masks = masks_of(structure, groups)
    masked = MaskNorms(masks)(gm).gm if masks else gm
    found = shrink(masked, *inputs, prefer=prefer)
    assert_gone(found, gm, groups, exactly=exactly)
    assert not masked_norms(found.gm), "a norm is left masked"
    if onnx:
        prove_in_ort(found.gm)
    found.families = families
    return found


def assert_gone(found: Shrunk, gm: fxopt.CapturedModule, groups: Sequence[Group], *, exactly: bool) -> None:
    """Check that each parameter has lost all that belongs to the groups, and nothing else if it is to be exact."""
    gone: dict[tuple[int, int], set[int]] = {}
    for part in (part for group in groups for part in group.parts):
        gone.setdefault((id(get_path(gm, part.name)), part.dim), set()).update(part.places)
    for name, parameter in gm.named_parameters():
        want = [size - len(gone.get((id(parameter), dim), ())) for dim, size in enumerate(parameter.shape)]
        got = list(found.shape(name))
        fits = got == want if exactly else all(size <= most for size, most in zip(got, want, strict=True))
        assert fits, f"{name} is {got}; wanted {want}"


def masked_norms(gm: fxopt.CapturedModule) -> list[str]:
    """Return the names of the masked norms of a graph."""
    return [node.name for node in gm.graph.nodes if node.target in (MASKED_LAYER_NORM, MASKED_GROUP_NORM)]
