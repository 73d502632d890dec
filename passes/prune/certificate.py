"""Prove that a shrunk graph computes what the masked one does: on the masks at hand, and on random ones.

A random mask set prunes another part of every layer. Each time, the shrunk graph has to give what the masked graph
gives on random inputs, up to the order of additions.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxopt.eager_control_flow import EagerInterpreter
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.prune.groups import Group
from fxopt.passes.prune.insert_masks import InsertMasks
from fxopt.passes.prune.plan import Prunable, channel_plan, prunable
from fxopt.passes.prune.shrinking import remaining, shrink
from fxopt.rewriter import Rewriter

__all__ = ["TOLERANCE", "Certificate", "certify", "difference", "error_between"]

TOLERANCE = 1e-4
"""Largest relative error that is still rounding: sums of thousands of f32 terms in another order reach 1e-5."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was found, one entry for each mask set.

    Attributes:
        errors: The largest difference between both graphs, relative to the largest magnitude of the output it is in.
        kept: The share of the parameters that is left.
        left: How many masked groups could not be removed.
    """

    errors: tuple[float, ...]
    kept: tuple[float, ...]
    left: tuple[int, ...]

    @property
    def failures(self) -> int:
        """How many mask sets gave another function."""
        return sum(not error <= TOLERANCE for error in self.errors)

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors, default=0.0)

    def __str__(self) -> str:
        if not self.errors:
            return "nothing to prune, and so nothing to prove"
        return (
            f"{len(self.errors)} random mask sets that leave {min(self.kept):.0%} to {max(self.kept):.0%} of the "
            f"parameters: worst relative error {self.worst:.1e}, {self.failures} above {TOLERANCE:.0e}, "
            f"{sum(self.left)} masked groups not removed"
        )


def certify(gm: CapturedModule, *, runs: int = 10, heads: bool = False, seed: int = 0) -> Certificate:
    """Mask random parts of a graph, shrink it, and compare; as often as asked for.

    Args:
        gm: A captured graph, with or without masks; it is left alone, and judged in evaluation.
        runs: How many mask sets.
        heads: Prune heads of attention, and nothing else.
        seed: Of masks and inputs.

    Raises:
        PassError: a shrunk graph cannot run.
    """
    found = prunable(gm, heads=heads)
    draw = random.Random(seed)
    results = [_one(gm, found, draw) for _ in range(runs if found.families else 0)]
    errors, kept, left = zip(*results, strict=True) if results else ((), (), ())
    return Certificate(errors, kept, left)


def _one(gm: CapturedModule, found: Prunable, draw: random.Random) -> tuple[float, float, int]:
    groups: list[Group] = []
    for family in found.families:  # any number of its groups but all
        groups += draw.sample(family.groups, draw.randrange(len(family.groups)))
    masked = InsertMasks(channel_plan(gm, found.structure, groups))(gm).gm
    rw = Rewriter(masked.clone(), "shrink-masked")
    removal = shrink(rw, to_run=True)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (gm, rw.gm))
    seed = draw.randrange(2**31)
    return error_between(masked, rw.gm, seed), after / max(before, 1), len(remaining(removal, groups))


def error_between(masked: CapturedModule, shrunk: CapturedModule, seed: int = 0) -> float:
    """Return the largest relative error of any output, on the examples and on random inputs like them."""
    worst = 0.0
    for leaves in _inputs(masked, seed):
        worst = max(worst, difference(_outputs(masked, leaves), _outputs(shrunk, leaves)))
    return worst


def difference(want: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of any output, relative to the largest magnitude of what is wanted in it."""
    worst = 0.0
    for first, second in zip(want, got, strict=True):
        if first.shape != second.shape or not torch.equal(first.isnan(), second.isnan()):
            return float("inf")
        if first.numel():
            gap = (first.double() - second.double()).nan_to_num(0.0).abs().max()
            worst = max(worst, float(gap / first.double().nan_to_num(0.0).abs().max().clamp_min(1e-12)))
    return worst


def _inputs(gm: CapturedModule, seed: int) -> Iterator[list[Any]]:
    """Yield the leaves of each example, and then of the first one with random numbers for its floats."""
    draw = torch.Generator().manual_seed(seed)
    samples = [gm.flatten_inputs(*sample.args, **sample.kwargs) for sample in gm.samples]
    yield from samples
    if any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in samples[0]):
        yield [_drawn(leaf, draw) for leaf in samples[0]]


def _drawn(leaf: Any, draw: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.randn(leaf.shape, generator=draw, dtype=torch.float32).to(leaf)


def _outputs(gm: CapturedModule, leaves: Sequence[Any]) -> list[torch.Tensor]:
    if gm.training and gm.modes == "both":
        gm = gm.clone().eval()
    with isolated(gm):
        found = EagerInterpreter(gm).run(*leaves, enable_io_processing=False)
    return [value for value in torch.utils._pytree.tree_leaves(found) if isinstance(value, torch.Tensor)]
