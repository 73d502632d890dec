"""Prune a graph: choose what matters least, and mask it.

    Prune(0.5)                              half of the channels of each layer, by magnitude
    Prune(0.8, granularity="weights")       single weights
    Prune(budget="macs:0.5")                channels, so that at most half of the multiply-accumulates are left
    plan = Prune(0.5).make_plan(gm)         the masks alone, to print and edit; Prune(plan=plan) applies them

The masked graph trains on with its masks; ``shrink-masked`` then makes it small.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, get_args

import torch

from fxopt.calibration_data import calibration_of
from fxopt.changes import Skip
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import LossyPass
from fxopt.passes.prune.budget import Budget, Costs, check_budget, choose_groups
from fxopt.passes.prune.importance import KINDS, Importance, Loss, group_scores, weight_scores
from fxopt.passes.prune.insert_masks import InsertMasks
from fxopt.passes.prune.layers import layer_axes, prunable_weights
from fxopt.passes.prune.masks import MaskPlan, compressed_sizes
from fxopt.passes.prune.plan import Prunable, channel_plan, check_not_quantized, masked_last, names_that_fit, prunable
from fxopt.passes.prune.selection import Scope, select_groups, select_weights
from fxopt.rewriter import Rewriter

__all__ = ["Prune"]

_PATTERN = re.compile(r"(\d+):(\d+)")
_BLOCK = re.compile(r"block:(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True)
class Prune(LossyPass):
    """Mask what matters least.

    Attributes:
        fraction: Share that goes, above 0 and below 1; of each layer or of all together, see ``scope``.
        granularity: ``"channels"`` (hidden units of linear and recurrent layers too), ``"heads"`` of attention,
            ``"weights"``, ``"2:4"`` (2 of every 4 neighbours along the inputs stay), ``"block:4x1"`` (rows x columns).
        importance: ``"l1"``, ``"l2"``, ``"taylor"``, ``"activation"``, ``"batch-norm"``, ``"fpgm"``, ``"random"``; or a
            function that takes the graph and returns scores by name of the parameter, f32 in its shape.
        scope: ``"layer"`` or ``"global"``.
        threshold: In place of ``fraction``: what scores below it goes.
        min_kept: How many channels or heads of a layer stay at least.
        multiple: What their number is a multiple of: kernels like whole vectors, such as 8.
        skip: Patterns of names of parameters that stay whole.
        plan: The masks; made by the pass if None.
        loss: For ``"taylor"``: takes the model and an item of the calibration data, and returns a loss.
        seed: Of ``"random"``.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB. The default refuses only
            nonsense: a pruned net is of use after training.
        budget: In place of ``fraction``, for channels and heads: what the shrunk graph may need at most of what the
            graph needs, ``"macs:0.5"``, ``"params:0.5"``, ``"bytes:0.5"`` or ``"latency:0.5"``; see ``budget.py``.
        costs: For a budget of latency: ``fxopt.export.width_costs``, which measures, or what it returned.
    """

    name: ClassVar[str] = "prune"
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    divisible: ClassVar[bool] = False
    fraction: float | None = None
    granularity: str = "channels"
    importance: Importance = "l2"
    scope: Scope = "layer"
    threshold: float | None = None
    min_kept: int = 1
    multiple: int = 1
    skip: tuple[str, ...] = ()
    plan: MaskPlan | None = dataclasses.field(default=None, repr=False)
    loss: Loss | None = dataclasses.field(default=None, repr=False)
    seed: int = 0
    min_sqnr_db: float = -20.0
    budget: str | None = None
    costs: Costs | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option has a value that does not exist.
            TypeError: an option is of another type.
        """
        self._check_types()
        given = [name for name in ("fraction", "threshold", "budget", "plan") if getattr(self, name) is not None]
        if self.pattern is not None and self.plan is None and given:
            raise ValueError(f"granularity {self.granularity!r} says itself what stays; leave {given[0]} out")
        if len(given) != 1 and (self.pattern is None or given):
            raise ValueError(
                "give exactly one of fraction, threshold, budget and plan: Prune(0.5); "
                f"got {' and '.join(given) or 'none'}"
            )
        check_budget(self.budget, self.costs, self.granularity if not self.structured else None)
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction!r}; wanted a share above 0 and below 1 of what goes")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold is {self.threshold!r}; wanted a finite score above 0")
        if self.pattern is None and self.block is None and self.granularity not in ("channels", "heads", "weights"):
            raise ValueError(
                f"granularity is {self.granularity!r}; wanted 'channels', 'heads', 'weights', '2:4' or 'block:4x1'"
            )
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise ValueError(f"granularity is {self.granularity!r}; wanted n of m with 0 < n < m")
        if self.block is not None and 0 in self.block:
            raise ValueError(f"granularity is {self.granularity!r}; wanted blocks of one row and one column at least")
        if isinstance(self.importance, str) and self.importance not in KINDS:
            raise ValueError(f"importance is {self.importance!r}; wanted one of {', '.join(KINDS)}, or a function")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope is {self.scope!r}; wanted one of {', '.join(get_args(Scope))}")
        for name in ("min_kept", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted 1 or more")

    def _check_types(self) -> None:
        """Check the types of the options, so that comparing them cannot fail.

        Raises:
            TypeError: one is of another type.
        """
        wanted: dict[str, tuple[Any, str]] = {
            "fraction": (float | int | None, "a number, such as 0.5"),
            "threshold": (float | int | None, "a number"),
            "granularity": (str, "a text, such as 'channels'"),
            "min_kept": (int, "a whole number"),
            "multiple": (int, "a whole number"),
            "skip": (tuple | list, "a tuple of patterns, such as ('layer1.*',)"),
            "plan": (MaskPlan | None, "a MaskPlan"),
        }
        for name, (kind, text) in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r}; wanted {text}")
        if not isinstance(self.importance, str) and not callable(self.importance):
            raise TypeError(f"importance is {self.importance!r}; wanted one of {', '.join(KINDS)}, or a function")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """How many of how many neighbours stay, ``(2, 4)``, or None."""
        found = _PATTERN.fullmatch(self.granularity)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks that go, or None."""
        found = _BLOCK.fullmatch(self.granularity)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def structured(self) -> bool:
        """Whether whole channels or heads are masked, which ``shrink-masked`` can remove."""
        return self.granularity in ("channels", "heads")

    def run(self, rw: Rewriter) -> None:
        """Plan and mask.

        Raises:
            PassError: nothing can be pruned, or the plan does not fit the graph.
            CalibrationError: the importance needs data, and they do not fit.
        """
        plan = self.make_plan(rw.gm, told=rw.notes) if self.plan is None else self.plan
        rw.skips += [Skip(name, reason, None, self.name) for name, reason in plan.notes.items()]
        InsertMasks(plan, self.min_sqnr_db).run(rw)
        rw.notes.append(f"{plan.kept:.1%} of the weights of {len(plan)} masked parameters are kept")
        if not self.structured and self.plan is None:
            whole, compressed = compressed_sizes(rw.gm)
            rw.notes.append(
                f"{whole:,} bytes of masked weights compress to {compressed:,}; ORT runs single weights of 0 no faster"
            )

    def make_plan(
        self,
        gm: CapturedModule,
        calibration: Iterable[Any] | None = None,
        *,
        found: Prunable | None = None,
        told: list[str] | None = None,
    ) -> MaskPlan:
        """Return the masks that the pass would apply.

        Args:
            gm: A captured graph, which is left alone. What is masked in it already stays so.
            calibration: Data for importances that need some; those that the graph carries, or its examples, if None.
            found: What of this very graph can be pruned, for channels and heads, if it is known already.
            told: Takes lines about how a budget is met.

        Raises:
            PassError: nothing can be pruned; or, a PreconditionError, the graph is quantized.
            CalibrationError: the importance needs data, and they do not fit.
            TypeError: ``gm`` is no captured graph.
        """
        if not isinstance(gm, CapturedModule):
            raise TypeError(f"{self.name} plans for a captured graph and got a {type(gm).__name__}; call fxopt.capture")
        if self.plan is not None:
            return self.plan
        check_not_quantized(gm)
        data = calibration_of(gm) if calibration is None else calibration
        plan = self._channels(gm, data, found, told) if self.structured else self._weights(gm, data)
        return plan.joined(MaskPlan.of(gm))

    def _nothing(self, notes: Mapping[str, str]) -> PassError:
        return PassError(
            describe(
                f"{self.name} finds no {self.granularity} to prune",
                because="; ".join(f"{name}: {why}" for name, why in list(notes.items())[:4]) or None,
                try_="another granularity or importance, or fewer patterns in skip",
            )
        )

    def _channels(
        self, gm: CapturedModule, data: Any, found: Prunable | None, told: list[str] | None = None
    ) -> MaskPlan:
        found = prunable(gm, heads=self.granularity == "heads", skip=self.skip) if found is None else found
        scores = group_scores(
            gm, found.structure, found.families, self.importance, data=data, loss=self.loss, seed=self.seed
        )
        notes = dict(found.refused)
        notes |= {
            f.name: f"it has nothing that {self.importance!r} measures" for f in found.families if f.name not in scores
        }
        if not scores:
            raise self._nothing(notes)
        scores = masked_last(gm, found.families, scores)
        if self.budget is not None:
            planned = choose_groups(
                gm,
                found,
                scores,
                Budget.parse(self.budget),
                importance=self.importance,
                costs=self.costs,
                min_kept=self.min_kept,
                multiple=self.multiple,
            )
            if told is not None:
                told += planned.notes
            return channel_plan(gm, found.structure, planned.groups, notes)
        chosen = select_groups(
            found.families,
            scores,
            fraction=self.fraction,
            threshold=self.threshold,
            scope=self.scope,
            min_kept=self.min_kept,
            multiple=self.multiple,
        )
        return channel_plan(gm, found.structure, chosen, notes)

    def _weights(self, gm: CapturedModule, data: Any) -> MaskPlan:
        scores = weight_scores(gm, self.importance, data=data, loss=self.loss, seed=self.seed)
        held = MaskPlan.of(gm)
        names = set(prunable_weights(gm)) - names_that_fit(gm, self.skip)
        chosen = {
            name: score.cpu().masked_fill(~held[name], -torch.inf) if name in held else score.cpu()
            for name, score in scores.items()
            if name in names
        }
        # The scores of l2 are squares.
        threshold = self.threshold**2 if self.threshold is not None and self.importance == "l2" else self.threshold
        masks, notes = select_weights(
            chosen,
            fraction=self.fraction,
            threshold=threshold,
            scope=self.scope,
            block=self.block or (1, 1),
            pattern=self.pattern,
            inputs={name: inputs for name, (inputs, _) in layer_axes(gm).items()} if self.pattern else None,
        )
        if not masks:
            raise self._nothing(notes)
        return MaskPlan(masks, notes=notes)
