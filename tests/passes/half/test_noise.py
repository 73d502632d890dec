"""Predicted noise against noise that is measured, and what must not be half at all."""

import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes.half import Emulated, PrecisionPlan, half_candidates
from fxopt.passes.half.constants import lost_numbers
from fxopt.passes.half.cut import in_decibels
from fxopt.passes.half.noise import Measured, Settings, measure_noise
from fxopt.passes.half.planning import signal_to_noise
from tests.passes.half.nets import Branching, Vision, applied, graph_of, rewriter_of, transformer

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def measured(gm, dtype=torch.float16, headroom=2.0) -> Measured:
    rw = rewriter_of(gm)
    names = frozenset(half_candidates(rw, dtype)[0])
    return measure_noise(rw.gm, rw.gm.samples, Settings(dtype, headroom, "float32", rw.site_name, names))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("float16", "bfloat16"))
@pytest.mark.parametrize("net", [Vision, transformer, Branching])
def test_noise_of_all_nodes_together_is_what_the_emulated_graph_has(net, dtype):
    x = {Vision: torch.randn(4, 3, 8, 8), transformer: torch.randn(4, 6, 16), Branching: X.abs()}[net]
    gm = graph_of(net(), x)
    found = measured(gm, dtype)
    plan = PrecisionPlan(dict.fromkeys(half_candidates(rewriter_of(gm), dtype)[0], dtype))
    emulated = Emulated(applied(gm, plan)).flat_outputs(x)
    predicted = in_decibels(sum(found.noise.values()) + found.cast_noise["x" if net is not transformer else "src"])
    # Eight projections of a sum of many noises: within a few dB, and errors that cancel are not foreseen.
    assert abs(predicted - signal_to_noise([gm.flat_outputs(x)], [emulated])) < 5


class Unequal(nn.Module):
    def forward(self, x):
        large = torch.sin(x) * 100.0
        small = torch.cos(x) * 0.01
        return (large + small) - large


@pytest.mark.parametrize("name", ["sin", "mul", "tanh", "add", "exp"])
def test_noise_of_a_node_is_what_it_does_alone(name):
    gm = graph_of(lambda x: torch.exp(torch.tanh(torch.sin(x) * 3) + 0.1), X)
    found, reads = measured(gm), {"sin": "x", "mul": "sin", "tanh": "mul", "add": "tanh", "exp": "add"}
    half = applied(gm, PrecisionPlan({name: torch.float16}))
    alone = in_decibels(found.noise[name] + found.cast_noise[reads[name]])
    got = signal_to_noise([gm.flat_outputs(X)], [Emulated(half).flat_outputs(X)])
    assert abs(alone - got) < 5


def test_a_cancelling_sum_is_the_noisiest():
    noise = measured(graph_of(Unequal(), X)).noise
    assert max(noise, key=noise.get) == "add"
    assert noise["add"] > 1 > 1e-4 > noise["mul_1"]


def test_a_value_near_the_end_of_the_range_stays_out_by_the_headroom():
    gm = graph_of(lambda x: (x.clamp(-1, 1) * 40000.0).sin(), X)
    assert "reaches 4e+04, and float16 ends at 65504" in measured(gm).values["mul"]
    assert "mul" not in measured(gm, headroom=1.5).values


def test_infinities_that_float32_has_too_are_fine():
    gm = graph_of(lambda x: torch.softmax(x.masked_fill(x > 0, -math.inf), -1), X)
    found = measured(gm)
    assert found.values == {}
    assert found.operators == {}
    assert all(math.isfinite(noise) for noise in found.noise.values())


def test_zeros_that_are_divided_by():
    def divides(x):
        small = torch.sigmoid(x) * 0.001 * 0.0001
        return (x / small).sin()

    assert "is 0 in float16, and is divided by" in measured(graph_of(divides, X - 4)).values["mul_1"]


def test_zeros_that_nothing_divides_by_are_noise():
    gm = graph_of(lambda x: (torch.sigmoid(x) * 0.001 * 0.0001) + x, X - 4)
    assert "mul_1" not in measured(gm).values


def test_a_step_that_overflows_inside_an_operator():
    gm = graph_of(lambda x: x.var(-1), X * 400)
    assert measured(gm).operators == {"var": "a step of it leaves the range of float16"}
    assert measured(gm, torch.bfloat16).operators == {}


def test_an_operator_that_torch_has_no_half_kernel_of():
    gm = graph_of(lambda x: nn.functional.local_response_norm(x, 2), torch.rand(2, 3, 8, 8))
    found = measured(gm)
    assert [name for name, why in found.operators.items() if "has no kernel of it in half" in why] == ["avg_pool3d"]


@pytest.mark.parametrize(
    ("numbers", "lost"),
    [
        ([1e-12], "the constant 1e-12 is 0 in float16"),
        ([-1e9], "the constant 1e+09 is infinite in float16, which ends at 65504"),
        ([1.0, 1e5], "the constant 1e+05 is infinite in float16, which ends at 65504"),
        ([1.0, 1e-12], None),
        ([0.0], None),
        ([-math.inf], None),
        ([65504.0], None),
        ([1e-5], None),
    ],
)
def test_constants_that_half_does_not_hold(numbers, lost):
    assert lost_numbers(torch.tensor(numbers), torch.float16) == lost


def test_values_of_a_loop_or_branch_go_by_the_path_of_their_graph():
    found = measured(graph_of(Branching(), X.abs()))
    assert any(name.startswith("true_graph_0/") for name in found.noise)


def test_constants_are_looked_at_once_however_many_inputs_run(monkeypatch):
    from fxopt.passes.half import constants

    seen = []
    monkeypatch.setattr(constants, "lost_numbers", lambda tensor, dtype: seen.append(tensor.shape) and None)
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    gm = fxopt.capture(net.eval(), (torch.randint(0, 50, (2, 3)),))
    samples = [fxopt.Sample.of((torch.randint(0, 50, (2, 3)),)) for _ in range(4)]
    names = frozenset(node.name for node in gm.graph.nodes if node.op == "call_function")
    measure_noise(gm, samples, Settings(torch.float16, 2.0, "float32", lambda node: node.name, names))
    assert sorted(map(tuple, seen)) == [(8,), (8,), (8, 8), (8, 8), (50, 8)]
