"""simplify-algebra: bit by bit against eager, on all special values of every type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import inf, nan

import fxopt
from fxopt.passes import SimplifyAlgebra
from fxopt.passes.cleanup.simplify_algebra import cast_is_transparent, compose_bounds
from fxopt.testing import check_pass

X = torch.tensor([[-9.0, -1.5, 0.25], [2.5, 9.0, nan]])
Function = Callable[[torch.Tensor], Any]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def special(dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of both signs, subnormal and extreme numbers, infinities and NaN; long enough for vector code."""
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.tensor([info.min, info.max, 0, 1, 2, 7, info.min + 1, info.max - 1] * 9 + [info.min], dtype=dtype)
    info = torch.finfo(dtype)
    values = [0.0, -0.0, inf, -inf, nan, info.max, info.min, info.tiny, -info.tiny, info.tiny / 4, 1.0, -1.0, 0.1, -2.5]
    return torch.tensor([*values, 6.0, 6.5, -3.0, info.eps] * 7 + [-0.0], dtype=torch.float64).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the elements as integers, each NaN as the same one."""
    x = torch.where(x.isnan(), torch.tensor(7.25, dtype=x.dtype), x) if x.is_floating_point() else x
    return x.view(_AS_INTEGER[x.element_size()]) if x.dtype != torch.bool else x


def calls(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in gm.graph.nodes if node.op == "call_function"]


RULES: dict[str, tuple[Function, list[str]]] = {
    "times one": (lambda x: x * 1, []),
    "divided by one": (lambda x: x / 1.0, []),
    "minus zero": (lambda x: x - 0, []),
    "to the first": (lambda x: x**1, []),
    "negative twice": (lambda x: x.neg().neg(), []),
    "times minus one": (lambda x: x * -1, ["neg"]),
    "times minus one twice": (lambda x: (x * -1.0).neg(), []),
    "relu twice": (lambda x: x.relu().relu(), ["relu"]),
    "relu of sigmoid": (lambda x: x.sigmoid().relu(), ["sigmoid"]),
    "relu of exp": (lambda x: x.exp().relu(), ["exp"]),
    "relu of relu6": (lambda x: torch.nn.functional.relu6(x).relu(), ["relu6"]),
    "abs twice": (lambda x: x.abs().abs(), ["abs"]),
    "abs of exp": (lambda x: x.exp().abs(), ["exp"]),
    "abs of relu": (lambda x: x.relu().abs(), ["relu", "abs"]),
    "floor twice": (lambda x: x.floor().floor(), ["floor"]),
    "round twice": (lambda x: x.round().round(), ["round"]),
    "sign twice": (lambda x: x.sign().sign(), ["sign"]),
    "clamp twice": (lambda x: x.clamp(0.5, 6.0).clamp(1.0, 9.0), ["clamp"]),
    "clamp of each side": (lambda x: torch.clamp_max(torch.clamp_min(x, -1.5), 2.0), ["clamp"]),
    "where of one": (lambda x: torch.where(x > 0, x, x), []),
    "double and back": (lambda x: x.to(torch.float64).to(torch.float32), []),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    function, left = RULES[name]
    # The borders keep what is returned apart from what is simplified.
    result = check_pass(SimplifyAlgebra(), lambda x: function(x.sinh()).sin(), X)
    assert calls(result.gm) == ["sinh", *left, "sin"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", RULES)
def test_rule_keeps_every_bit(name: str, dtype: torch.dtype) -> None:
    function = RULES[name][0]
    x = special(dtype)
    gm = SimplifyAlgebra()(fxopt.capture(lambda x: function(x.clone()), (x,))).gm
    want, got = function(x), gm(x)
    assert got.dtype == want.dtype
    assert torch.equal(bits(got), bits(want)), (x[bits(got) != bits(want)], got[bits(got) != bits(want)])


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 1, lambda x: x + 0, lambda x: x - 0, lambda x: x**1, lambda x: x / 1, lambda x: x * -1,
        lambda x: x.neg().neg(), lambda x: x.abs().abs(), lambda x: x.abs().relu(), lambda x: x.relu().abs(),
        lambda x: x.clamp(1, 100).clamp(3), lambda x: x.clamp(1, 100).clamp(0.5), lambda x: x * 1.0,
    ],
)  # fmt: skip
def test_integers_keep_every_bit(function: Function, dtype: torch.dtype) -> None:
    x = special(dtype)
    gm = SimplifyAlgebra()(fxopt.capture(lambda x: function(x.clone()), (x,))).gm
    want, got = function(x), gm(x)
    assert got.dtype == want.dtype
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("name", [name for name in RULES if "sign" not in name and "where" not in name])
def test_rule_keeps_every_bit_of_the_gradient(name: str) -> None:
    function = RULES[name][0]
    values = special(torch.float32)
    gm = SimplifyAlgebra()(fxopt.capture(lambda x: function(x.clone()), (values,))).gm
    upstream = torch.linspace(-3, 3, values.numel())
    gradients = []
    for run in (function, gm):
        x = values.clone().requires_grad_()
        run(x).backward(upstream)
        gradients.append(x.grad)
    finite = values.isfinite()
    assert torch.equal(gradients[0][finite].nan_to_num(7), gradients[1][finite].nan_to_num(7))


@pytest.mark.parametrize(
    ("function", "x", "why"),
    [
        (lambda x: x + 0.0, X, "x + 0 turns -0.0 into 0.0"),
        (lambda x: x - -0.0, X, "x - (-0.0) turns -0.0 into 0.0"),
        (lambda x: x / 1, torch.arange(3), "the element type changes to torch.float32"),
        (lambda x: x.clamp(0.0, 1.0).clamp(2.0, 3.0), X, "the bounds cross"),
        (lambda x: x.clamp(3.0, 1.0).clamp(0.0), X, "the bounds cross"),
        (lambda x: x.clamp(nan, 1.0).clamp(0.0), X, "a bound is symbolic or NaN"),
        (lambda x: (y := x.clamp(0.0), y.clamp(max=1.0)), X, "clamp has 2 users"),
        (lambda x: x.clamp(0, 3).clamp(0.5), torch.arange(6), "the element type changes"),
        (lambda x: torch.where(torch.ones(4, 1, 1) > 0, x, x), X, "the condition broadcasts the value"),
        (lambda x: x.abs().relu(), torch.arange(3), "abs_1 of the smallest integer is negative"),
        (
            lambda x: x.to(torch.float16).to(torch.float32), X,
            "torch.float16 does not hold every value of torch.float32, or not in a way that torch.float32 keeps",
        ),
        (
            lambda x: x * 1, X,
            "it is returned, and must not share the memory of x, which is not the caller's to write",
        ),
        (lambda x: x * 1, torch.ones(3) + 1j, "complex arithmetic mixes the parts: infinity times 1 has NaN in it"),
    ],
)  # fmt: skip
def test_leaves_alone_and_says_why(function: Function, x: torch.Tensor, why: str) -> None:
    assert not check_pass(SimplifyAlgebra(), function, x, skips=[why]).modified


BOUND = st.none() | st.sampled_from([-3.0, -1.0, 0.0, 1.0, 2.5, inf, -inf])


@given(st.tuples(BOUND, BOUND), st.tuples(BOUND, BOUND), st.sampled_from(FLOATS))
def test_one_clamp_equals_two_in_value_and_gradient(first: Any, second: Any, dtype: torch.dtype) -> None:
    def clamp(x: torch.Tensor, bounds: Any) -> torch.Tensor:
        return x if bounds == (None, None) else torch.clamp(x, *bounds)

    joined = compose_bounds(first, second)
    if joined is None:
        return
    results = []
    for chain in ([joined], [first, second]):
        x = torch.tensor([-9.0, -3.0, -1.0, -0.5, 0.25, 1.0, 2.5, 9.0, nan, inf, -inf]).to(dtype).requires_grad_()
        y = x
        for bounds in chain:
            y = clamp(y, bounds)
        (y * torch.arange(1, 12)).sum().backward() if y is not x else None
        results.append((y.detach(), x.grad if x.grad is not None else torch.arange(1, 12).to(dtype)))
    (a, da), (b, db) = results
    assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    finite = x.detach().isfinite()
    assert torch.equal(da[finite], db[finite])


ALL = [*FLOATS, *INTEGERS, torch.bool]


@given(st.sampled_from(ALL), st.sampled_from(ALL), st.sampled_from(ALL))
def test_a_transparent_cast_changes_no_bit(narrow: torch.dtype, wide: torch.dtype, last: torch.dtype) -> None:
    if cast_is_transparent(narrow, wide, last):
        x = torch.tensor([True, False]) if narrow == torch.bool else special(narrow)
        assert torch.equal(bits(x.to(wide).to(last)), bits(x.to(last)))


@pytest.mark.parametrize(
    ("narrow", "wide", "last", "transparent"),
    [
        (torch.float16, torch.float32, torch.bfloat16, True),
        (torch.int8, torch.float16, torch.float32, True),
        (torch.int32, torch.float32, torch.float64, False),
        (torch.int64, torch.float64, torch.int64, False),
        (torch.float32, torch.float64, torch.int8, False),
        (torch.int32, torch.float64, torch.int8, False),
        (torch.int32, torch.int64, torch.int8, True),
        (torch.uint8, torch.int8, torch.int16, False),
        (torch.float32, torch.bool, torch.float32, False),
        (torch.bfloat16, torch.float16, torch.float32, False),
    ],
)
def test_which_casts_are_transparent(
    narrow: torch.dtype, wide: torch.dtype, last: torch.dtype, transparent: bool
) -> None:
    assert cast_is_transparent(narrow, wide, last) is transparent
