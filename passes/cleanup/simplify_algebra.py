"""Simplify arithmetic where the result is the same bit for bit.

    before:  a = mul(x, 1);  b = neg(neg(a));  c = clamp(clamp(b, 0, 6), 1, 3);  d = relu(relu(c))
    after:   d = relu(clamp(x, 1, 3))

Exact for every value, NaN, infinities, subnormal numbers and -0.0 included:

    x * 1, x / 1, x - 0, x ** 1   are x in IEEE 754; x + 0 and x - (-0.0) are not (-0.0 + 0 is 0.0): integers only
    x * -1                        is neg(x): both flip the sign bit alone
    relu(y)                       is y where the operator that makes y never gives a negative number; the integer abs
                                  does, for the smallest integer
    abs(y)                        is y where it never gives -0.0 either: relu(-0.0) is -0.0
    clamp(clamp(x, a, b), c, d)   is clamp(x, max(a, c), min(b, d)), taken only where these do not cross: then x passes
                                  both or none, so that gradients agree too. relu and hardtanh are left out: at their
                                  bounds they pass no gradient, clamp does
    to(to(x, wide), t)            is to(x, t) if wide holds every value of x's type: one rounding in both

Nothing is done where the element type would change. x / 2^k is left alone: x * 2^-k is the same, and no simpler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fxopt.args import arg
from fxopt.contracts import Contract
from fxopt.graph_module import graph_modules
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.memory import same_layout
from fxopt.passes.cleanup.replacement import Replacement
from fxopt.rewriter import Rewriter

__all__ = ["SimplifyAlgebra", "cast_is_transparent", "compose_bounds"]

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
_NEVER_MINUS_ZERO = {aten.sigmoid.default, aten.exp.default, aten.abs.default, aten.softmax.int}
_IDEMPOTENT = {
    aten.abs.default, aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default, aten.sign.default,
}  # fmt: skip
_CLAMPS: dict[Any, tuple[str, ...]] = {
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min",),
    aten.clamp_max.default: ("max",),
}
_FLOATS = {
    torch.float16: {torch.float32, torch.float64},
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float32: {torch.float64},
    torch.float64: set(),
}


@dataclasses.dataclass(frozen=True)
class SimplifyAlgebra(Pass):
    """Remove arithmetic that changes no bit, and join chains of clamps and of casts."""

    name: ClassVar[str] = "simplify-algebra"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for module in graph_modules(rw.gm):
            replace = Replacement(rw, module)
            for node in rw.nodes_of(module):
                if node.op == "call_function" and node.target in _RULES:
                    _RULES[node.target](replace, node)


def _same(node: torch.fx.Node, source: Any) -> bool:
    return isinstance(source, torch.fx.Node) and same_layout(node.meta["val"], source.meta.get("val"))


def _neutral(replace: Replacement, node: torch.fx.Node) -> None:
    name, wanted = _NEUTRAL[node.target]
    operand, source = arg(node, name), arg(node, "self")
    if node.target is aten.mul.Tensor and operand == -1 and _same(node, source) and not isinstance(operand, bool):
        if node.meta["val"].dtype.is_signed:
            _negation(replace, node)
        return
    if isinstance(operand, torch.fx.Node | bool) or operand != wanted:
        return
    if not _same(node, source):
        replace.rw.skip(node, f"the element type changes to {replace.rw.dtype(node)}")
    elif not replace.rw.dtype(node).is_floating_point and not replace.rw.dtype(node).is_complex:
        replace.by_value(node, source, why=f"{wanted} is neutral")
    elif node.target is aten.add.Tensor:
        replace.rw.skip(node, "x + 0 turns -0.0 into 0.0")
    elif node.target is aten.sub.Tensor and math.copysign(1, operand) < 0:
        replace.rw.skip(node, "x - (-0.0) turns -0.0 into 0.0")
    elif node.meta["val"].dtype.is_complex:
        replace.rw.skip(node, "complex arithmetic mixes the parts: infinity times 1 has NaN in it")
    else:
        replace.by_value(node, source, why=f"{wanted} is neutral")


def _negation(replace: Replacement, node: torch.fx.Node) -> None:
    new = replace.by_call(node, aten.neg.default, (arg(node, "self"),), why="times -1 is the negative")
    if new is not None:
        _involution(replace, new)


def _involution(replace: Replacement, node: torch.fx.Node) -> None:
    source = arg(node, "self")
    if source.target is node.target and _same(node, arg(source, "self")):
        replace.by_value(node, arg(source, "self"), why=f"undoes {source.name}")


def _idempotent(replace: Replacement, node: torch.fx.Node) -> None:
    source = arg(node, "self")
    if source.target is node.target and _same(node, source):
        replace.by_value(node, source, why=f"repeats {source.name}")
    elif node.target is aten.abs.default and source.target in _NEVER_MINUS_ZERO and _same(node, source):
        replace.by_value(node, source, why=f"{source.name} is never negative")


def _relu(replace: Replacement, node: torch.fx.Node) -> None:
    source = arg(node, "self")
    if source.target not in _NEVER_NEGATIVE or not _same(node, source):
        return
    if not replace.rw.dtype(node).is_floating_point and source.target is not aten.relu.default:
        replace.rw.skip(node, f"{source.name} of the smallest integer is negative")
    else:
        replace.by_value(node, source, why=f"{source.name} is never negative")


def _where(replace: Replacement, node: torch.fx.Node) -> None:
    yes, no = arg(node, "self"), arg(node, "other")
    if yes is no:
        if _same(node, yes):
            replace.by_value(node, yes, why="both sides are the same")
        else:
            replace.rw.skip(node, "the condition broadcasts the value")


def _clamp(replace: Replacement, node: torch.fx.Node) -> None:
    rw, source = replace.rw, arg(node, "self")
    if source.target not in _CLAMPS:
        return
    first, second = _bounds(source), _bounds(node)
    origin = arg(source, "self")
    if len(source.users) > 1:
        rw.skip(node, f"{source.name} has {len(source.users)} users")
    elif first is None or second is None:
        rw.skip(node, "a bound is symbolic or NaN")
    elif not (_same(node, source) and _same(source, origin)):
        rw.skip(node, "the element type changes")
    elif (joined := compose_bounds(first, second)) is None:
        rw.skip(node, "the bounds cross")
    else:
        replace.by_call(node, aten.clamp.default, (origin, *joined), why=f"joined with {source.name}")


def _bounds(clamp: torch.fx.Node) -> Bounds | None:
    given = {name: arg(clamp, name) for name in _CLAMPS[clamp.target]}
    plain = all(b is None or (isinstance(b, int | float) and not math.isnan(b)) for b in given.values())
    return (given.get("min"), given.get("max")) if plain else None


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


def _cast(replace: Replacement, node: torch.fx.Node) -> None:
    inner = arg(node, "self")
    if inner.target is not aten.to.dtype:
        return
    origin = arg(inner, "self")
    narrow, wide, last = (replace.rw.dtype(item) for item in (origin, inner, node))
    if wide in (narrow, last):
        return
    if not cast_is_transparent(narrow, wide, last):
        replace.rw.skip(node, f"{wide} does not hold every value of {narrow}, or not in a way that {last} keeps")
        return
    args = (origin, last)
    if replace.keeps_layout(node, aten.to.dtype, args):
        new = replace.by_call(node, aten.to.dtype, args, why=f"{inner.name} loses nothing")
        if new is not None and narrow == last:
            replace.by_value(new, origin, why="the element type is that already", is_same_object=True)


def cast_is_transparent(narrow: torch.dtype, wide: torch.dtype, last: torch.dtype) -> bool:
    """Return whether casting from ``narrow`` over ``wide`` to ``last`` is the same as casting without the stop.

    Floating point to integer is left out, but for values that the integer type holds: outside its range the result is
    undefined, and may depend on the way.
    """
    if not _holds(narrow, wide):
        return False
    if last == torch.bool or last.is_floating_point:
        return True
    integers_only = not narrow.is_floating_point and not wide.is_floating_point and not last.is_complex
    return integers_only or _holds(narrow, last)


def _holds(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether every value of one type is a value of the other."""
    if narrow.is_complex or wide.is_complex:
        return False
    if narrow.is_floating_point:
        return wide in _FLOATS.get(narrow, ())
    if narrow == torch.bool:
        return True
    if wide == torch.bool:
        return False
    largest, smallest = torch.iinfo(narrow).max, torch.iinfo(narrow).min
    if wide.is_floating_point:
        return wide in _FLOATS and max(largest, -smallest) <= 2 / torch.finfo(wide).eps
    return torch.iinfo(wide).min <= smallest and largest <= torch.iinfo(wide).max


_RULES: dict[Any, Callable[[Replacement, torch.fx.Node], None]] = {
    **dict.fromkeys(_NEUTRAL, _neutral),
    **dict.fromkeys(_IDEMPOTENT, _idempotent),
    **dict.fromkeys(_CLAMPS, _clamp),
    aten.neg.default: _involution,
    aten.relu.default: _relu,
    aten.where.self: _where,
    aten.to.dtype: _cast,
}
