"""Prune to a budget: the widths of all families that lose least of what costs at most a share of what it cost.

    Prune(budget="macs:0.5")                        at most half of the multiply-accumulates
    Prune(budget="params:0.5")                      of the parameters
    Prune(budget="bytes:0.5")                       of the bytes of all tensors
    Prune(budget="latency:0.6", costs=width_costs)  of the time that ``fxopt.export.width_costs`` measures

What a family loses is the sum of the scores of the channels that go, each divided by the sum of its own and of all
larger ones of the family: LAMP (Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021), which
makes layers comparable, and close to -ln(share that is kept). So the losses of layers add up to that of what is kept of
a signal that goes through them one after the other, and no layer is given up for the others' sake. Scores of ``"l2"``
are squared first, as in LAMP. Scores of ``"taylor"`` are changes of the loss already: they are added as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.passes.prune.costs import Term, byte_terms, mac_terms, parameter_terms, total
from fxopt.passes.prune.groups import Group
from fxopt.passes.prune.importance import Importance
from fxopt.passes.prune.plan import Prunable
from fxopt.passes.prune.regions import Measure, Region, Times, latency_terms, regions_of
from fxopt.passes.prune.solver import cheapest, solve
from fxopt.passes.prune.widths import Widths, sample_shapes

__all__ = ["Budget", "Costs", "Planned", "check_budget", "choose_groups", "group_losses"]

Costs = Times | Measure
"""Times of regions, or a function that measures them, such as ``fxopt.export.width_costs``."""

_KINDS = {"macs": "multiply-accumulates", "params": "parameters", "bytes": "bytes of tensors", "latency": "time"}
_SECONDS = 30.0  # for the solver
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the user asked for: at most a share of a kind of cost."""

    kind: str
    share: float

    @classmethod
    def parse(cls, text: Any) -> Budget:
        """Read ``"macs:0.5"``.

        Raises:
            ValueError: the text is no budget.
        """
        kind, colon, share = text.partition(":") if isinstance(text, str) else ("", "", "")
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if kind not in _KINDS or not colon or not 0 < number < 1:
            raise ValueError(
                f"budget is {text!r}; wanted one of {', '.join(_KINDS)}, and a share above 0 and below 1 of what it "
                "was: 'macs:0.5'"
            )
        return cls(kind, number)


def check_budget(budget: Any, costs: Any, granularity: str | None) -> None:
    """Check the options of a budget; ``granularity`` is one that has no channels or heads, or None.

    Raises:
        ValueError: the budget is none, or does not go with the other options.
    """
    if budget is None:
        if costs is not None:
            raise ValueError("costs are for a budget of latency: Prune(budget='latency:0.6', costs=width_costs)")
        return
    kind = Budget.parse(budget).kind
    if granularity is not None:
        raise ValueError(f"granularity is {granularity!r}, and a budget chooses how many channels or heads stay")
    if (kind == "latency") != (costs is not None):
        raise ValueError(
            "a budget of latency needs costs=fxopt.export.width_costs, or what it returned"
            if costs is None
            else f"costs are for a budget of latency, and the budget is {budget!r}"
        )
    if costs is not None and not callable(costs) and not isinstance(costs, Mapping):
        raise ValueError(f"costs is a {type(costs).__name__}; wanted fxopt.export.width_costs, or what it returned")


@dataclasses.dataclass(frozen=True)
class Planned:
    """What was chosen, and how, in lines for a report."""

    groups: list[Group]
    notes: tuple[str, ...]


