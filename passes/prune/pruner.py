"""Prune while training: in any loop, one call behind each step of the optimizer.

    pruner = Pruner(gm, Prune(0.5), Cubic(0.5, begin=0, end=1000, every=100), optimizer)
    for x, y in loader:
        loss(pruner.gm(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    small = fxopt.optimize(pruner.gm.eval(), "shrink-masked")

The masked graph is an ordinary module: save it, wrap it in ``DistributedDataParallel``, export it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fxopt.attributes import get_path, owner_of
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.live_graph import refuse_sharded
from fxopt.passes.prune.importance import Loss
from fxopt.passes.prune.insert_masks import InsertMasks
from fxopt.passes.prune.masks import MaskPlan, masked_products, norm_masks
from fxopt.passes.prune.plan import channel_plan, prunable
from fxopt.passes.prune.prune import Prune
from fxopt.passes.prune.schedule import Schedule

__all__ = ["Pruner", "fine_tune"]


class Pruner:
    """Masks more and more of a graph while it trains, by the weights that it has at that moment.

    The masks are buffers of the graph from the beginning, true at first, and are changed in place: optimizers,
    ``DistributedDataParallel`` and compiled code go on with the same tensors. What is masked once stays so, and is 0;
    so is its state in the optimizer.

    Args:
        gm: A captured graph. Its parameters, and masks if it has some, are shared with the graph that is trained, so
            the optimizer may have been made for them before.
        prune: What is pruned, and how it is chosen; the schedule says how much. Its own ``fraction`` is not used.
        schedule: The share that is masked after so many steps.
        optimizer: The one that trains the parameters; may be set later. Without one, momentum that a weight had when it
            was masked moves it on, where no mask is seen: behind ``bake-masks``.
        data: Data for importances that need some; those that the graph carries, or its examples, if None.

    Attributes:
        gm: The masked graph, to be trained.
        optimizer: As given.
        steps: How many steps were made.
        fraction: The share that was last asked for; 0.0 at first.

    Raises:
        PassError: nothing can be pruned.
        ValueError: ``prune`` has a plan or a threshold instead of a fraction.

    Where ``torch.distributed`` is initialized, make one in every process; all get the masks of process 0.
    """

    def __init__(
        self,
        gm: CapturedModule,
        prune: Prune,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer | None = None,
        data: Iterable[Any] | None = None,
    ) -> None:
        if not isinstance(gm, CapturedModule):
            raise TypeError(f"Pruner trains a captured graph and got a {type(gm).__name__}; call fxopt.capture first")
        if not isinstance(prune, Prune):
            raise TypeError(f"prune is {prune!r}; wanted a pass, such as Prune(0.5)")
        if not callable(getattr(schedule, "fraction_at", None)):
            raise TypeError(f"schedule is {schedule!r}; wanted one such as OneShot(0.5), with fraction_at(step)")
        if prune.fraction is None and prune.pattern is None:
            raise ValueError(f"{prune.spec()} has no fraction, which the schedule is to set; wanted Prune(0.5, ...)")
        self._prune, self._schedule, self._data = prune, schedule, data
        self.steps, self.fraction = 0, 0.0
        self.gm = InsertMasks(_full_plan(gm, prune))(gm).gm
        self._found = (
            prunable(self.gm, heads=prune.granularity == "heads", skip=prune.skip) if prune.structured else None
        )
        self.optimizer = optimizer
        self._check_optimizer()

    @property
    def plan(self) -> MaskPlan:
        """The masks as they are now."""
        return MaskPlan.of(self.gm)

    def step(self) -> bool:
        """Count a step of the optimizer, and mask more if it is time to; return whether it was.

        Raises:
            PassError: the optimizer trains other parameters than those of the graph, or FSDP has split these.
            ValueError: the schedule gives no share from 0 and below 1.
            CalibrationError: the importance needs data, and they do not fit.
        """
        fraction = self._schedule.fraction_at(self.steps + 1)
        if not 0 <= fraction < 1:
            raise ValueError(
                f"the schedule gives {fraction!r} at step {self.steps + 1}; wanted a share from 0 and below 1"
            )
        is_due = fraction > self.fraction
        if is_due:
            refuse_sharded(self.gm, "masked further")
            self._check_optimizer()
            wanted = dataclasses.replace(self._prune, fraction=None if self._prune.pattern else fraction)
            self._apply(wanted.make_plan(self.gm, self._data, found=self._found))
            self.fraction = fraction
        self.steps += 1
        return is_due

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later, beside the states of graph and optimizer."""
        plan = self.plan
        return {"steps": self.steps, "fraction": self.fraction, "masks": dict(plan), "channels": plan.channels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; what it masks is masked in the graph as well.

        Raises:
            PassError: the state is one of another graph, or FSDP has split the parameters.
        """
        refuse_sharded(self.gm, "masked")
        missing = [key for key in ("steps", "fraction", "masks", "channels") if key not in state]
        if missing:
            raise PassError(
                describe("this is no state of a Pruner", got=f"no {', '.join(missing)}", try_="pruner.state_dict()")
            )
        plan, mine = MaskPlan(state["masks"], state["channels"]), self.plan
        theirs, ours = ({name: tuple(m.shape) for name, m in {**p, **p.channels}.items()} for p in (plan, mine))
        if theirs != ours:
            differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
            raise PassError(
                describe(
                    "the state is one of a Pruner of another graph, or with other options",
                    got=", ".join(f"{name}: {theirs.get(name, 'none')}" for name in differing[:4]),
                    wanted=", ".join(f"{name}: {ours.get(name, 'none')}" for name in differing[:4]),
                )
            )
        self._apply(plan)
        self.steps, self.fraction = int(state["steps"]), float(state["fraction"])

    @torch.no_grad()
    def _apply(self, plan: MaskPlan) -> None:
        """Mask in place what the plan masks, and whatever the optimizer remembers of it."""
        wanted = {id(get_path(self.gm, name)): mask for name, mask in plan.items()}
        for weight_read, mask_read in masked_products(self.gm):
            weight, mask = (get_path(owner_of(node), str(node.target)) for node in (weight_read, mask_read))
            _join(mask, wanted.get(id(weight)))
            held = [weight.grad, *(self.optimizer.state.get(weight, {}) if self.optimizer else {}).values()]
            for tensor in [weight, *held]:
                if isinstance(tensor, torch.Tensor) and tensor.shape == mask.shape and not tensor.is_sparse:
                    tensor.masked_fill_(~mask.to(tensor.device), 0)
        for name, mask_read in norm_masks(self.gm):
            _join(get_path(owner_of(mask_read), str(mask_read.target)), plan.channels.get(name))

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            return
        trained = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        weights = [get_path(owner_of(node), str(node.target)) for node, _ in masked_products(self.gm)]
        if not any(id(weight) in trained for weight in weights):
            raise PassError(
                describe(
                    "the optimizer trains none of the parameters that are pruned",
                    got=f"{len(trained)} other parameters",
                    wanted="parameters of pruner.gm",
                    try_="pruner.optimizer = Adam(pruner.gm.parameters())",
                )
            )


def _full_plan(gm: CapturedModule, prune: Prune) -> MaskPlan:
    """Return masks of all that could be pruned, true everywhere.

    Raises:
        PassError: nothing can be.
    """
    found = prunable(gm, heads=prune.granularity == "heads", skip=prune.skip) if prune.structured else None
    plan = dataclasses.replace(prune, importance="l1").make_plan(gm, found=found)
    if found is not None:
        plan = channel_plan(gm, found.structure, [group for family in found.families for group in family.groups])
    masks, channels = ({name: torch.ones_like(mask) for name, mask in each.items()} for each in (plan, plan.channels))
    return MaskPlan(masks, channels)


def _join(mask: torch.Tensor, other: torch.Tensor | None) -> None:
    """Mask in place what another mask masks; in all processes what it masks in process 0."""
    if other is not None:
        mask.logical_and_(other.to(mask.device))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        numbers = mask.to(torch.uint8)
        torch.distributed.broadcast(numbers, src=0)
        mask.copy_(numbers.bool())


def fine_tune(
    gm: CapturedModule,
    loader: Iterable[Any],
    loss: Loss,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    pruner: Pruner | None = None,
) -> list[float]:
    """Train a graph, masked or not; any loop does as well.

    Args:
        gm: The graph, ``pruner.gm`` if there is a pruner. Trained in place, and left in the mode that it was in.
        loader: Batches, gone through once an epoch.
        loss: Takes the graph and a batch, and returns a loss, a tensor without axes.
        epochs: How often.
        optimizer: AdamW with a learning rate of 1e-3 if None.
        pruner: Stepped behind each step of the optimizer.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: there are no batches, the loss is NaN or infinite, or the pruner is one of another graph.
        ModeError: the graph cannot be trained.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; wanted 1 or more")
    if pruner is not None and pruner.gm is not gm:
        raise ValueError("the pruner masks another graph than the one that is trained; pass pruner.gm")
    if optimizer is None:
        optimizer = pruner.optimizer if pruner is not None else None
    if optimizer is None:
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    if pruner is not None and pruner.optimizer is None:
        pruner.optimizer = optimizer
    was_training, means = gm.training, []
    gm.train()
    try:
        for epoch in range(epochs):
            losses = [_trained(gm, batch, loss, optimizer, pruner) for batch in loader]
            if not losses or not math.isfinite(sum(losses)):
                raise ValueError(
                    f"epoch {epoch + 1} has {'a loss that is not finite' if losses else 'no batches'}; wanted a loader "
                    "that can be gone through again, and a learning rate that does not diverge"
                )
            means.append(sum(losses) / len(losses))
    finally:
        gm.train(was_training)
    return means


def _trained(
    gm: CapturedModule, batch: Any, loss: Loss, optimizer: torch.optim.Optimizer, pruner: Pruner | None
) -> float:
    optimizer.zero_grad()
    reached = loss(gm, batch)
    reached.backward()
    optimizer.step()
    if pruner is not None:
        pruner.step()
    return float(reached.item())
