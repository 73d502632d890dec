"""Activation functions that a model spells out: found however they are written, and nothing else."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.passes import FuseActivations, RemoveDeadCode
from fxopt.testing import check_pass

X = torch.linspace(-6, 6, 97).reshape(1, 97)
aten = torch.ops.aten
ROOT_2, ROOT_2_PI = math.sqrt(2), math.sqrt(2 / math.pi)


def targets(gm):
    RemoveDeadCode()(gm)
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


HARD_SIGMOIDS = [
    lambda x: F.relu6(x + 3) / 6,
    lambda x: F.relu6(3 + x) * (1 / 6),
    lambda x: (x + 3).clamp(0, 6) / 6,
    lambda x: (x / 6 + 0.5).clamp(0, 1),
    lambda x: F.hardtanh(x * (1 / 6) + 0.5, 0, 1),
    lambda x: (x.clamp(-3, 3) + 3) / 6,
    lambda x: 1 - F.relu6(3 - x) / 6,
    lambda x: F.hardtanh(x, -3.0, 3.0) / 6 + 0.5,
]
HARD_SWISHES = [
    *[lambda x, f=f: x * f(x) for f in HARD_SIGMOIDS],
    lambda x: x * F.relu6(x + 3) / 6,
    lambda x: x / 6 * F.relu6(x + 3),
    lambda x: F.relu6(x + 3) * x * (1 / 6),
    lambda x: x * (x + 3).clip(0, 6) / 6,
]
GELUS = [
    lambda x: 0.5 * x * (1 + torch.erf(x / ROOT_2)),
    lambda x: x * 0.5 * (1.0 + torch.erf(x * (1 / ROOT_2))),
    lambda x: x * ((torch.erf(x / ROOT_2) + 1) / 2),
    lambda x: x * (0.5 * torch.erf(x * math.sqrt(0.5)) + 0.5),
    lambda x: (x * (torch.erf(x / ROOT_2) + 1)) * 0.5,
]
TANH_GELUS = [
    lambda x: 0.5 * x * (1 + torch.tanh(ROOT_2_PI * (x + 0.044715 * torch.pow(x, 3.0)))),
    lambda x: 0.5 * x * (1 + torch.tanh(ROOT_2_PI * (x + 0.044715 * x * x * x))),
    lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    lambda x: x * (torch.tanh(ROOT_2_PI * x * (0.044715 * x**2 + 1)) + 1) * 0.5,
]


@pytest.mark.parametrize(
    ("fn", "target"),
    [
        *((fn, aten.hardsigmoid.default) for fn in HARD_SIGMOIDS),
        *((fn, aten.hardswish.default) for fn in HARD_SWISHES),
        *((fn, aten.gelu.default) for fn in (*GELUS, *TANH_GELUS)),
        (lambda x: x * torch.tanh(F.softplus(x)), aten.mish.default),
    ],
)
def test_a_function_is_found_however_it_is_written(fn, target):
    assert targets(check_pass(FuseActivations(), fn, X).gm) == [target]


def test_the_two_gelus_are_told_apart():
    for written, approximate in ((GELUS[0], "none"), (TANH_GELUS[0], "tanh")):
        gm = FuseActivations()(fxopt.capture(written, (X,), modes="current")).gm
        (call,) = gm.graph.find_nodes(op="call_function", target=aten.gelu.default)
        assert fxopt.args.arg(call, "approximate") == approximate


@pytest.mark.parametrize("fn", [
    lambda x: F.relu6(x + 3) / 5,
    lambda x: F.relu6(x + 2) / 6,
    lambda x: (x + 3).clamp(0, 5) / 6,
    lambda x: (x + 3).clamp(min=0) / 6,
    lambda x: (x + 3).mul(2).clamp(0, 6) / 6,
    lambda x: -F.relu6(x + 3) / 6,
    lambda x: (x + 1) * F.relu6(x + 3) / 6,
    lambda x: x * F.relu6(x + 3) / 3,
    lambda x: x * x * F.relu6(x + 3) / 6,
    lambda x: 0.5 * x * (1 + torch.erf(x)),
    lambda x: 0.5 * x * (1 - torch.erf(x / ROOT_2)),
    lambda x: 0.4 * x * (1 + torch.erf(x / ROOT_2)),
    lambda x: 0.5 * x * (1 + torch.erf(x / 1.4142)),
    lambda x: 0.5 * x.flip(1) * (1 + torch.erf(x / ROOT_2)),
    lambda x: 0.5 * x * (1 + torch.tanh(ROOT_2_PI * (x + 0.0447 * x**3))),
    lambda x: 0.5 * x * (1 + torch.tanh(ROOT_2_PI * (x + 0.044715 * x**3 + 0.01 * x**2))),
    lambda x: 0.5 * x * (1 + torch.tanh(ROOT_2_PI * (x + 0.044715 * x**4))),
    lambda x: x * torch.tanh(F.softplus(x, beta=2)),
    lambda x: x * torch.tanh(F.softplus(x, threshold=2)),
    lambda x: 2 * x * torch.tanh(F.softplus(x)),
    lambda x: x / F.relu6(x + 3) * 6,
])  # fmt: skip
def test_what_computes_something_else_stays(fn):
    assert not check_pass(FuseActivations(), fn, X).modified


def test_another_type_and_another_shape_stay():
    wide = torch.tensor(1.0, dtype=torch.float64)
    assert not check_pass(FuseActivations(), lambda x, y: x * F.relu6(y + 3) / 6, X, X.reshape(97, 1)).modified
    found = check_pass(FuseActivations(), lambda x, w: 0.5 * (x * w) * (1 + torch.erf(x / ROOT_2)), X.double(), wide)
    assert not found.modified


def test_a_product_of_two_tensors_may_be_what_it_is_a_function_of():
    def gated(x, y):
        z = x * y
        twice = 2 * x
        return 0.5 * z * (1 + torch.erf(z / ROOT_2)), twice * F.relu6(twice + 3) / 6

    assert targets(check_pass(FuseActivations(), gated, X, X.flip(1)).gm) == [
        aten.mul.Tensor, aten.mul.Tensor, aten.gelu.default, aten.hardswish.default,
    ]  # fmt: skip


def test_what_is_read_elsewhere_stays_beside_it():
    def both(x):
        gate = F.relu6(x + 3)
        return x * gate / 6, gate

    found = targets(check_pass(FuseActivations(), both, X).gm)
    assert found == [aten.add.Tensor, aten.relu6.default, aten.hardswish.default]


class Constants(nn.Module):
    """Numbers as constants without axes, as converters write them."""

    def __init__(self, trained):
        super().__init__()
        hold = nn.Parameter if trained else nn.Buffer
        self.three, self.six = hold(torch.tensor(3.0)), hold(torch.tensor(6.0))

    def forward(self, x):
        return x * torch.clamp(x + self.three, 0, 6) / self.six


@pytest.mark.parametrize("trained", [False, True])
def test_constants_count_as_numbers_unless_they_are_trained(trained):
    assert check_pass(FuseActivations(), Constants(trained), X).modified is not trained


def test_gradients_are_those_of_what_was_written():
    for fn in (HARD_SWISHES[-1], GELUS[0], TANH_GELUS[0]):
        gm = FuseActivations()(fxopt.capture(fn, (X,), modes="current")).gm
        gm.recompile()
        x = torch.randn(64, 97, generator=torch.Generator().manual_seed(0)) * 3
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        fn(one).sum().backward()
        gm(other[:1]).sum().backward()
        torch.testing.assert_close(one.grad[:1], other.grad[:1], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1.0, 0.5, 3.0, -1.0, 6.0]), st.sampled_from([1.0, 2.0, 0.25]), st.sampled_from([3.0, 2.0]))
def test_any_numbers_that_make_the_function_are_taken_and_no_others(outer, inner, shift):
    def fn(x):
        return outer * (x * inner) * ((x + shift) * 2).clamp(0, 12)

    found = FuseActivations()(fxopt.capture(fn, (X,), modes="current"))
    assert found.modified is (shift == 3.0 and math.isclose(outer * inner * 12, 1.0))
