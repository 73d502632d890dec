"""Simplify arithmetic where the result is the same bit for bit.

    before:  a = mul(x, 1);  b = neg(neg(a));  c = clamp(clamp(b, 0, 6), 1, 3);  d = relu(relu(c))
    after:   d = relu(clamp(x, 1, 3))

Exact for every value, NaN, infinities and subnormal numbers included, up to the sign of zero:
x * 1, x / 1, x - 0 and x ** 1 are x in IEEE 754; x + 0 is not (-0.0 + 0 is 0.0), so it goes for integers only.
relu(y) is y where y is never negative. clamp(clamp(x, a, b), c, d) is clamp(x, max(a, c), min(b, d)), taken only
where the bounds do not cross, so that gradients agree too. Nothing is done where the element type would change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fxopt.args import arg
from fxopt.contracts import Contract
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["SimplifyAlgebra", "compose_bounds"]

aten = torch.ops.aten
Bounds = tuple[float | None, float | None]
_NEUTRAL: dict[Any, tuple[str, float]] = {
    aten.mul.Tensor: ("other", 1),
    aten.div.Tensor: ("other", 1),
    aten.sub.Tensor: ("other", 0),
    aten.add.Tensor: ("other", 0),
    aten.pow.Tensor_Scalar: ("exponent", 1),
}
_NEVER_NEGATIVE = {
    aten.relu.default, aten.relu6.default, aten.sigmoid.default, aten.exp.default, aten.abs.default, aten.softmax.int,
    aten.hardsigmoid.default,
}  # fmt: skip
_IDEMPOTENT = {
    aten.abs.default,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.trunc.default,
    aten.sign.default,
}


@dataclasses.dataclass(frozen=True)
class SimplifyAlgebra(Pass):
    """Remove arithmetic that changes no bit, and join chains of clamps."""

    name: ClassVar[str] = "simplify-algebra"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for node in rw.calls(*_RULES):
            _RULES[node.target](rw, node)


def _same(node: torch.fx.Node, source: Any) -> bool:
    if not isinstance(source, torch.fx.Node):
        return False
    a, b = node.meta["val"], source.meta.get("val")
    return isinstance(b, torch.Tensor) and a.dtype == b.dtype and [str(s) for s in a.shape] == [str(s) for s in b.shape]


def _neutral(rw: Rewriter, node: torch.fx.Node) -> None:
    name, wanted = _NEUTRAL[node.target]
    operand, source = arg(node, name), arg(node, "self")
    if isinstance(operand, torch.fx.Node | bool) or operand != wanted:
        return
    if not _same(node, source):
        rw.skip(node, f"the element type changes to {rw.dtype(node)}")
    elif node.target is aten.add.Tensor and rw.dtype(node).is_floating_point:
        rw.skip(node, "x + 0 turns -0.0 into 0.0")
    else:
        rw.replace_value(node, source, why=f"{wanted} is neutral")


def _involution(rw: Rewriter, node: torch.fx.Node) -> None:
    source = arg(node, "self")
    if source.target is node.target:
        rw.replace_value(node, arg(source, "self"), why=f"undoes {source.name}")


def _idempotent(rw: Rewriter, node: torch.fx.Node) -> None:
    source = arg(node, "self")
    if source.target is node.target and source.args[1:] == node.args[1:] and source.kwargs == node.kwargs:
        rw.replace_value(node, source, why=f"repeats {source.name}")
    elif node.target is aten.abs.default and source.target in _NEVER_NEGATIVE and _same(node, source):
        rw.replace_value(node, source, why=f"{source.name} is never negative")


def _relu(rw: Rewriter, node: torch.fx.Node) -> None:
    source = arg(node, "self")
    if source.target in _NEVER_NEGATIVE and _same(node, source):
        rw.replace_value(node, source, why=f"{source.name} is never negative")


def _where(rw: Rewriter, node: torch.fx.Node) -> None:
    yes, no = arg(node, "self"), arg(node, "other")
    if yes is no:
        if _same(node, yes):
            rw.replace_value(node, yes, why="both sides are the same")
        else:
            rw.skip(node, "the condition broadcasts the value")


def _clamp(rw: Rewriter, node: torch.fx.Node) -> None:
    source = arg(node, "self")
    if source.target is not aten.clamp.default:
        return
    first, second = _bounds(source), _bounds(node)
    if len(source.users) > 1:
        rw.skip(node, f"{source.name} has {len(source.users)} users")
    elif first is None or second is None:
        rw.skip(node, "a bound is symbolic or NaN")
    elif not (_same(node, source) and _same(source, arg(source, "self"))):
        rw.skip(node, "the element type changes")
    elif (joined := compose_bounds(first, second)) is None:
        rw.skip(node, "the bounds cross")
    else:
        rw.replace_call(node, aten.clamp.default, (arg(source, "self"), *joined), why=f"joined with {source.name}")


def _bounds(clamp: torch.fx.Node) -> Bounds | None:
    found = arg(clamp, "min"), arg(clamp, "max")
    plain = all(b is None or (isinstance(b, int | float) and not math.isnan(b)) for b in found)
    return found if plain else None


def compose_bounds(first: Bounds, second: Bounds) -> Bounds | None:
    """Return the bounds of the clamp that equals two in sequence; None if the intervals have no point in common.

    Args:
        first: (smallest, largest) of the inner clamp; None is no bound.
        second: The same of the outer clamp.
    """
    lows = [low for low, _ in (first, second) if low is not None]
    highs = [high for _, high in (first, second) if high is not None]
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and low > high:
        return None
    return low, high


_RULES: dict[Any, Callable[[Rewriter, torch.fx.Node], None]] = {
    **dict.fromkeys(_NEUTRAL, _neutral),
    **dict.fromkeys(_IDEMPOTENT, _idempotent),
    aten.neg.default: _involution,
    aten.relu.default: _relu,
    aten.where.self: _where,
    aten.clamp.default: _clamp,
}
