"""Put a precision plan into a graph: casts where a value is read in another type than it has, and types of constants.

    before:  y = linear(x, w, b);  z = softmax(y, -1);  return z          {linear: float16}
    after:   x16 = to(x, float16);  y = linear(x16, w, b)                  w and b are stored in float16
             y32 = to(y, float32);  z = softmax(y32, -1);  return z

A value is cast at most once for each type, however many readers there are, and always from what it was computed as:
there is no cast of a cast. A tensor that only half precision reads is stored in it; one that float32 reads too is
stored in half only if that loses nothing. For training, parameters and buffers stay float32 and are cast where they
are used, so that their gradients arrive in float32 (the master weights of Micikevicius et al., Mixed Precision
Training, ICLR 2018).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.moves import is_move
from fxopt.passes.half.operators import is_float, is_like, kept_operands, makes_floats, refusal, with_dtype
from fxopt.passes.half.plan import PrecisionPlan, dtype_name
from fxopt.regions import COND, WHILE_LOOP, body_of, results_of
from fxopt.retyping import Retyping
from fxopt.rewriter import Rewriter

__all__ = ["CAST", "apply_plan", "check_plan"]

CAST = torch.ops.aten.to.dtype
"""The operator that casts: ``CAST(value, dtype)``."""

Node = torch.fx.Node


def apply_plan(rw: Rewriter, plan: PrecisionPlan, *, keep_io: bool = True, masters: bool = False) -> int:
    """Let every operator compute in the type that a plan says, and return the number of casts inserted.

    Args:
        rw: Its graph is changed, in whichever mode it is.
        plan: See :class:`PrecisionPlan`.
        keep_io: Inputs and outputs stay float32; if not, they are of the plan's type.
        masters: Parameters and buffers stay float32 and are cast where they are used.

    Raises:
        PassError: the plan names a node that the graph does not have, or makes one half that cannot be.
    """
    check_plan(rw, plan)
    return _Application(rw, plan, keep_io=keep_io, masters=masters).run()


def check_plan(rw: Rewriter, plan: PrecisionPlan) -> None:
    """Check that a graph has every node of a plan, and that each can be what the plan says.

    Raises:
        PassError: naming the first that is not there, or cannot compute in half precision.
    """
    nodes = {rw.site_name(node): node for module in graph_modules(rw.gm) for node in module.graph.nodes}
    unknown = [name for name in plan if name not in nodes]
    if unknown:
        raise PassError(
            describe(
                f"the plan names {unknown[0]!r}, which the graph does not have",
                got=f"{len(unknown)} such names",
                wanted="names of nodes of this graph, frozen to evaluation as cast-half does before it plans",
                try_="the plan that CastHalf().make_plan(graph) returns for this very graph",
            )
        )
    for name in plan.half:
        reason = refusal(nodes[name], plan.dtype)
        if reason is not None:
            raise PassError(
                describe(
                    f"the plan lets {name!r} compute in {plan.dtype}, which it cannot",
                    because=reason or "it reads and yields no float32 tensor",
                    try_=f"plan.changed({name!r}, dtype='float32')",
                )
            )


class _Application:
    """One run over a graph and the graphs inside it."""

    def __init__(self, rw: Rewriter, plan: PrecisionPlan, *, keep_io: bool, masters: bool) -> None:
        self.rw, self.plan, self.keep_io, self.masters = rw, plan, keep_io, masters
        self.types = Retyping(rw, f"computes by a plan of {dtype_name(plan.dtype)}")
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        # What was float32 before, by node: what it is now changes as the run goes on.
        self.floats = {
            node for module in graph_modules(rw.gm) for node in module.graph.nodes if is_float(node.meta.get("val"))
        }
        self.makers = {node for node in self.floats if makes_floats(node)}
        self._callers = self._regions()

    def run(self) -> int:
        gm = self.rw.gm
        if not self.masters:
            self._store()
        for node in [node for node in gm.graph.nodes if node.op == "placeholder"]:
            if node in self.floats and not self.keep_io:
                self.types.assume(node, self.plan.dtype)
        wanted = torch.float32 if self.keep_io else self.plan.dtype
        self._graph(gm, [wanted] * len(results_of(gm)))
        if not self.keep_io:
            _retype_inputs(gm, self.plan.dtype)
        return len(self.casts)

    # ---- who wants what

    def computes_in(self, node: Node) -> torch.dtype:
        """Return the type of the floats that a call reads and yields."""
        return self.plan.get(self.rw.site_name(node), torch.float32)

    def follows(self, node: Node) -> bool:
        """Return whether a call takes its operand in whatever type it has: moves that the plan does not name."""
        return is_move(node) and self.rw.site_name(node) not in self.plan

    def demand(self, node: Node) -> set[torch.dtype]:
        """Return the types in which the readers of a value want it."""
        found: set[torch.dtype] = set()
        for reader in node.users:
            found |= self._demand_of(reader, node)
        return found

    def _demand_of(self, reader: Node, node: Node) -> set[torch.dtype]:
        if reader.op == "output":
            caller = self._callers.get(reader.graph)
            if caller is not None:
                return {self.computes_in(caller)}
            return {torch.float32 if self.keep_io else self.plan.dtype}
        if reader.target is WHILE_LOOP and node in reader.args[2]:  # type: ignore[operator]  # the carried values are listed
            return {self.computes_in(reader)}
        if reader.target in (COND, WHILE_LOOP):
            inner = [held for held, given in _bound(reader.target, reader.args) if given is node]
            return set().union(*(self.demand(held) for held in inner))
        if self.follows(reader):
            return self.demand(reader)
        return {torch.float32} if node in kept_operands(reader) else {self.computes_in(reader)}

    def _regions(self) -> dict[torch.fx.Graph, Node]:
        """Return the call that runs each inner graph."""
        found: dict[torch.fx.Graph, Node] = {}
        for module in graph_modules(self.rw.gm):
            for node in module.graph.nodes:
                if node.target in (COND, WHILE_LOOP):
                    found |= {body.graph: node for body in _bodies(node.target, node.args)}
        return found

    # ---- stored tensors

    def _store(self) -> None:
        """Store the tensors that half precision alone reads, or that lose nothing by it, in half."""
        done: set[int] = set()
        for module in graph_modules(self.rw.gm):
            for node in [node for node in module.graph.nodes if node.op == "get_attr" and node in self.floats]:
                tensor = self.rw.tensor(node)
                if id(tensor) in done:
                    continue
                demand = set().union(*(self.demand(read) for read in self.rw.reads(tensor)))
                if demand == {self.plan.dtype} or (self.plan.dtype in demand and _is_exact(tensor, self.plan.dtype)):
                    self.types.store(node, self.plan.dtype)
                done |= {id(tensor), id(self.rw.tensor(node))}

    # ---- calls

    def _graph(self, module: torch.fx.GraphModule, wanted: Iterable[torch.dtype]) -> None:
        for node in list(module.graph.nodes):
            if node.op == "call_function" and not node._erased:
                self._call(node)
        output = module.graph.output_node()
        results = [
            self.cast(result, dtype, output) if isinstance(result, Node) and result in self.floats else result
            for result, dtype in zip(results_of(module), wanted, strict=True)
        ]
        self.types.set_results(module.graph, results)

    def _call(self, node: Node) -> None:
        if node.target in (COND, WHILE_LOOP):
            self._region(node)
            return
        dtype, kept = self.computes_in(node), kept_operands(node)

        def operand(source: Node) -> Node:
            if source not in self.floats or is_like(node) or self.follows(node):
                return source
            return self.cast(source, torch.float32 if source in kept else dtype, node)

        args, kwargs = node.args, dict(node.kwargs)
        if dtype is self.plan.dtype or (is_like(node) and self.types.retyped.intersection(node.all_input_nodes)):
            args, kwargs = with_dtype(node, dtype, kwargs, makes=node in self.makers)
        self.types.set_call(node, *torch.fx.map_arg((args, kwargs), operand))

    def _region(self, call: Node) -> None:
        """Let both sides of a branch, or test and body of a loop, agree on the types of what they get and yield."""
        result = self.computes_in(call)
        carried: Any = call.args[2] if call.target is WHILE_LOOP else ()

        def operand(source: Node) -> Node:
            if source not in self.floats:
                return source
            demand = {result} if source in carried else self._demand_of(call, source)
            return self.cast(source, demand.pop(), call) if len(demand) == 1 else source

        args = torch.fx.map_arg(call.args, operand)
        for held, given in _bound(call.target, args):
            if held in self.floats and given.meta["val"].dtype is not held.meta["val"].dtype:
                self.types.assume(held, given.meta["val"].dtype)
        for body in _bodies(call.target, args):
            self._graph(body, [result] * len(results_of(body)))
        self.types.set_call(call, args, call.kwargs)

    def cast(self, value: Node, dtype: torch.dtype, reader: Node) -> Node:
        """Return ``value`` in a type, by the one cast of it to this type, which stands before its first reader."""
        if value.meta["val"].dtype is dtype:
            return value
        key = (value, dtype)
        if key not in self.casts:
            why = f"{reader.name} reads it in {dtype_name(dtype)}"
            self.casts[key] = self.rw.insert_call(CAST, (value, dtype), before=reader, why=why, sources=[value])
        return self.casts[key]


def _bodies(target: Any, args: Any) -> list[torch.fx.GraphModule]:
    """Return the graphs that a branch or loop with these arguments runs."""
    return [body_of(node) for node in (args[1:3] if target is COND else args[:2])]


def _bound(target: Any, args: Any) -> list[tuple[Node, Any]]:
    """Return the placeholders of the graphs of a branch or loop, each with the value that it stands for."""
    operands = args[3] if target is COND else (*args[2], *args[3])
    return [
        pair
        for body in _bodies(target, args)
        for pair in zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True)
    ]


def _is_exact(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    held = tensor.detach()
    return torch.equal(held.to(dtype).to(held.dtype), held)


def _retype_inputs(gm: CapturedModule, dtype: torch.dtype) -> None:
    """Let the graph say that it takes halves, and hold samples of them."""
    halved = {spec.name for spec in gm.inputs if spec.dtype is torch.float32}
    gm.inputs = tuple(dataclasses.replace(s, dtype=dtype) if s.name in halved else s for s in gm.inputs)
    gm.samples = tuple(sample.map(lambda leaf: leaf.to(dtype) if is_float(leaf) else leaf) for sample in gm.samples)
