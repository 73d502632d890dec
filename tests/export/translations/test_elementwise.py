"""Arithmetic, comparisons and logic: every element type and its promotion, special values, both rounding modes."""

import functools
import operator

import pytest
import torch
from torch import Tensor

from tests.export.proof import INF, NAN, in_parts, integers, op_types, prove, prove_each

pytestmark = pytest.mark.ort

SPECIAL = torch.tensor([[NAN, INF, -INF, 0.0], [-0.0, 1.5, -2.5, 3e-5], [1.0, -1.0, 0.5, -0.5]])
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def sample(dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(3, 4).to(dtype)
    return integers(
        3, 4, low=0 if dtype in (torch.uint8, torch.bool) else -5, high=2 if dtype is torch.bool else 7, dtype=dtype
    )


def positive(x: Tensor) -> Tensor:
    return x if x.dtype is torch.bool else x.abs()


@pytest.mark.parametrize(
    "function", [operator.add, operator.mul, torch.maximum, torch.minimum, operator.eq, operator.lt, operator.ge]
)
def test_binary_in_every_type(function):
    prove_each({dtype: (function, sample(dtype), sample(dtype)) for dtype in DTYPES})


MIXED = [
    (torch.int64, torch.float32),
    (torch.int32, torch.int64),
    (torch.uint8, torch.int8),
    (torch.bool, torch.int16),
    (torch.float16, torch.float32),
    (torch.bool, torch.float32),
    (torch.int64, torch.float16),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("function", [torch.add, torch.mul, torch.div, torch.eq, torch.gt])
def test_mixed_types_are_promoted(function):
    prove_each({types: (function, *map(sample, types)) for types in MIXED})


def test_powers_of_mixed_types_are_promoted():
    prove_each({types: (torch.pow, *(positive(sample(dtype)) for dtype in types)) for types in MIXED})


@pytest.mark.parametrize("function", [torch.add, torch.mul, torch.sub, torch.ne, torch.le])
def test_numbers_are_promoted(function):
    numbers = [(torch.int64, 2.5), (torch.int32, 2), (torch.uint8, -1), (torch.float16, 2), (torch.float64, 3)]
    numbers.append((torch.int8, 100))
    if function is not torch.sub:  # PyTorch does not subtract booleans
        numbers += [(torch.bool, 3), (torch.bool, 1.5), (torch.float32, True)]

    def applied(number):
        return lambda x: function(x, number)

    prove_each({pair: (applied(pair[1]), sample(pair[0])) for pair in numbers})


def test_a_tensor_without_axes_counts_less_than_one_with():
    prove(lambda x, y: x * y, torch.randn(3, 2, dtype=torch.float16), torch.tensor(1.5))
    prove(lambda x, y: x + y, integers(3, 2, dtype=torch.int32), torch.tensor(7))
    prove(lambda x, y: x + y, integers(3, 2), torch.tensor(0.5))


def test_alpha_scales_the_second_operand():
    prove(lambda x, y: torch.add(x, y, alpha=3), torch.randn(3, 2), torch.randn(3, 2))
    prove(lambda x, y: torch.sub(x, y, alpha=2), integers(3, 2), integers(3, 2))
    prove(lambda x: torch.rsub(x, 2.0, alpha=0.5), torch.randn(3, 2))


@pytest.mark.parametrize("mode", ["floor", "trunc", None])
def test_division_rounds_as_asked(mode):
    x = torch.tensor([7, -7, 7, -7, 6, -6, 1, 0])
    y = torch.tensor([2, 2, -2, -2, 3, 3, -5, 4])
    divide = functools.partial(torch.div, rounding_mode=mode)
    types = (torch.int64, torch.int32, torch.int8, torch.float32, torch.float64)
    prove_each({dtype: (divide, x.to(dtype), y.to(dtype)) for dtype in types}, dynamic=False)


def test_floor_division_of_fractions_is_exact():
    x = torch.tensor([1.0, -1.0, 0.3, 5.5, -5.5, INF, 1.0])
    y = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.5, 1.0, 0.0])
    prove(lambda x, y: x // y, x, y, dynamic=False)


@pytest.mark.parametrize("function", [torch.remainder, torch.fmod])
def test_remainders_take_the_right_sign(function):
    x, y = torch.tensor([7, -7, 7, -7, 6, 0]), torch.tensor([3, 3, -3, -3, 2, 5])
    types = (torch.int64, torch.int32, torch.float32)
    prove_each({dtype: (function, x.to(dtype), y.to(dtype)) for dtype in types}, dynamic=False)


UNARY = (
    torch.abs,
    torch.neg,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    torch.exp,
    torch.sin,
    torch.cos,
    torch.floor,
    torch.ceil,
    torch.round,
    torch.trunc,
    torch.sign,
    torch.square,
    torch.reciprocal,
    torch.erf,
    torch.atan,
    torch.isnan,
    torch.isinf,
    torch.isfinite,
    torch.logical_not,
    torch.nan_to_num,
    torch.expm1,
    torch.frac,
    torch.exp2,
    torch.sinc,
)
UNARY_BY_NAME = {function.__name__: function for function in UNARY}


@pytest.mark.parametrize("names", in_parts(UNARY_BY_NAME), ids="-".join)
def test_unary_keeps_nan_and_infinity(names):
    finite = SPECIAL.nan_to_num(0.1, 1.0, -1.0)
    prove_each({name: (UNARY_BY_NAME[name], finite if name in ("sin", "cos", "sinc") else SPECIAL) for name in names})


def test_unary_of_integers():
    functions = (
        torch.sigmoid,
        torch.exp,
        torch.sqrt,
        torch.log,
        torch.sin,
        torch.reciprocal,
        torch.rsqrt,
        torch.log2,
        torch.log10,
        torch.log1p,
        torch.expm1,
        torch.square,
        torch.sign,
        torch.abs,
        torch.neg,
        torch.floor,
        torch.deg2rad,
        torch.angle,
    )
    x = integers(3, 4, low=1, high=6)
    prove_each({function.__name__: (function, x) for function in functions})


def test_log1p_and_expm1_are_accurate_near_zero():
    tiny = torch.tensor([1e-8, -1e-8, 1e-12, 1e-4, 0.0, 3.0])
    prove(lambda x: torch.log1p(x), tiny, dynamic=False)
    prove(lambda x: torch.expm1(x), tiny, dynamic=False)


def test_clamp():
    def clamped(low, high):
        # Beside x itself, for with a NaN bound every element is NaN, and that alone would prove nothing.
        return lambda x: torch.stack([torch.clamp(x, low, high), x], -1)

    bounds = [(0.0, 1.0), (None, 0.5), (-0.5, None), (2.0, 1.0), (-1, 1), (NAN, 1.0)]
    prove_each({pair: (clamped(*pair), SPECIAL) for pair in bounds})


def test_clamp_promotes_and_takes_tensors():
    prove(lambda x: x.clamp(0.5), integers(3, 4))
    prove(lambda x: x.clamp(-2, 3), integers(3, 4, dtype=torch.int16))
    prove(lambda x, lo, hi: torch.clamp(x, lo, hi), torch.randn(3, 4), torch.randn(3, 4) - 1, torch.randn(3, 4) + 1)
    prove(lambda x, lo: x.clamp_min(lo), torch.randn(3, 4), torch.randn(3, 4))


def test_powers():
    x, exponents = torch.rand(3, 4) + 0.1, (2, 3, 0.5, -0.5, -1, 1, 0, 2.5, -2.0)
    prove_each({exponent: (functools.partial(torch.pow, exponent=exponent), x) for exponent in exponents})


def test_powers_of_numbers_and_integers():
    prove(lambda x: 2.0**x, torch.randn(3, 4))
    prove(lambda x: x**3, integers(3, 4))
    prove(lambda x, y: x**y, integers(3, 4, low=1), integers(3, 4, low=0, high=4))


@pytest.mark.parametrize("function", [torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor])
def test_bitwise(function):
    types = (torch.bool, torch.int64, torch.uint8, torch.int8)
    prove_each({dtype: (function, sample(dtype), sample(dtype)) for dtype in types})


@pytest.mark.parametrize("function", [torch.logical_and, torch.logical_or, torch.logical_xor])
def test_logic_of_numbers(function):
    prove(lambda x, y: function(x, y), integers(3, 4, low=0, high=2), torch.randn(3, 4).relu())


def test_where_in_every_type():
    condition = sample(torch.bool)
    prove_each({dtype: (torch.where, condition, sample(dtype), sample(dtype)) for dtype in DTYPES})


def test_where_promotes_and_takes_numbers():
    prove(lambda c, x, y: torch.where(c, x, y), sample(torch.bool), sample(torch.int64), sample(torch.float32))
    prove(lambda c, x: torch.where(c, x, 0.5), sample(torch.bool), sample(torch.float16))
    prove(lambda c, x: torch.where(c, 1, x), sample(torch.bool), sample(torch.float32))


def test_masked_fill():
    types, mask = (torch.float32, torch.int64, torch.bool, torch.int8), sample(torch.bool)
    prove_each({dtype: (lambda x, m: x.masked_fill(m, 1), sample(dtype), mask) for dtype in types})


@pytest.mark.parametrize(
    "target", [torch.float32, torch.float16, torch.int64, torch.int32, torch.bool, torch.uint8], ids=str
)
def test_casts(target):
    drawn = {source: sample(source) for source in DTYPES}
    if target is torch.uint8:  # negative numbers to unsigned ones are undefined
        drawn = {source: positive(x) for source, x in drawn.items()}
    prove_each({source: (lambda x: x.to(target), x) for source, x in drawn.items()})


def test_functions_of_two_numbers():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    x[0, 0] = 0.0
    functions = (torch.atan2, torch.hypot, torch.copysign, torch.fmax, torch.fmin, torch.logaddexp)
    cases = {function.__name__: (function, x, y) for function in functions}
    prove_each(cases | {"xlogy": (torch.xlogy, x.abs(), torch.rand(3, 4) + 0.1)})


def test_atan2_covers_all_quadrants():
    y, x = torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0, -1.0]), torch.tensor([1.0, 0.0, 0.0, -1.0, -1.0, -1.0])
    prove(lambda y, x: torch.atan2(y, x), y, x, dynamic=False)


def test_lerp_addcmul_addcdiv():
    a, b, c = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4) + 0.5
    prove(lambda a, b, c: torch.lerp(a, b, c), a, b, c)
    prove(lambda a, b, c: torch.addcmul(a, b, c, value=0.5), a, b, c)
    prove(lambda a, b, c: torch.addcdiv(a, b, c, value=2), a, b, c)


def test_isclose():
    x = torch.tensor([1.0, 1.0, NAN, INF, 0.0])
    y = torch.tensor([1.0 + 1e-6, 1.1, NAN, INF, 1e-9])
    for equal_nan in (False, True):
        prove(lambda x, y, equal_nan=equal_nan: torch.isclose(x, y, equal_nan=equal_nan), x, y, dynamic=False)


def test_broadcasting_of_dynamic_sizes():
    prove(lambda x, y: x[:, None] - y[None], torch.randn(3, 2), torch.randn(4, 2))


def test_copies_and_no_op_casts_leave_nothing():
    file = prove(lambda x: x.clone().contiguous().float().detach() * 2, torch.randn(3, 4))
    assert op_types(file) == ["Mul"]
