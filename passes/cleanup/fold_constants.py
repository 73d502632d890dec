"""Compute what depends on constants alone, once and for all.

    before:  t = transpose(table, 0, 1);  e = exp(t);  y = add(x, e)
    after:   y = add(x, folded)

Exact: the same kernel computes the same bits now as later, and the result keeps its strides, so that the kernels that
read it do the same too. Trainable parameters are no constants, unless they are asked to be: then it is exact up to
rounding, since some kernels are chosen by whether a weight wants a gradient. Nor are buffers that the graph writes;
random calls and calls with effects stay. What the model returns stays a call as well: the caller may write into it, and
must not write into the constant. A result that is much larger than what it is made from stays, so that an ``expand``
does not blow up the file, and a weight that is stored as integers stays one. A size that is known (``sym_size`` of a
fixed axis) becomes a number.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.args import arg, shape_text
from fxopt.contracts import Contract
from fxopt.effects import is_pure
from fxopt.graph_module import graph_modules
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.memory import Memory
from fxopt.rewriter import Rewriter

__all__ = ["FoldConstants"]

aten = torch.ops.aten
# What they hold is whatever the memory held before.
_UNINITIALIZED = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_permuted.default, aten.empty_strided.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip
# What these read of their argument is its type and its sizes, no element of it.
_LIKE = {
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
}  # fmt: skip
_LARGEST_STEP_BYTES = 2**28  # no intermediate result above this is computed, whatever comes of it in the end


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace calls on constants by their results.

    Attributes:
        max_growth_bytes: How many bytes a result may have beyond those of the constants that it replaces.
        parameters: Whether trainable parameters count as constants too; they can then no longer be trained.
    """

    name: ClassVar[str] = "fold-constants"
    max_growth_bytes: int = 65536
    parameters: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.max_growth_bytes < 0:
            raise ValueError(f"max_growth_bytes is {self.max_growth_bytes}; wanted 0 or more")

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # it depends on an option
        """ROUNDING for parameters: ``matmul`` folds the batch of a transposed input if its weight wants a gradient."""
        return Contract.ROUNDING if self.parameters else Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it, each on its own."""
        for module in graph_modules(rw.gm):
            memory = Memory(module)
            constants = _Constants(rw, module, memory, parameters=self.parameters)
            refused = self._too_large(module, constants, memory)
            for node in rw.nodes_of(module):
                if node.op != "call_function":
                    continue
                if (
                    is_number(node.meta.get("val"))
                    and is_pure(node)
                    and "modes" not in node.meta
                    and can_take_numbers(node)
                ):
                    _fold_number(rw, node, node.meta["val"])
                elif node in refused:
                    rw.skip(node, refused[node])
                elif node in constants.known:
                    if any(user not in constants.known or user in refused for user in node.users):
                        _fold(rw, node, constants)
                elif (reason := constants.near_miss(node)) is not None:
                    rw.skip(node, reason)

    def _too_large(
        self, module: torch.fx.GraphModule, constants: _Constants, memory: Memory
    ) -> dict[torch.fx.Node, str]:
        """Return the calls on constants that stay calls, and why; decided from the readers upwards."""
        refused: dict[torch.fx.Node, str] = {}
        for node in reversed(module.graph.nodes):
            if (
                node.op != "call_function"
                or node not in constants.known
                or not isinstance(node.meta.get("val"), torch.Tensor)
            ):
                continue
            if all(user in constants.known and user not in refused for user in node.users):
                continue
            grown = bytes_of(node) - constants.bytes_freed(node)
            if memory.is_returned(node):
                refused[node] = "it is returned, and the caller may write into it"
            elif grown > self.max_growth_bytes:
                refused[node] = f"its result would add {grown} bytes"
        return refused


class _Constants:
    """Which nodes of a graph yield constants, and what they yield."""

    def __init__(self, rw: Rewriter, module: torch.fx.GraphModule, memory: Memory, *, parameters: bool) -> None:
        self.rw = rw
        self.known: set[torch.fx.Node] = set()
        self._values: dict[torch.fx.Node, Any] = {}
        self._variables: dict[torch.fx.Node, str] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
                if memory.is_written(node):
                    self._variables[node] = f"the graph writes {node.target}"
                elif rw.tensor(node).requires_grad and not parameters:
                    self._variables[node] = f"{node.target} is trainable"
                else:
                    self.known.add(node)
            elif node.op == "call_function" and self._is_foldable(node):
                self.known.add(node)

    def _is_foldable(self, node: torch.fx.Node) -> bool:
        if "modes" in node.meta or node.target in _UNINITIALIZED or not is_pure(node):
            return False
        if isinstance(node.target, OpOverload) and node.target.namespace == "fxopt":
            return False  # it reads a tensor that was made small on purpose
        if not all(source in self.known for source in sources_of(node)) or bytes_of(node) > _LARGEST_STEP_BYTES:
            return False
        return isinstance(node.target, OpOverload) or getattr(node.target, "__module__", "") in ("_operator", "math")

    def near_miss(self, node: torch.fx.Node) -> str | None:
        """Return why a call is not constant although all that it reads are attributes and constants; None otherwise."""
        sources = node.all_input_nodes
        if not is_pure(node) or not all(source in self.known or source in self._variables for source in sources):
            return None
        return next((self._variables[source] for source in sources if source in self._variables), None)

    def value(self, node: torch.fx.Node) -> Any:
        """Return what a known node yields."""
        stack = [node]
        while stack:
            current = stack[-1]
            missing = [source for source in sources_of(current) if source not in self._values]
            if missing and current.op == "call_function" and current not in self._values:
                stack += missing
                continue
            stack.pop()
            if current not in self._values:
                self._values[current] = self._compute(current)
        return self._values[node]

    def _compute(self, node: torch.fx.Node) -> Any:
        if node.op == "get_attr":
            return self.rw.tensor(node).detach()
        elements = set(sources_of(node))
        args, kwargs = torch.fx.map_arg(
            (node.args, node.kwargs), lambda source: self._values[source] if source in elements else _blank(source)
        )
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function nodes have a callable target

    def bytes_freed(self, node: torch.fx.Node) -> int:
        """Return the bytes of the attributes that nobody else reads once the call is folded."""
        total, gone, stack = 0, {node}, sources_of(node)
        while stack:
            source = stack.pop()
            if source in gone or not gone.issuperset(source.users):
                continue  # if another reader of it goes as well, it comes up again
            gone.add(source)
            if source.op == "get_attr":
                total += bytes_of(source)
            else:
                stack += sources_of(source)
        return total


def sources_of(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes on whose elements the node's result depends."""
    sources = list(node.all_input_nodes)
    if node.target in _LIKE and has_fixed_sizes(node):
        sources.remove(arg(node, "self"))
    return sources


