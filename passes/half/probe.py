"""Run a mixed-precision graph and its gradient once more, and see which node half precision was too narrow for.

The operators of the graph run one by one, forward and backward, with nothing left behind: random numbers are those of
the step that is looked at, buffers are copies, parameters get no gradient. A node is at fault forward if what it reads
is finite, and what it makes of it, or the half that it reads it in, is not: infinities that the model itself makes,
such as those of masks, are nobody's fault. Backward, the first node in order whose
operands get a gradient that is not finite is at fault.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.eager_control_flow import EagerInterpreter, eager_call
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.half.apply import CAST
from fxopt.passes.half.plan import PrecisionPlan
from fxopt.regions import COND, WHILE_LOOP

__all__ = ["Seen", "probe", "random_state", "restore_random_state"]

Node = torch.fx.Node


@dataclasses.dataclass
class Seen:
    """What a probe saw.

    Attributes:
        values: The largest magnitude of what a node reads and yields, by name; inf where something is not finite.
        gradients: That of the gradients of its operands and results, scaled as the loss was.
        forward: The first node at fault forward, or None.
        backward: The first node at fault backward, or None.
    """

    values: dict[str, float] = dataclasses.field(default_factory=dict)
    gradients: dict[str, float] = dataclasses.field(default_factory=dict)
    forward: str | None = None
    backward: str | None = None


def probe(
    gm: CapturedModule,
    plan: PrecisionPlan,
    names: Mapping[Node, str],
    loss: Callable[[Callable[..., Any]], torch.Tensor],
    *,
    scale: float,
    random: tuple[torch.Tensor, ...] | None,
) -> Seen:
    """Run a graph and its gradient, and return what was seen of the nodes of its plan.

    Args:
        gm: Computes by the plan; left as it is.
        plan: Which node computes in which type.
        names: What the plan calls the nodes of ``gm``.
        loss: Takes the model to call and returns a loss, a tensor without axes.
        scale: What the loss is multiplied with.
        random: The state of the generators to start from; see :func:`random_state`.
    """
    seen = Seen()

    def model(*args: Any, **kwargs: Any) -> Any:
        leaves = gm.flatten_inputs(*args, **kwargs)
        results = _Probe(gm, plan, names, seen).run(*leaves, enable_io_processing=False)
        return gm.graph.process_outputs(results)

    trained = [parameter for parameter in gm.parameters() if parameter.requires_grad]
    with isolated(gm), torch.enable_grad():
        if random is not None:
            restore_random_state(random)
        reached = loss(model) * scale
        torch.autograd.grad(reached, trained, allow_unused=True)
    if not bool(reached.isfinite()):
        seen.backward = None  # what comes back of a loss that is not finite is nobody's fault
    return seen


def random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the state of the generators that a graph on ``device`` draws from."""
    own = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *own)


def restore_random_state(state: tuple[torch.Tensor, ...]) -> None:
    """Set the generators to a state that :func:`random_state` returned on this device."""
    torch.set_rng_state(state[0])
    for own in state[1:]:
        torch.cuda.set_rng_state(own)


class _Probe(EagerInterpreter):
    """Runs a graph and looks at the nodes that a plan names."""

    def __init__(self, gm: torch.fx.GraphModule, plan: PrecisionPlan, names: Mapping[Node, str], seen: Seen) -> None:
        super().__init__(gm, garbage_collect_values=False)  # what was cast is looked at behind its last use
        self.plan, self.names, self.seen = plan, names, seen

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in (COND, WHILE_LOOP):
            graphs = {COND: (1, 2), WHILE_LOOP: (0, 1)}[n.target]
            inside = [self._region(item) if index in graphs else item for index, item in enumerate(args)]
            return eager_call(n.target)(*inside, **kwargs)
        name = self.names[n]
        if name not in self.plan:
            return eager_call(n.target)(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: self._edge(name, tensor), (args, kwargs))
        result = eager_call(n.target)(*args, **kwargs)
        self._look(name, n, (args, kwargs), result)
        return result

    def _region(self, body: torch.fx.GraphModule) -> Callable[..., Any]:
        inner = _Probe(body, self.plan, self.names, self.seen)
        return lambda *operands: inner.run(*operands, enable_io_processing=False)

    def _edge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what one node reads, apart from what others read of the same value, so that gradients are its own."""
        if not (tensor.requires_grad and tensor.is_floating_point()):
            return tensor
        edge = tensor.view_as(tensor)
        edge.register_hook(lambda gradient: self._look_back(name, gradient))
        return edge

    def _look_back(self, name: str, gradient: torch.Tensor) -> None:
        largest = _largest(gradient)
        if largest == math.inf and self.seen.backward is None:
            self.seen.backward = name
        self.seen.gradients[name] = max(self.seen.gradients.get(name, 0.0), largest)

    def _look(self, name: str, n: Node, read: Any, result: Any) -> None:
        found = max(_largest(read), _largest(result))
        self.seen.values[name] = max(self.seen.values.get(name, 0.0), found)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.is_floating_point():
                leaf.register_hook(lambda gradient: self._note(name, gradient))
        may_be_at_fault = self.plan[name] is self.plan.dtype and self.seen.forward is None
        if may_be_at_fault and found == math.inf and math.isfinite(_largest(self._before_casts(n))):
            self.seen.forward = name

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        self.seen.gradients[name] = max(self.seen.gradients.get(name, 0.0), _largest(gradient))

    def _before_casts(self, n: Node) -> list[Any]:
        """Return what a node reads, in the type in which it was computed, and its own numbers."""
        sources = [source.args[0] if source.target is CAST else source for source in n.all_input_nodes]
        numbers = [leaf for leaf in pytree.tree_leaves((n.args, n.kwargs)) if isinstance(leaf, float)]
        return [*(self.env.get(source) for source in sources if isinstance(source, torch.fx.Node)), *numbers]


def _largest(values: Any) -> float:
    """Return the largest magnitude among tensors and numbers, inf if one is not finite, 0 if there are none."""
    largest = 0.0
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel():
            found = float(leaf.detach().abs().amax())
        elif isinstance(leaf, float):
            found = abs(leaf)
        else:
            continue
        largest = max(largest, found) if math.isfinite(found) else math.inf
    return largest
