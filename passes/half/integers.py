"""Find the floats that are whole numbers, and how large they can get: lengths, positions, counters, masks.

Half precision holds every whole number up to 2**11 (float16) or 2**8 (bfloat16), and skips some beyond. A length or a
position that skips is wrong by one or more, however small the relative error is; so what counts stays float32 unless a
bound proves that it cannot get there. Calibration inputs prove nothing here: a sequence of deployment may be longer.

The bounds follow from the operators: a comparison yields 0 or 1, ``arange`` no more than its end, a sum no more than
its largest term times the number of terms; a size is as large as its dimension may be.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.args import plain_number
from fxopt.attributes import get_path, owner_of
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.moves import base_name, is_move
from fxopt.regions import COND, body_of

__all__ = ["Whole", "exact_limit", "whole_numbers"]

_BOUNDS = {torch.bool: 1.0, torch.uint8: 255.0, torch.int8: 128.0}
_TRUTHS = {
    "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "isnan", "isinf", "isfinite",
    "any", "all",
}  # fmt: skip
_ROUNDINGS = {"floor", "ceil", "round", "trunc", "fix", "floor_divide"}
_KEEPING = {
    "abs", "amax", "amin", "argsort", "cat", "clamp", "clamp_max", "clamp_min", "concat", "constant_pad_nd",
    "embedding", "gather", "index", "index_select", "masked_fill", "masked_select", "max", "maximum", "min", "minimum",
    "neg", "pad", "relu", "sort", "stack", "to", "_to_copy", "topk", "type_as", "where", "select_mode", "fmod",
    "remainder", "scatter", "index_put", "meshgrid", "broadcast_tensors",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Whole:
    """That a value holds whole numbers alone.

    Attributes:
        bound: No element is larger than this in magnitude; inf if that cannot be told.
        counts: Whether it comes of sizes, positions or integers, so that inputs of calibration do not bound it.
    """

    bound: float
    counts: bool = True

    def exceeds(self, dtype: torch.dtype) -> bool:
        """Return whether it may hold a number that ``dtype`` skips."""
        return self.bound > exact_limit(dtype)


def exact_limit(dtype: torch.dtype) -> int:
    """Return up to where a floating type holds every whole number: 2 to the bits of its significand."""
    return round(2 / torch.finfo(dtype).eps)


def whole_numbers(gm: CapturedModule) -> dict[torch.fx.Node, Whole]:
    """Return what is known of every value that holds whole numbers alone, integers included; inner graphs too."""
    found: dict[torch.fx.Node, Whole] = {}
    largest = {dimension.symbol: dimension.max for dimension in gm.dims.values()}
    for module in graph_modules(gm):  # outer graphs come first, so that placeholders know what they stand for
        for node in module.graph.nodes:
            known = _of_node(node, found, largest)
            if known is not None:
                found[node] = known
            if node.target is COND:
                _bind(node, found)
    return found


def _bind(call: torch.fx.Node, found: dict[torch.fx.Node, Whole]) -> None:
    for side in call.args[1:3]:
        holders = [n for n in body_of(side).graph.nodes if n.op == "placeholder"]  # type: ignore[arg-type]  # a side is a node
        for holder, given in zip(holders, call.args[3], strict=True):  # type: ignore[arg-type]  # the operands are listed
            if given in found:
                found[holder] = found[given]


def _of_node(node: torch.fx.Node, found: dict[torch.fx.Node, Whole], largest: dict[str, int | None]) -> Whole | None:
    if node.op == "get_attr":
        return _of_tensor(node)
    if node in found:
        return found[node]
    by_type = _of_value(node.meta.get("val"), largest)
    if node.op == "placeholder":
        return None if by_type is None else dataclasses.replace(by_type, counts=False)
    if node.op != "call_function":
        return None
    rule = Rules(node, found, largest).whole()
    return _closer(rule, by_type)


def _of_tensor(node: torch.fx.Node) -> Whole | None:
    tensor = get_path(owner_of(node), str(node.target))
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
        return None
    values = tensor.detach().double()
    if values.numel() == 0 or not bool((values.isfinite() & (values == values.round())).all()):
        return None
    return Whole(float(values.abs().max()))


def _of_value(value: Any, largest: dict[str, int | None]) -> Whole | None:
    """Return what the type of a value says."""
    if isinstance(value, bool | int):
        return Whole(abs(int(value)))
    if isinstance(value, torch.SymInt):
        known = largest.get(str(value))
        return Whole(math.inf if known is None else float(known))
    if isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex():
        return Whole(_BOUNDS.get(value.dtype, math.inf))
    return None


def _closer(a: Whole | None, b: Whole | None) -> Whole | None:
    if a is None or b is None:
        return a or b
    return a if a.bound <= b.bound else b


class Rules:
    """What one call does to whole numbers."""

    def __init__(self, node: torch.fx.Node, found: dict[torch.fx.Node, Whole], largest: dict[str, int | None]) -> None:
        self.node, self.found, self.largest = node, found, largest
        self.name = base_name(node)
        self.operands = [self._operand(leaf) for leaf in pytree.tree_leaves((node.args, node.kwargs))]

    def whole(self) -> Whole | None:
        """Return what is known of the result."""
        own = _RULES.get(self.name)
        if own is not None:
            return own(self)
        if self.name in _TRUTHS:
            return Whole(1.0, counts=False)
        tensors = self._of_nodes()
        if self.name in _ROUNDINGS:
            return tensors[0] if tensors and tensors[0] is not None else Whole(math.inf, counts=False)
        if is_move(self.node) or self.node.target is operator.getitem:
            return tensors[0] if tensors else None
        return self._largest() if self.name in _KEEPING else None

    def _operand(self, leaf: Any) -> Whole | None:
        if isinstance(leaf, torch.fx.Node):
            return self.found.get(leaf)
        if isinstance(leaf, float) and leaf == leaf:
            return Whole(abs(leaf), counts=False) if math.isinf(leaf) or leaf == round(leaf) else None
        return _of_value(leaf, {}) if isinstance(leaf, int) and not isinstance(leaf, bool) else None

    def _of_nodes(self) -> list[Whole | None]:
        """Return what is known of the tensors that the call reads."""
        return [
            self.found.get(source)
            for source in self.node.all_input_nodes
            if isinstance(source.meta.get("val"), torch.Tensor | tuple | list)
        ]

    def _known(self) -> list[Whole] | None:
        """Return the two operands of arithmetic, or None if one may be no whole number."""
        both = self.node.args[:2]
        found = [self._operand(part) for part in both]
        return None if any(part is None for part in found) else [part for part in found if part is not None]

    def _largest(self) -> Whole | None:
        """Return what holds for the elements of any operand; infinities among the numbers are exact in any type."""
        values = [*self._of_nodes(), *(self._operand(part) for part in self._scalars())]
        if not values or any(part is None for part in values):
            return None
        known = [part for part in values if part is not None]
        finite = [part for part in known if not (math.isinf(part.bound) and not part.counts)] or known
        return Whole(max(part.bound for part in finite), any(part.counts for part in finite))

    def _scalars(self) -> list[Any]:
        if self.name not in ("masked_fill", "where", "clamp", "clamp_min", "clamp_max"):
            return []
        return [part for part in self.node.args if plain_number(part) is not None]

    def add(self) -> Whole | None:
        known = self._known()
        alpha = plain_number(self.node.kwargs.get("alpha", 1))
        if known is None or alpha is None or alpha != round(alpha):
            return None
        step = abs(alpha)
        return Whole(known[0].bound + step * known[1].bound, any(part.counts for part in known))

    def mul(self) -> Whole | None:
        known = self._known()
        if known is None:
            return None
        bound = 0.0 if 0.0 in (known[0].bound, known[1].bound) else known[0].bound * known[1].bound
        return Whole(bound, any(part.counts for part in known))

    def power(self) -> Whole | None:
        base, exponent = self._operand(self.node.args[0]), self.node.args[1]
        if base is None or not isinstance(exponent, int | float) or exponent < 0 or exponent != round(exponent):
            return None
        return Whole(base.bound**exponent, base.counts)

    def total(self) -> Whole | None:
        """A sum, or a running sum, of at most as many terms as its operand has elements, or its axes have."""
        source = self.node.args[0]
        known = self.found.get(source) if isinstance(source, torch.fx.Node) else None
        if known is None:
            return None
        shape = source.meta["val"].shape  # type: ignore[union-attr]  # it is a node, or nothing is known
        axes = self.node.args[1] if len(self.node.args) > 1 else None
        listed = [axes] if isinstance(axes, int) else list(axes) if isinstance(axes, list | tuple) and axes else None
        sizes = list(shape) if listed is None else [shape[axis] for axis in listed]
        return Whole(known.bound * math.prod(self._size(size) for size in sizes))

    def _size(self, size: Any) -> float:
        known = _of_value(size, self.largest)
        return math.inf if known is None else known.bound

    def arange(self) -> Whole | None:
        numbers = [
            self._operand(part)
            or (_of_value(part.meta.get("val"), self.largest) if isinstance(part, torch.fx.Node) else None)
            for part in self.node.args
        ]
        if any(part is None for part in numbers):
            return None
        return Whole(max(part.bound for part in numbers if part is not None))

    def created(self) -> Whole | None:
        """``full`` and its like: the number is the last positional argument."""
        return self._operand(self.node.args[-1])


_RULES: dict[str, Callable[[Rules], Whole | None]] = {
    "add": Rules.add, "sub": Rules.add, "rsub": Rules.add, "mul": Rules.mul, "pow": Rules.power,
    "sum": Rules.total, "cumsum": Rules.total, "count_nonzero": Rules.total, "arange": Rules.arange,
    "full": Rules.created, "full_like": Rules.created, "new_full": Rules.created, "scalar_tensor": Rules.created,
    "zeros": lambda rules: Whole(0.0), "zeros_like": lambda rules: Whole(0.0), "new_zeros": lambda rules: Whole(0.0),
    "ones": lambda rules: Whole(1.0), "ones_like": lambda rules: Whole(1.0), "new_ones": lambda rules: Whole(1.0),
}  # fmt: skip
