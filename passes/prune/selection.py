"""Choose what is pruned, given how important it is: by layer or over all layers, by share or by threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from fxopt.passes.prune.groups import Family, Group

__all__ = ["Scope", "select_groups", "select_weights"]

Scope = Literal["layer", "global"]


def select_groups(
    families: Sequence[Family],
    scores: Mapping[str, torch.Tensor],
    *,
    fraction: float | None,
    threshold: float | None,
    scope: Scope,
    min_kept: int,
    multiple: int,
) -> list[Group]:
    """Return the groups to prune.

    Args:
        families: The families.
        scores: f32[groups] by name of the family; families without scores are left alone.
        fraction: Share of the groups that goes: of each family, or of all together.
        threshold: In its place, the score below which a group goes.
        scope: For ``"global"``, the scores of a family are divided by their mean, and compared with each other.
        min_kept: How many groups of a family stay at least.
        multiple: What the number of groups that stay is a multiple of, rounded up, where the family has as many.
    """
    scored = [family for family in families if family.name in scores]
    counts: dict[str, int] = {}
    if threshold is not None:
        counts = {family.name: int((scores[family.name] < threshold).sum()) for family in scored}
    elif fraction is not None and scope == "layer":
        counts = {family.name: round(fraction * len(family.groups)) for family in scored}
    elif fraction is not None:
        counts = _global_counts(scored, scores, fraction, min_kept)
    chosen: list[Group] = []
    for family in scored:
        total = len(family.groups)
        stays = max(total - counts[family.name], min(min_kept, total), 1)
        stays = min(total, math.ceil(stays / multiple) * multiple)
        order = torch.argsort(scores[family.name], stable=True)[: total - stays]
        chosen += [family.groups[at] for at in sorted(order.tolist())]
    return chosen


def _global_counts(
    families: Sequence[Family], scores: Mapping[str, torch.Tensor], fraction: float, min_kept: int
) -> dict[str, int]:
    """Return how many groups of each family go when all groups compete; the best ``min_kept`` of each are out of it."""
    rows = []
    for number, family in enumerate(families):
        score = scores[family.name]
        finite = score[score.isfinite()]
        mean = finite.mean() if len(finite) else score.new_ones(())
        relative = score / mean.clamp_min(torch.finfo(torch.float32).tiny)
        ranked = relative.sort(stable=True).values[: max(len(relative) - max(min_kept, 1), 0)]
        rows += [(float(each), number) for each in ranked]
    wanted = round(fraction * sum(len(family.groups) for family in families))
    found = [0] * len(families)
    for _, number in sorted(rows)[:wanted]:
        found[number] += 1
    return {family.name: found[number] for number, family in enumerate(families)}


def select_weights(
    scores: Mapping[str, torch.Tensor],
    *,
    fraction: float | None,
    threshold: float | None,
    scope: Scope,
    block: tuple[int, int] = (1, 1),
    pattern: tuple[int, int] | None = None,
    inputs: Mapping[str, int] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return masks of single weights, blocks, or N of each M neighbours, bool by name, and why others have none.

    Args:
        scores: Of every weight, by name of the parameter; -inf for one that goes before all others.
        fraction: Share of the weights that goes, the first of equal ones; one block of each parameter stays at least.
        threshold: In its place, the mean score of a block below which it goes.
        scope: Whether ``fraction`` is of each parameter, or of all together, by their scores as they are.
        block: Rows and columns of a block of a weight as a matrix of its rows; ``(1, 1)`` for single weights.
        pattern: ``(n, m)``: keep the n most important of every m neighbours along the axis of the inputs.
        inputs: The axis of the inputs of each weight, for ``pattern``; a weight without one has none.
    """
    masks: dict[str, torch.Tensor] = {}
    notes: dict[str, str] = {}
    blocked: dict[str, torch.Tensor] = {}
    for name, score in scores.items():
        if pattern is not None:
            axis = (inputs or {}).get(name)
            if axis is None:
                notes[name] = "no layer sums over one of its axes alone"
            elif score.shape[axis] % pattern[1]:
                notes[name] = f"its {score.shape[axis]} inputs are no multiple of {pattern[1]}"
            else:
                masks[name] = _n_of_m(score, axis, pattern)
        else:
            rows, columns = len(score), score[0].numel()
            if rows % block[0] or columns % block[1]:
                notes[name] = f"a matrix of {rows} x {columns} has no whole blocks of {block[0]} x {block[1]}"
            else:
                parts = score.flatten(1).unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
                gone = parts == -math.inf
                mean = parts.masked_fill(gone, 0.0).mean(dim=(1, 3))
                blocked[name] = mean.masked_fill(gone.all(dim=3).all(dim=1), -math.inf)
    for name, kept in _kept_blocks(blocked, fraction, threshold, scope).items():
        wide = kept.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
        masks[name] = wide.reshape(scores[name].shape)
    return masks, notes


def _kept_blocks(
    scores: Mapping[str, torch.Tensor], fraction: float | None, threshold: float | None, scope: Scope
) -> dict[str, torch.Tensor]:
    """Return which scores stay."""
    if fraction is None:
        return {name: score >= (threshold or 0.0) for name, score in scores.items()}
    flat = {name: _with_best_last(score.flatten()) for name, score in scores.items()}
    if scope == "layer":
        kept = {name: ~_lowest(score, fraction) for name, score in flat.items()}
    else:
        gone = _lowest(torch.cat(list(flat.values())), fraction) if flat else torch.zeros(0)
        split = gone.split([len(score) for score in flat.values()])
        kept = {name: ~part for name, part in zip(flat, split, strict=True)}
    return {name: each.reshape(scores[name].shape) for name, each in kept.items()}


def _with_best_last(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores with the best one out of reach, so that no parameter loses all."""
    out = scores.clone()
    out[scores.argmax()] = math.inf
    return out


def _lowest(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return which scores are the lowest share, rounded, but never infinity; of equal ones the first."""
    count = min(round(fraction * len(scores)), int((scores < math.inf).sum()))
    gone = torch.zeros_like(scores, dtype=torch.bool)
    gone[scores.argsort(stable=True)[:count]] = True
    return gone


def _n_of_m(score: torch.Tensor, axis: int, pattern: tuple[int, int]) -> torch.Tensor:
    """Return a mask, bool in the shape of the scores, that keeps n of every m neighbours along an axis."""
    n, m = pattern
    parts = score.movedim(axis, -1).unflatten(-1, (-1, m))
    best = parts.argsort(dim=-1, descending=True, stable=True)[..., :n]
    kept = torch.zeros_like(parts, dtype=torch.bool).scatter(-1, best, True)
    return kept.flatten(-2).movedim(-1, axis)
