"""Casts where they are needed and nowhere else; weights in half; inner graphs whose sides agree."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.checks import verify
from fxopt.errors import PassError
from fxopt.passes.half import PrecisionPlan
from fxopt.passes.half.apply import apply_plan
from tests.passes.half.nets import (
    Branching,
    Looping,
    Tied,
    Vision,
    all_half,
    applied,
    casts_of,
    graph_of,
    rewriter_of,
    transformer,
)

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("float16", "bfloat16"))
X = torch.linspace(-2, 2, 32).reshape(2, 16)


def chain(x: torch.Tensor) -> torch.Tensor:
    a = torch.sin(x)
    return torch.cos(a) + torch.exp(a) + torch.tanh(a)


def test_one_cast_for_all_readers_of_a_value():
    gm = graph_of(chain, X)
    plan = PrecisionPlan(dict.fromkeys(("cos", "exp", "tanh", "add", "add_1"), torch.float16))
    casts = casts_of(applied(gm, plan))
    assert [(cast.args[0].name, cast.args[1]) for cast in casts] == [("sin", torch.float16), ("add_1", torch.float32)]


def test_no_cast_where_all_computes_in_float32():
    gm = graph_of(chain, X)
    assert casts_of(applied(gm, PrecisionPlan({}))) == []


def test_no_cast_of_a_cast():
    gm = graph_of(chain, X)
    alternating = PrecisionPlan({"sin": torch.float16, "exp": torch.float16})
    casts = casts_of(applied(gm, alternating))
    assert not any(cast.args[0] in casts for cast in casts)
    assert len(casts) == 3  # x down, sin up, exp up


def test_a_value_read_in_both_types_is_cast_once():
    gm = graph_of(chain, X)
    casts = casts_of(applied(gm, PrecisionPlan(dict.fromkeys(("sin", "cos"), torch.float16))))
    assert [cast.args[0].name for cast in casts] == ["x", "sin", "cos"]


@HALVES
def test_a_net_in_half_has_a_cast_at_each_end(dtype):
    gm = graph_of(Vision(), torch.randn(2, 3, 8, 8))
    half = applied(gm, all_half(gm, dtype))
    assert [cast.args[1] for cast in casts_of(half)] == [dtype, torch.float32]


def test_weights_that_half_reads_are_stored_in_half():
    gm = graph_of(transformer(), torch.randn(2, 5, 16))
    half = applied(gm, all_half(gm))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert all(parameter.dtype is torch.float32 for parameter in gm.parameters())


def test_a_tied_weight_stays_one_tensor():
    half = applied(gm := graph_of(Tied(), torch.tensor([[1, 2]])), all_half(gm))
    tensors = [tensor for _, tensor in half.named_parameters(remove_duplicate=False)]
    assert len({id(tensor) for tensor in tensors}) == 1
    assert tensors[0].dtype is torch.float16


def two_readers(weight: torch.Tensor) -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x * self.weight) + torch.cos(x - self.weight)

    return Two()


def test_a_weight_that_both_types_read_stays_float32_where_half_loses_digits():
    half = applied(graph_of(two_readers(torch.tensor([0.1])), X), PrecisionPlan({"mul": torch.float16}))
    assert half.weight.dtype is torch.float32


def test_a_weight_that_both_types_read_is_stored_in_half_where_that_loses_nothing():
    half = applied(graph_of(two_readers(torch.tensor([0.125])), X), PrecisionPlan({"mul": torch.float16}))
    assert half.weight.dtype is torch.float16


def test_batch_norm_statistics_stay_float32():
    gm = graph_of(Vision(), torch.randn(2, 3, 8, 8))
    half = applied(gm, all_half(gm))
    assert half.norm.running_var.dtype is torch.float32
    assert half.conv.weight.dtype is torch.float16


def test_creation_gets_the_type_of_its_plan():
    gm = graph_of(lambda x: x + torch.full((16,), 0.1) + torch.zeros_like(x) + torch.arange(16.0), X)
    half = applied(gm, all_half(gm))
    kinds = {n.name: n.meta["val"].dtype for n in half.graph.nodes if n.name in ("full", "zeros_like", "arange")}
    assert set(kinds.values()) == {torch.float16}
    assert len(casts_of(half)) == 2


def test_zeros_like_casts_nothing_to_learn_a_size():
    gm = graph_of(lambda x: torch.sin(x) + torch.zeros_like(torch.cos(x)), X)
    half = applied(gm, PrecisionPlan({"zeros_like": torch.float16}))
    assert [cast.args[0].name for cast in casts_of(half)] == ["zeros_like"]


def test_a_type_that_the_model_asks_for_itself_is_replaced():
    gm = graph_of(lambda x: torch.softmax(x, -1, dtype=torch.float32), X)
    half = applied(gm, all_half(gm))
    assert next(n for n in half.graph.nodes if n.name == "softmax").meta["val"].dtype is torch.float16


def test_a_move_that_the_plan_does_not_name_follows_its_operand():
    gm = graph_of(lambda x: torch.exp(torch.sin(x).reshape(4, 8)), X)
    half = applied(gm, PrecisionPlan({"sin": torch.float16, "exp": torch.float16}))
    assert next(n for n in half.graph.nodes if n.name == "reshape").meta["val"].dtype is torch.float16


@HALVES
@pytest.mark.parametrize("sign", [1, -1])
def test_both_sides_of_a_branch_agree(dtype, sign):
    x = sign * X.abs() + 0.1
    gm = graph_of(Branching(), x)
    half = applied(gm, all_half(gm, dtype))
    verify(half)
    assert len(casts_of(half)) == 2
    torch.testing.assert_close(half(x), gm(x), rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_a_branch_with_one_side_in_float32_agrees_too():
    gm = graph_of(Branching(), X.abs())
    plan = all_half(gm)
    plan = plan.changed(*(name for name in plan if "false_graph" in name), dtype="float32")
    half = applied(gm, plan)
    for x in (X.abs(), -X.abs()):
        torch.testing.assert_close(half(x), gm(x), rtol=0, atol=1e-2)


@HALVES
def test_what_a_loop_carries_keeps_its_type(dtype):
    gm = graph_of(Looping(), X[:, :8].contiguous())
    half = applied(gm, all_half(gm, dtype))
    verify(half)
    torch.testing.assert_close(half(X[:, :8]), gm(X[:, :8]), rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_without_keep_io_the_border_is_half():
    gm = graph_of(chain, X)
    half = applied(gm, all_half(gm), keep_io=False)
    assert casts_of(half) == []
    assert half.inputs[0].dtype is torch.float16
    assert half(X.half()).dtype is torch.float16


def test_masters_stay_float32_and_get_float32_gradients():
    gm = fxopt.capture(Vision().train(), (torch.randn(2, 3, 8, 8),))
    half = applied(gm, all_half(gm, torch.bfloat16), masters=True)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    half(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype is torch.float32 and p.grad.abs().sum() > 0 for p in half.parameters()
    )


def test_masters_keep_both_modes():
    gm = fxopt.capture(Vision().train(), (torch.randn(4, 3, 8, 8),))
    half = applied(gm, all_half(gm), masters=True)
    before = half.norm.running_mean.clone()
    half.train()(torch.randn(4, 3, 8, 8))
    assert not torch.equal(half.norm.running_mean, before)
    assert half.norm.running_mean.dtype is torch.float32
    held = half.norm.running_mean.clone()
    half.eval()(torch.randn(4, 3, 8, 8))
    assert torch.equal(half.norm.running_mean, held)


def test_a_plan_of_another_graph():
    with pytest.raises(PassError, match=r"the plan names 'conv', which the graph does not have"):
        apply_plan(rewriter_of(graph_of(chain, X)), PrecisionPlan({"conv": torch.float16}))


def test_a_plan_that_makes_integers_half():
    gm = graph_of(lambda x: x.argmax(-1) + 1, X)
    with pytest.raises(PassError, match=r"because +it reads and yields no float32 tensor"):
        apply_plan(rewriter_of(gm), PrecisionPlan({"add": torch.float16}))


def test_a_plan_that_makes_half_what_has_no_such_form():
    gm = graph_of(lambda x: torch.fft.fft(x).real, X)
    name = next(node.name for node in gm.graph.nodes if "fft" in node.name)
    with pytest.raises(PassError, match=r"has no kernel in half precision"):
        apply_plan(rewriter_of(gm), PrecisionPlan({name: torch.float16}))
