"""Put one operator in place of an activation function that a model spells out.

    before:  y = div(mul(x, clamp(add(x, 3), 0, 6)), 6)             after:  y = hardswish(x)
    before:  y = mul(mul(x, 0.5), add(erf(div(x, 1.41421356)), 1))  after:  y = gelu(x)

Runtimes have one kernel for such a function, and quantizers one place less to round at. A function is known by what it
computes, not by how it is spelled: numbers may stand before or behind what they multiply, on either factor or around
the product, and as constants without axes.

    hardsigmoid   a clamp(p x + q, low, high) + b            that is 0, 1, and x / 6 + 1/2 in between
    hardswish     x times that
    gelu          x / 2 (1 + erf(x / sqrt(2)))               Hendrycks, Gimpel: Gaussian Error Linear Units (2016), and
                  x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    mish          x tanh(softplus(x))                        Misra (2019)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from fxopt.args import arg, plain_number
from fxopt.attributes import get_path, owner_of
from fxopt.contracts import Contract
from fxopt.graph_module import graph_modules
from fxopt.limits import LIMITS, limits_of
from fxopt.pass_base import Pass
from fxopt.passes.cleanup.memory import same_layout
from fxopt.rewriter import Rewriter

__all__ = ["FuseActivations"]

aten = torch.ops.aten

_CLOSE = 1e-6  # relative: constants are written with 7 digits, or rounded to float32
_DEGREE = 3
_ROOTS = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, *LIMITS)
_ERF = (0.0, 1 / math.sqrt(2))
_TANH = (0.0, math.sqrt(2 / math.pi), 0.0, 0.044715 * math.sqrt(2 / math.pi))


@dataclasses.dataclass(frozen=True)
class FuseActivations(Pass):
    """Recognize hardsigmoid, hardswish, gelu and mish where a model spells them out."""

    name: ClassVar[str] = "fuse-activations"
    contract: ClassVar[Contract] = Contract.ROUNDING

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for module in graph_modules(rw.gm):
            for node in rw.nodes_of(module, backwards=True):  # the whole of a function before a part of it
                found = _function(node) if node.target in _ROOTS and node.users else None
                if found is not None and same_layout(node.meta["val"], found[1].meta.get("val")):
                    target, x, *options = found
                    why = f"computes {target.overloadpacket.__name__}({x.name})"
                    rw.replace_call(node, target, (x,), dict(zip(("approximate",), options, strict=False)), why=why)


def _function(node: torch.fx.Node) -> tuple[Any, ...] | None:
    """Return the operator and its arguments that compute the same, or None."""
    if (x := _hardsigmoid(node, 1.0)) is not None:
        return aten.hardsigmoid.default, x
    for product, outer in _without_factors(node):
        if product.target is not aten.mul.Tensor:
            continue
        left, right = arg(product, "self"), arg(product, "other")
        if not (isinstance(left, torch.fx.Node) and isinstance(right, torch.fx.Node)):
            continue
        for one, other in ((left, right), (right, left)):
            for x, first in _without_factors(one):
                for gate, second in _without_factors(other):
                    if (found := _gated(x, gate, outer * first * second)) is not None:
                        return found
    return None


def _gated(x: torch.fx.Node, gate: torch.fx.Node, factor: float) -> tuple[Any, ...] | None:
    """Return the operator that computes ``factor * x * gate``, with its arguments, or None."""
    if factor == 0:
        return None
    if _hardsigmoid(gate, 1 / factor) is x:
        return aten.hardswish.default, x
    if gate.target is aten.tanh.default and _close(factor, 1) and _is_softplus(arg(gate, "self"), x):
        return aten.mish.default, x
    inner, slope, offset = _affine(gate)
    if inner.target not in (aten.erf.default, aten.tanh.default):
        return None
    if not (_close(factor * slope, 0.5) and _close(factor * offset, 0.5)):
        return None
    found = _polynomial(arg(inner, "self"), x)
    if found is None:
        return None
    if inner.target is aten.erf.default:
        return (aten.gelu.default, x) if _all_close(found, _ERF) else None
    return (aten.gelu.default, x, "tanh") if _all_close(found, _TANH) else None


def _hardsigmoid(node: torch.fx.Node, highest: float) -> torch.fx.Node | None:
    """Return x if a node computes ``highest * hardsigmoid(x)``."""
    cut, a, b = _affine(node)
    ends = _ends(cut)
    if ends is None or highest <= 0:
        return None
    wanted = (0.0, highest, highest / 6, highest / 2)
    for x, p, q in _affine_forms(arg(cut, "self")):
        low, high = (a * end + b for end in (ends if p > 0 else ends[::-1]))
        found = (low, high, a * p, a * q + b)
        if all(abs(one - other) <= _CLOSE * highest for one, other in zip(found, wanted, strict=True)):
            return x
    return None


def _ends(node: torch.fx.Node) -> tuple[float, float] | None:
    """Return where a node cuts off what it reads; None if it does something else, or at one end alone."""
    low, high = limits_of(node) or (None, None)
    return None if low is None or high is None else (low, high)


def _is_softplus(node: Any, x: torch.fx.Node) -> bool:
    if not isinstance(node, torch.fx.Node) or node.target is not aten.softplus.default:
        return False
    threshold = plain_number(arg(node, "threshold"))
    return arg(node, "self") is x and arg(node, "beta") == 1 and threshold is not None and threshold >= 20


def _number(held: Any) -> float | None:
    """Return a number, or the one that a constant without axes holds."""
    if (number := plain_number(held)) is not None:
        return number
    if isinstance(held, torch.fx.Node) and held.op == "get_attr":
        tensor = get_path(owner_of(held), str(held.target))
        is_constant = isinstance(tensor, torch.Tensor) and tensor.ndim == 0 and not tensor.requires_grad
        return float(tensor) if is_constant and tensor.is_floating_point() else None
    return None


def _term(node: torch.fx.Node) -> tuple[torch.fx.Node, float, float] | None:
    """Return ``(y, a, b)`` with ``node = a y + b``, one operator further back; None if it is not of that kind."""
    if node.target is aten.neg.default:
        return arg(node, "self"), -1.0, 0.0
    if node.target is aten.rsub.Scalar:
        alpha, number = plain_number(arg(node, "alpha")), plain_number(arg(node, "other"))
        return None if alpha is None or number is None else (arg(node, "self"), -alpha, number)
    if node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        return None
    left, right = arg(node, "self"), arg(node, "other")
    first, second = _number(left), _number(right)
    if (first is None) == (second is None):
        return None
    inner, number = (left, second) if first is None else (right, first)
    if not isinstance(inner, torch.fx.Node) or number is None:
        return None
    if node.target is aten.mul.Tensor:
        return inner, number, 0.0
    if node.target is aten.div.Tensor:
        return (inner, 1 / number, 0.0) if first is None and number else None
    alpha = plain_number(arg(node, "alpha"))
    if alpha is None:
        return None
    sign = alpha if node.target is aten.add.Tensor else -alpha
    return (inner, 1.0, sign * number) if first is None else (inner, sign, number)


def _affine_forms(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, float, float]]:
    """Yield ``(y, a, b)`` with ``node = a y + b``: the node itself first, then one operator further back each time."""
    a, b = 1.0, 0.0
    yield node, a, b
    while (found := _term(node)) is not None:
        node, slope, offset = found
        a, b = a * slope, a * offset + b
        yield node, a, b


def _affine(node: torch.fx.Node) -> tuple[torch.fx.Node, float, float]:
    """Return the last of these forms."""
    *_, last = _affine_forms(node)
    return last


def _without_factors(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, float]]:
    """Yield ``(y, a)`` with ``node = a y``: the node itself first, then what is left of it without its numbers."""
    factor = 1.0
    yield node, factor
    while (found := _term(node)) is not None and found[2] == 0:
        node, factor = found[0], factor * found[1]
        yield node, factor


def _polynomial(node: Any, x: torch.fx.Node) -> list[float] | None:
    """Return the coefficients of a polynomial in ``x``, that of 1 first; None if it is none, or of a high degree."""
    if node is x:
        return [0.0, 1.0]
    if (number := _number(node)) is not None:
        return [number]
    if not isinstance(node, torch.fx.Node):
        return None
    if node.target is aten.pow.Tensor_Scalar:
        exponent, base = arg(node, "exponent"), _polynomial(arg(node, "self"), x)
        if base is None or exponent not in (1, 2, 3):
            return None
        found = base
        for _ in range(int(exponent) - 1):
            found = _product(found, base)
        return found if len(found) <= _DEGREE + 1 else None
    if (term := _term(node)) is not None and (inner := _polynomial(term[0], x)) is not None:
        scaled = [term[1] * one for one in inner]
        return [scaled[0] + term[2], *scaled[1:]]
    if node.target not in (aten.add.Tensor, aten.mul.Tensor):
        return None
    left, right = _polynomial(arg(node, "self"), x), _polynomial(arg(node, "other"), x)
    if left is None or right is None:
        return None
    if node.target is aten.mul.Tensor:
        found = _product(left, right)
        return found if len(found) <= _DEGREE + 1 else None
    alpha = plain_number(arg(node, "alpha"))
    return None if alpha is None else _sum(left, [alpha * one for one in right])


def _product(left: Sequence[float], right: Sequence[float]) -> list[float]:
    found = [0.0] * (len(left) + len(right) - 1)
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            found[i + j] += one * other
    return found


def _sum(left: Sequence[float], right: Sequence[float]) -> list[float]:
    size = max(len(left), len(right))
    return [(left[i] if i < len(left) else 0.0) + (right[i] if i < len(right) else 0.0) for i in range(size)]


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _CLOSE * abs(other)


def _all_close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return all(abs(one) <= _CLOSE for one in _sum(found, [-one for one in wanted]))
