"""Precision that adapts while a graph trains: what overflows goes to float32, and comes back when it is calm again.

    scaler = torch.amp.GradScaler("cpu")
    adaptive = AdaptivePrecision(gm, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), scaler=scaler)
    for batch in loader:
        optimizer.zero_grad()
        scaler.scale(loss(adaptive.gm, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        adaptive.step(batch)
    print(*map(str, adaptive.log))

Loss scaling and skipped steps are the scaler's. ``adaptive.gm`` is one module for the whole training: its graph is
replaced in place, made each time by applying the new plan to the float32 graph, whose parameters it shares. Wrap it in
``DistributedDataParallel``, give its parameters to any optimizer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fxopt.args import source_line
from fxopt.graph_module import CapturedModule, copy_graph, graph_modules
from fxopt.live_graph import refuse_sharded
from fxopt.passes.half.apply import apply_plan
from fxopt.passes.half.mixed_precision import MixedPrecision
from fxopt.passes.half.plan import PrecisionPlan, dtype_name
from fxopt.passes.half.probe import Seen, probe, random_state
from fxopt.passes.prune.importance import Loss
from fxopt.rewriter import Rewriter

__all__ = ["AdaptivePrecision", "Move"]


@dataclasses.dataclass(frozen=True)
class Move:
    """One node that got another type.

    Attributes:
        step: After which step.
        node: Its name in the plan; empty where an overflow was no node's fault.
        line: The user's source line, or None where it is unknown.
        before, after: The types.
        reason: Why.
        value: The magnitude that decided; inf for an overflow.
    """

    step: int
    node: str
    line: str | None
    before: torch.dtype
    after: torch.dtype
    reason: str
    value: float

    def __str__(self) -> str:
        where = f" ({self.line})" if self.line else ""
        if not self.node:
            return f"step {self.step}: {self.reason}"
        types = f"{dtype_name(self.before)} -> {dtype_name(self.after)}"
        return f"step {self.step}: {self.node}{where}: {types}: {self.reason}"


class AdaptivePrecision:
    """Trains a graph in half precision, and lets single nodes compute in float32 for as long as they must.

    Args:
        gm: A captured graph of both modes in float32. It stays as it is, and shares parameters and buffers with the
            graph that is trained: export it, or apply ``cast-half``, after training.
        loss: Takes what is called as the model is, and a batch; returns a loss, a tensor without axes.
        plan: What computes in half at first; by operator, as :class:`MixedPrecision` plans, if None.
        dtype: The type of half precision if no plan is given.
        scaler: The one that scales the loss; without one, gradients are looked at for what is not finite.
        every: After how many steps nodes in float32 are looked at.
        patience: How many times in a row one must be calm to go back to half; doubled each time that it goes back.
        headroom: A node is calm where values and gradients are that many times smaller than the largest half.

    Attributes:
        gm: The graph to be trained.
        plan: What computes in which type now.
        log: Every move, in order.
        steps: How many steps were made.

    Raises:
        PassError: the graph has one mode only, or a plan does not fit it.
        ValueError: an option is out of range.

    Where ``torch.distributed`` is initialized, make one in every process, and call ``step`` in all of them: all decide
    the same. Single probes cost a run forward and backward, node by node.
    """

    def __init__(
        self,
        gm: CapturedModule,
        loss: Loss,
        *,
        plan: PrecisionPlan | None = None,
        dtype: torch.dtype | str = "float16",
        scaler: torch.amp.GradScaler | None = None,
        every: int = 100,
        patience: int = 3,
        headroom: float = 4.0,
    ) -> None:
        if not isinstance(gm, CapturedModule):
            raise TypeError(f"gm is a {type(gm).__name__}; wanted a captured graph: call fxopt.capture first")
        if not callable(loss):
            raise TypeError(f"loss is a {type(loss).__name__}; wanted a function of the model and a batch")
        if every < 1 or patience < 1 or not 1 <= headroom < math.inf:
            raise ValueError(
                f"every is {every}, patience {patience}, headroom {headroom}; wanted 1 or more, and finite"
            )
        self._original, self._loss, self._scaler = gm.clone(), loss, scaler
        self._every, self._patience, self._headroom = every, patience, headroom
        self.gm = gm.clone()
        self.log: list[Move] = []
        self.steps = 0
        self._compute_by(MixedPrecision(dtype, plan=plan).make_plan(gm))
        self._calm: dict[str, int] = {}
        self._waits: dict[str, int] = {}
        self._scale = self._current_scale()
        self._random: tuple[torch.Tensor, ...] | None = None
        self.gm.register_forward_pre_hook(self._keep_random_state)

    def step(self, batch: Any) -> bool:
        """Count a step and move nodes if it is time to; return whether gradients overflowed in this step.

        Call it behind ``scaler.update()``, or, without a scaler, behind ``backward()``: gradients must still be there,
        and the optimizer's step is to be left out where this returns True.

        Args:
            batch: What was trained on, the last part of it where gradients are accumulated.

        Raises:
            PassError: FSDP has split the parameters.
        """
        refuse_sharded(self.gm, "probed")
        self.steps += 1
        used, self._scale = self._scale, self._current_scale()
        overflowed = self._agreed(float(self._overflowed(used)))[0] > 0
        if overflowed:
            self._widen(self._probe(batch, used), used)
        elif self._calm and self.steps % self._every == 0:
            self._narrow(self._probe(batch, used))
        return overflowed

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later, beside the states of graph, optimizer and scaler."""
        types = {name: dtype_name(dtype) for name, dtype in self.plan.items()}
        return {"steps": self.steps, "types": types, "calm": dict(self._calm), "waits": dict(self._waits)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, the scaler's having been loaded before.

        Raises:
            PassError: the state is one of another graph.
        """
        types = {name: getattr(torch, found) for name, found in state["types"].items()}
        self._compute_by(PrecisionPlan(types, self.plan.reasons, dtype=self.plan.dtype))
        self.steps, self._scale = state["steps"], self._current_scale()
        self._calm, self._waits = dict(state["calm"]), dict(state["waits"])

    # ---- decisions

    def _widen(self, seen: Seen, scale: float) -> None:
        """Move the node that overflowed first in any process to float32."""
        order = self.plan.half
        forward, backward = (
            float(len(order) - order.index(name)) if name in order else 0.0 for name in (seen.forward, seen.backward)
        )
        # The first forward, and the last backward, have the largest number.
        agreed = self._agreed(forward, len(order) + 1 - backward if backward else 0.0)
        half = dtype_name(self.plan.dtype)
        if agreed[0]:
            self._move(
                order[len(order) - int(agreed[0])], torch.float32, f"its value is not finite in {half}", math.inf
            )
        elif agreed[1]:
            reason = f"its gradient is not finite in {half}, with the loss times {scale:g}"
            self._move(order[int(agreed[1]) - 1], torch.float32, reason, math.inf)
        else:
            reason = f"gradients are not finite, with the loss times {scale:g}, and no node in {half} is at fault"
            self.log.append(Move(self.steps, "", None, self.plan.dtype, self.plan.dtype, reason, math.inf))

    def _narrow(self, seen: Seen) -> None:
        """Move back to half what has been calm for long enough."""
        limit = torch.finfo(self.plan.dtype).max / self._headroom
        names = list(self._calm)
        found = [max(seen.values.get(name, -1.0), seen.gradients.get(name, -1.0)) for name in names]
        for name, largest in zip(names, self._agreed(*found), strict=True):
            if largest < 0:
                continue  # in a branch that no process took
            self._calm[name] = self._calm[name] + 1 if largest <= limit else 0
            if self._calm[name] >= self._waits[name]:
                times = f"{self._waits[name]} times in a row"
                self._move(name, self.plan.dtype, f"values and gradients were up to {largest:.4g}, {times}", largest)

    def _move(self, name: str, dtype: torch.dtype, reason: str, value: float) -> None:
        before = self.plan[name]
        line = source_line(next(node for node, known in self._names.items() if known == name))
        self.log.append(Move(self.steps, name, line, before, dtype, reason, value))
        if dtype is torch.float32:
            self._waits[name] = 2 * self._waits[name] if name in self._waits else self._patience
            self._calm[name] = 0
        else:
            del self._calm[name]
        types = {**self.plan, name: dtype}
        self._compute_by(PrecisionPlan(types, {**self.plan.reasons, name: reason}, dtype=self.plan.dtype))

    # ---- what decisions rest on

    def _current_scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def _overflowed(self, used: float) -> bool:
        if self._scaler is not None and self._scaler.is_enabled():
            return self._scale < used  # update() lowers it for this reason alone
        gradients = [parameter.grad for parameter in self.gm.parameters() if parameter.grad is not None]
        return not all(bool(gradient.isfinite().all()) for gradient in gradients)

    def _agreed(self, *numbers: float) -> list[float]:
        """Return the largest of each number in any process."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return list(numbers)
        held = torch.tensor(numbers, dtype=torch.float64, device=self._device())
        distributed.all_reduce(held, distributed.ReduceOp.MAX)
        return [float(number) for number in held]

    def _probe(self, batch: Any, scale: float) -> Seen:
        return probe(
            self.gm,
            self.plan,
            self._names,
            lambda model: self._loss(model, batch),
            scale=scale,
            random=self._random,
        )

    def _keep_random_state(self, module: torch.nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._random = random_state(self._device())

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.gm.parameters()), torch.device("cpu"))

    # ---- the graph

    def _compute_by(self, plan: PrecisionPlan) -> None:
        """Let the graph compute by a plan, in place."""
        rw = Rewriter(self._original.clone(), "adaptive-precision")
        rw.gm.train(self.gm.training)
        apply_plan(rw, plan, masters=True)
        for path, made in rw.gm.named_modules():
            if isinstance(made, torch.fx.GraphModule):
                mine: Any = self.gm.get_submodule(path)
                mine.graph = copy_graph(made.graph, mine)
        names = Rewriter(self.gm, "adaptive-precision")
        self._names = {node: names.site_name(node) for module in graph_modules(self.gm) for node in module.graph.nodes}
        self.plan = plan
