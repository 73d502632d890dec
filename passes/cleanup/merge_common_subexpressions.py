"""Compute each value once.

    before:  a = relu(x);  b = relu(x);  return add(a, b)
    after:   a = relu(x);  return add(a, a)

Exact: a pure call of the same operator on the same values gives the same bits. Random and effectful calls are never
merged, nor calls whose mode-dependent arguments differ, nor reads of a buffer that the graph writes. Constants of equal
bits count as the same value. Values are numbered in one walk (Cocke 1970, Global Common Subexpression Elimination).

Two values that are merged get the sum of their gradients, which is rounded in another order than before. So a graph in
training mode keeps what its parameters go through.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable
from typing import Any, ClassVar

import torch

from fxopt.args import argument_positions
from fxopt.attributes import get_path, owner_of
from fxopt.contracts import Contract
from fxopt.effects import is_pure, is_random
from fxopt.graph_module import graph_modules
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.memory import Memory, same_layout
from fxopt.passes.cleanup.replacement import Replacement
from fxopt.rewriter import Rewriter

__all__ = ["MergeCommonSubexpressions", "equal_values"]

aten = torch.ops.aten
_Table = dict[torch.fx.Node, torch.fx.Node]
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.eq.Tensor}


@dataclasses.dataclass(frozen=True)
class MergeCommonSubexpressions(Pass):
    """Let equal pure calls, reads of the same attribute, and equal constants become one."""

    name: ClassVar[str] = "merge-common-subexpressions"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it, each on its own."""
        for module in graph_modules(rw.gm):
            replace = Replacement(rw, module)
            first, only_alike = equal_values(module, replace.memory)
            for node in rw.nodes_of(module):
                if node in only_alike:
                    rw.skip(node, only_alike[node])
                elif first[node] is not node:
                    _merge(replace, node, first[node])


def _merge(replace: Replacement, node: torch.fx.Node, twin: torch.fx.Node) -> None:
    if node.op == "get_attr":
        # Two reads of one tensor: their gradients meet in it in either case.
        replace.by_value(node, twin, why=f"equals {twin.name}", is_same_object=True)
    elif isinstance(node.meta.get("val"), torch.Tensor) and not same_layout(node.meta["val"], twin.meta["val"]):
        replace.rw.skip(node, f"its elements lie in another order than those of {twin.name}")
    elif replace.gradients.count(node):
        replace.rw.skip(node, f"the gradients of it and {twin.name} would be summed in another order")
    else:
        replace.by_value(node, twin, why=f"equals {twin.name}", is_same_object=True)


def equal_values(module: torch.fx.GraphModule, memory: Memory) -> tuple[_Table, dict[torch.fx.Node, str]]:
    """Number the values of a graph.

    Returns:
        first: For each node, the first one that has the same value; itself if there is none.
        only_alike: Nodes that do the same as an earlier one and yet may yield another value, and why.
    """
    known: dict[Hashable, torch.fx.Node] = {}
    first: _Table = {}
    only_alike: dict[torch.fx.Node, str] = {}
    constants = _constants_by_content(module, memory)
    for node in module.graph.nodes:
        key = constants.get(node) or value_number(node, first)
        twin = node if key is None else known.setdefault(key, node)
        if twin is not node and node.op == "call_function":
            if is_random(node):
                only_alike[node] = f"it draws other random numbers than {twin.name}"
            elif any(memory.is_written(source) for source in node.all_input_nodes):
                only_alike[node] = f"the graph writes what it and {twin.name} read"
        first[node] = node if node in only_alike else twin
    return first, only_alike


def _constants_by_content(module: torch.fx.GraphModule, memory: Memory) -> dict[torch.fx.Node, Hashable]:
    """Return a key for each read of a constant whose type and sizes another one has too: its bytes, in short."""
    alike: dict[Hashable, list[tuple[torch.fx.Node, torch.Tensor]]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and not memory.is_written(node):
            found = get_path(owner_of(node), str(node.target))
            if isinstance(found, torch.Tensor) and not isinstance(found, torch.nn.Parameter) and _has_bytes(found):
                kind = (found.dtype, found.device, tuple(found.shape), found.stride())
                alike.setdefault(kind, []).append((node, found))
    return {
        node: (kind, content(tensor))
        for kind, members in alike.items()
        if len({id(tensor) for _, tensor in members}) > 1
        for node, tensor in members
    }


def _has_bytes(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def content(tensor: torch.Tensor) -> bytes:
    """Return a digest of the elements of a tensor, in which 0.0 and -0.0 differ."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def value_number(node: torch.fx.Node, first: _Table) -> Hashable | None:
    """Return a key that two nodes share only if they do the same with equal values; None if it is like no other.

    Args:
        node: The node.
        first: For each node before it, the first one with the same value.
    """
    if node.op == "get_attr":
        return ("get_attr", str(node.target)) if isinstance(node.meta.get("val"), torch.Tensor) else None
    if node.op != "call_function" or (not is_pure(node) and not is_random(node)):
        return None
    args: Any = list(node.args)
    kwargs = dict(node.kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        args += [
            kwargs.pop(name, default)
            for name, (position, default, _) in argument_positions(node.target).items()
            if position is not None and position >= len(node.args)
        ]
        # With alpha, add scales its second operand alone.
        plain = kwargs.get("alpha", 1) == 1
        if node.target in _COMMUTATIVE and plain and all(isinstance(item, torch.fx.Node) for item in args[:2]):
            args[:2] = sorted(args[:2], key=lambda source: first[source].name)
    try:
        key = (node.target, _key(args, first), _key(kwargs, first), _key(node.meta.get("modes", {}), first))
        hash(key)
    except TypeError:
        return None
    return key


def _key(item: Any, first: _Table) -> Hashable:
    """Return the argument as something hashable in which 1, 1.0 and True differ, and 0.0 and -0.0 too."""
    if isinstance(item, list | tuple):
        return ("list", *(_key(part, first) for part in item))
    if isinstance(item, dict):
        return tuple((key, _key(part, first)) for key, part in sorted(item.items()))
    if isinstance(item, torch.fx.Node):
        return first[item]
    if isinstance(item, slice):
        return ("slice", *(_key(part, first) for part in (item.start, item.stop, item.step)))
    if isinstance(item, float):
        return ("float", item.hex())
    return (type(item).__name__, item)
