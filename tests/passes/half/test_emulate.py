"""The emulation of half precision, against numpy's and torch's own halves and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt
from fxopt.grouped_ops import GROUPED_MM
from fxopt.passes.half import Emulated
from fxopt.passes.half.emulate import half_call
from tests.passes.half.nets import Branching, Looping, all_half, applied, graph_of, transformer

aten = torch.ops.aten
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("float16", "bfloat16"))
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=20, deadline=None)  # of thousands of numbers each
INF = float("inf")


def bits(tensor: torch.Tensor) -> list[int]:
    """Return the bit patterns, one for all NaN."""
    return torch.where(tensor.isnan(), 0x7E00, tensor.view(torch.int16).to(torch.int32)).tolist()


def patterns(seed: int, count: int = 4096) -> np.ndarray:
    """Return numbers of random bits: subnormals, infinities and NaN among them, u16[count]."""
    return np.random.default_rng(seed).integers(0, 2**16, count, dtype=np.uint16)


@FEW
@given(SEEDS)
def test_arithmetic_is_that_of_numpy_float16(seed):
    x, y = patterns(seed).view(np.float16), patterns(seed + 1).view(np.float16)
    for name, ufunc in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)):
        with np.errstate(all="ignore"):
            want = torch.from_numpy(ufunc(x, y))
        operator = getattr(aten, name).Tensor
        got = half_call(operator, (torch.from_numpy(x), torch.from_numpy(y)), {}, torch.float16)
        assert bits(got) == bits(want), name


@FEW
@given(SEEDS)
@HALVES
def test_functions_are_those_of_the_half_kernels_of_torch(dtype, seed):
    x = torch.from_numpy(patterns(seed).view(np.int16)).view(dtype)
    for name in ("reciprocal", "relu", "neg", "abs", "floor", "square"):
        operator = getattr(aten, name).default
        assert bits(half_call(operator, (x,), {}, dtype)) == bits(operator(x)), name


@FEW
@given(SEEDS)
@HALVES
def test_a_result_is_rounded_to_the_nearest_half(dtype, seed):
    draw = np.random.default_rng(seed)
    numbers = (draw.normal(size=4096) * 10.0 ** draw.integers(-9, 6, 4096)).astype(np.float32)
    got = half_call(aten.to.dtype, (torch.from_numpy(numbers), torch.float32), {}, dtype).float().numpy()
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            want = numbers.astype(np.float16).astype(np.float32)
    else:  # bfloat16 is the upper half of the bits, ties to even
        held = numbers.view(np.uint32).astype(np.uint64)
        want = ((held + 0x7FFF + ((held >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(got, want)


def test_too_large_is_infinite():
    x = torch.tensor([300.0, -300.0]).half()
    assert half_call(aten.mul.Tensor, (x, x), {}, torch.float16).tolist() == [INF, INF]


def test_too_small_is_subnormal_or_zero():
    x = torch.tensor([2.0**-12, 2.0**-13]).half()
    assert half_call(aten.mul.Tensor, (x, x), {}, torch.float16).tolist() == [2.0**-24, 0.0]


@pytest.mark.parametrize(
    ("target", "args", "want"),
    [
        (aten.mul.Tensor, (1e-8,), 0.0),  # the product of the numbers themselves is 1e-5
        (aten.div.Tensor, (1e9,), 0.0),  # infinity divides, where the quotient would be 1e-6
        (aten.masked_fill.Scalar, (torch.tensor([True]), -1e9), -INF),
        (aten.clamp.default, (None, 1e-8), 0.0),
        (aten.sub.Tensor, (torch.tensor([2049]),), 1000 - 2048),
    ],
)
def test_numbers_beside_halves_are_halves(target, args, want):
    assert half_call(target, (torch.tensor([1000.0]).half(), *args), {}, torch.float16).tolist() == [want]


def test_a_factor_of_an_addition_is_no_operand():
    one = torch.tensor([1.0]).half()
    assert half_call(aten.add.Tensor, (one, one), {"alpha": 2049}, torch.float16).item() == 2050


def test_sizes_are_no_operands():
    assert half_call(aten.full.default, ([4099], 0.1), {"dtype": torch.float16}, torch.float16).shape == (4099,)


STEPS = {
    "var": (aten.var.correction, ([1],), {"correction": 1}, lambda x: x.var(1)),
    "std": (aten.std.correction, ([1],), {"correction": 0}, lambda x: x.std(1, correction=0)),
    "norm": (aten.linalg_vector_norm.default, (2, [1]), {}, lambda x: x.norm(dim=1)),
    "norm of order 3": (aten.linalg_vector_norm.default, (3, [1]), {}, lambda x: x.norm(3, dim=1)),
    "norm of order 1": (aten.linalg_vector_norm.default, (1, [1]), {}, lambda x: x.norm(1, dim=1)),
    "logsumexp": (aten.logsumexp.default, ([1],), {}, lambda x: x.logsumexp(1)),
    "log1p": (aten.log1p.default, (), {}, lambda x: x.log1p()),
    "expm1": (aten.expm1.default, (), {}, lambda x: x.expm1()),
    "silu": (aten.silu.default, (), {}, torch.nn.functional.silu),
    "mish": (aten.mish.default, (), {}, torch.nn.functional.mish),
    "rms_norm": (
        aten.rms_norm.default,
        ([32], None, 1e-3),
        {},
        lambda x: torch.nn.functional.rms_norm(x, [32], None, 1e-3),
    ),
    "cosine": (aten.cosine_similarity.default, (torch.linspace(0.1, 0.9, 32),), {}, None),
    "attention": (aten.scaled_dot_product_attention.default, None, {}, None),
    "mean": (aten.mean.dim, ([1],), {}, lambda x: x.mean(1)),
    "groups": (GROUPED_MM, (torch.rand(2, 32, 3), torch.tensor([1, 3])), {}, None),
    "a composite": (aten.cross_entropy_loss.default, (torch.tensor([1, 2, 3, 0]),), {}, None),
}


@HALVES
@pytest.mark.parametrize("accumulate", ["float32", "half"])
@pytest.mark.parametrize("name", STEPS)
def test_steps_compute_the_function_that_the_operator_is(name, accumulate, dtype):
    x = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    target, more, kwargs, want = STEPS[name]
    args = (x, *more) if more is not None else (x.view(1, 2, 2, 32),) * 3
    args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    wide = tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    exact = want(x.double()) if want is not None else target(*wide)
    got = half_call(target, args, kwargs, dtype, accumulate)
    assert got.dtype is dtype
    # Ten roundings at most on the way, none of them amplified for numbers of one sign.
    assert float((got.double() - exact).abs().max()) <= 10 * torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.parametrize("name", ["var", "norm"])
def test_a_sum_of_squares_overflows_in_a_step_although_the_kernel_of_torch_does_not(name):
    x = torch.tensor([200.0, -200.0] * 64).repeat(4, 1).half()
    target, more, kwargs, _ = STEPS[name]
    assert bool(half_call(target, (x, *more), kwargs, torch.float16).isinf().all())
    assert bool(target(x, *more, **kwargs).isfinite().all())


def test_a_variance_is_that_of_the_centred_numbers():
    x = (100 + torch.rand(4, 128, generator=torch.Generator().manual_seed(0))).half()
    target, more, kwargs, want = STEPS["var"]
    exact = want(x.double())
    # The mean is rounded to 1/16 next to a spread of 0.3; a difference of squares of 1e4 would be rounded to 8.
    assert float((half_call(target, (x, *more), kwargs, torch.float16) - exact).abs().max()) < 0.1 * float(exact.max())


def test_rms_norm_of_large_numbers_is_0_in_steps():
    x = torch.full((4, 32), 400.0).half()
    target, more, kwargs, _ = STEPS["rms_norm"]
    assert not half_call(target, (x, *more), kwargs, torch.float16).any()  # 400 / inf
    assert target(x, *more, **kwargs).min() > 0.9


@HALVES
def test_sums_in_half_round_the_running_sum_of_blocks(dtype):
    x = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = torch.zeros(3)
    for block in x.float().split(64, 1):
        want = (want + block.sum(1).to(dtype).float()).to(dtype).float()
    assert torch.equal(half_call(aten.sum.dim_IntList, (x, [1]), {}, dtype, "half").float(), want)


@HALVES
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [[0], [-1], [0, 2], [1, 2], None])
def test_sums_in_half_run_over_the_axes_that_they_are_asked_for(dtype, dim, keepdim):
    x = torch.ones(3, 5, 70).to(dtype)
    target, args = (aten.sum.dim_IntList, (x, dim, keepdim))
    assert torch.equal(half_call(target, args, {}, dtype, "half"), target(*args))


def test_products_in_half_stop_growing_where_a_running_sum_does():
    a, b = torch.ones(1, 70000).half(), torch.ones(70000, 1).half()
    assert half_call(aten.matmul.default, (a, b), {}, torch.float16, "half").item() == INF
    small = half_call(aten.linear.default, (a[:, :1000] / 8, b[:1000].t()), {}, torch.float16, "half")
    assert small.item() == 125


@HALVES
@pytest.mark.parametrize("net", [Branching, Looping, transformer])
def test_a_graph_runs_as_its_own_half_kernels_within_their_rounding(net, dtype):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    x = x if net is transformer else x[:, 0, :8] if net is Looping else x[:, 0]
    gm = graph_of(net(), x)
    half = applied(gm, all_half(gm, dtype))
    torch.testing.assert_close(Emulated(half)(x), half(x), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_a_graph_without_halves_runs_bit_for_bit():
    gm = graph_of(transformer(), torch.randn(2, 5, 16))
    assert torch.equal(Emulated(gm)(gm.samples[0].args[0]), gm(gm.samples[0].args[0]))


def test_it_is_called_as_the_model_is():
    def model(x, scale=2.0):
        return {"a": x * scale, "b": (x.sum(), x.argmax())}

    gm = fxopt.capture(model, (torch.randn(4),))
    got = Emulated(gm)(torch.ones(4))
    assert set(got) == {"a", "b"}
    assert got["b"][0] == 4