def choose_groups(
    gm: CapturedModule,
    found: Prunable,
    scores: Mapping[str, torch.Tensor],
    budget: Budget,
    *,
    importance: Importance,
    costs: Costs | None,
    min_kept: int,
    multiple: int,
    seconds: float = _SECONDS,
) -> Planned:
    """Return the groups that go.

    Args:
        gm: The graph; its first sample says how large batches and dynamic sizes are.
        found: What can be pruned.
        scores: f32[groups] by name of the family; families without scores are left alone.
        budget: What is asked for.
        importance: What the scores are.
        costs: For ``"latency"``.
        min_kept: See :class:`fxopt.passes.prune.Prune`.
        multiple: The same.
        seconds: Time limit of the solver.

    Raises:
        PassError: the budget cannot be met, or ``costs`` does not fit the graph.
    """
    families = [family for family in found.families if family.name in scores]
    widths = Widths(found.structure, families, scores, min_kept=min_kept, multiple=multiple)
    terms = _terms(gm, widths, budget, costs)
    before = total(terms, widths.full)
    losses = group_losses(widths, scores, importance)
    lowest = cheapest([len(each) for each in widths.options], terms, seconds=seconds) if families else ()
    if not families or total(terms, lowest) > budget.share * before:
        raise PassError(_too_small(budget, terms, widths, lowest, found.refused))
    solution = solve(losses, terms, budget.share * before, seconds=seconds)
    if solution is None:
        raise PassError(_too_small(budget, terms, widths, lowest, found.refused))
    after = total(terms, solution.choice)
    gap = "" if solution.gap is None else f", gap {solution.gap:.2%}"
    lost = sum(row[option] for row, option in zip(losses, solution.choice, strict=True))
    return Planned(
        widths.gone(solution.choice),
        (
            f"budget {budget.kind}:{budget.share:g}: {before:,.0f} {_KINDS[budget.kind]}, {after:,.0f} when shrunk "
            f"({after / max(before, 1e-300):.1%}), by the model",
            f"{len(families)} families of {sum(len(each) for each in widths.options)} widths; loss {lost:.4g}, "
            f"solver {solution.solver}{gap}",
            "kept: " + ", ".join(
                f"{family.name} {options[option]} of {options[-1]}"
                for family, options, option in zip(families, widths.options, solution.choice, strict=True)
            ),
        ),
    )  # fmt: skip


def regions_to_measure(gm: CapturedModule, widths: Widths) -> list[Region]:
    """Return what is to be measured of a graph."""
    return regions_of(widths, sample_shapes(gm))


def _terms(gm: CapturedModule, widths: Widths, budget: Budget, costs: Costs | None) -> list[Term]:
    if budget.kind == "params":
        return parameter_terms(gm, widths)
    if budget.kind == "bytes":
        return byte_terms(gm, widths)
    if budget.kind == "macs":
        return mac_terms(widths, sample_shapes(gm))
    regions = regions_to_measure(gm, widths)
    assert costs is not None, "checked by the pass"
    return latency_terms(regions, costs(gm, regions) if callable(costs) else costs, widths)


def group_losses(widths: Widths, scores: Mapping[str, torch.Tensor], importance: Importance) -> list[tuple[float, ...]]:
    """Return what each option of each family loses; see the text of the module."""
    found = []
    for family, options in zip(widths.families, widths.options, strict=True):
        rising = scores[family.name].double().sort(stable=True).values.clamp_min(0)  # -inf for what is masked already
        if importance == "l2":
            rising = rising.square()
        if importance != "taylor":
            left = rising.flip(0).cumsum(0).flip(0)
            rising = torch.where(rising > 0, rising / left.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        lost = torch.cat([rising.new_zeros(1), rising.cumsum(0)])
        found.append(tuple(float(lost[len(rising) - width]) for width in options))
    return found


def _too_small(
    budget: Budget, terms: Sequence[Term], widths: Widths, lowest: Sequence[int], refused: Mapping[str, str]
) -> str:
    """Say how small a share can be, and what of it is most."""
    before = max(total(terms, widths.full), 1e-300)
    rest = total(terms, lowest) if widths.families else before
    each: dict[str, float] = {}
    for term in terms:
        each[term.name] = each.get(term.name, 0.0) + term.value(lowest if widths.families else ())
    most = sorted(each, key=lambda name: -each[name])[:_NAMED]
    reasons = "; ".join(f"{name} cannot be pruned: {why}" for name, why in list(refused.items())[:_NAMED])
    return describe(
        f"the budget {budget.kind}:{budget.share:g} cannot be met",
        got=f"{rest / before:.4f} of the {_KINDS[budget.kind]} at the narrowest widths; most of it is "
        + ", ".join(f"{name} ({each[name] / before:.4f})" for name in most),
        wanted=f"at most {budget.share:g}",
        because=reasons or None,
        try_=f"budget='{budget.kind}:{math.ceil(1000 * rest / before) / 1000:g}' or more, a smaller min_kept or "
        "multiple, or fewer patterns in skip",
    )