def has_fixed_sizes(node: torch.fx.Node) -> bool:
    """Return whether a node yields a tensor none of whose sizes is dynamic."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)


def _blank(node: torch.fx.Node) -> torch.Tensor:
    """Return a tensor of the type of a node, and of its sizes where these are fixed, with any elements."""
    value = node.meta["val"]
    if not has_fixed_sizes(node):
        return torch.empty(0, dtype=value.dtype, device=value.device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _fold_number(rw: Rewriter, node: torch.fx.Node, number: Any) -> None:
    for user in list(node.users):
        rw.replace_argument(user, node, number, why=f"{node.name} is {number}")


def _fold(rw: Rewriter, node: torch.fx.Node, constants: _Constants) -> None:
    result = constants.value(node)
    if not isinstance(result, torch.Tensor):
        if is_number(result) and can_take_numbers(node):
            _fold_number(rw, node, result)
        return
    # A copy: the result may be a view of a tensor that stays, and one of many elements in the memory of few.
    own = result.clone(memory_format=torch.preserve_format)
    folded = rw.constant(f"{node.name}_folded", own, near=node, why=f"{node.target} of constants")
    rw.replace_value(node, folded, why=f"computed once: {shape_text(own)}")


def can_take_numbers(node: torch.fx.Node) -> bool:
    """Return whether every reader of ``node`` works with a plain number: regions take values of nodes only."""
    return not any(isinstance(user.target, HigherOrderOperator) for user in node.users)


def is_number(value: Any) -> bool:
    """Return whether a value is a plain number, not a symbolic one."""
    return isinstance(value, bool | int | float)


def bytes_of(node: torch.fx.Node) -> int:
    """Return the bytes of the tensor that a node yields; 0 for other values and for tensors of unknown size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
        return 0
    return math.prod(value.shape) * value.element_size()
