"""The minimum cut against all assignments there are, and against networkx."""

import itertools
import math
import random

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.graph_module import graph_modules
from fxopt.passes.half import PrecisionPlan, half_candidates
from fxopt.passes.half.cut import _BYTES_PER_PRODUCT, Assignments, source_side
from fxopt.passes.half.noise import Measured
from tests.passes.half.nets import Branching, applied, casts_of, graph_of, rewriter_of

X = torch.linspace(-1, 1, 32).reshape(2, 16)


def diamond(x):
    a = torch.sin(x)
    b, c = torch.cos(a), torch.exp(a).reshape(16, 2)
    return torch.tanh(b) + c.reshape(2, 16), a


def ladder(x):
    a = torch.sin(x)
    b = torch.cos(a) + x
    c = torch.exp(b) * a
    return torch.tanh(c) - b


GRAPHS = {"diamond": diamond, "ladder": ladder, "branching": Branching()}


def random_measured(gm, draw: random.Random) -> Measured:
    rw = rewriter_of(gm)
    names = [rw.site_name(n) for module in graph_modules(rw.gm) for n in module.graph.nodes]
    found = Measured()
    for name in names:
        found.noise[name] = 10 ** draw.uniform(-6, -2) * (draw.random() < 0.8)
        found.cast_noise[name] = 10 ** draw.uniform(-6, -2) * (draw.random() < 0.8)
        found.traffic[name] = draw.uniform(0, 400) * (draw.random() < 0.8)
        found.products[name] = draw.uniform(0, 4000) * (draw.random() < 0.3)
        found.sizes[name] = draw.uniform(20, 300)
    return found


def cost(gm, plan: PrecisionPlan, found: Measured, weight: float, scale: float) -> float:
    """Return what an assignment costs, its casts counted where they are inserted."""
    half = set(plan.half)
    total = sum(
        (found.traffic[name] / 2 + found.products[name] * _BYTES_PER_PRODUCT) / scale
        if name not in half
        else weight * found.noise[name]
        for name in plan
    )
    after = applied(gm, plan)
    rw = rewriter_of(after)
    for cast in casts_of(rw.gm):
        source = cast.args[0]
        if source.op == "get_attr":
            continue
        name = rw.site_name(source)
        total += 1.5 * found.sizes[name] / scale + (cast.args[1] is torch.float16) * weight * found.cast_noise[name]
    return total


@pytest.mark.parametrize("name", ["diamond", "ladder"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_no_assignment_is_cheaper_than_the_cut(name, seed):
    gm = graph_of(GRAPHS[name], X)
    names = list(half_candidates(rewriter_of(gm), torch.float16)[0])
    draw = random.Random(seed)
    found = random_measured(gm, draw)
    chosen = Assignments(gm, names_of(gm), names, found)
    weight = 10 ** draw.uniform(0, 4)

    def of(half) -> float:
        plan = PrecisionPlan({n: torch.float16 if n in half else torch.float32 for n in names})
        return cost(gm, plan, found, weight, chosen._scale)

    best = min(of(half) for count in range(len(names) + 1) for half in itertools.combinations(names, count))
    assert of(chosen.at(weight).half) == pytest.approx(best, rel=1e-6, abs=1e-6)


def names_of(gm):
    rw = rewriter_of(gm)
    sites = [rw.site_name(n) for module in graph_modules(rw.gm) for n in module.graph.nodes]
    return dict(zip((n for module in graph_modules(gm) for n in module.graph.nodes), sites, strict=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_less_noise_is_allowed_where_it_weighs_more(name):
    gm = graph_of(GRAPHS[name], X)
    chosen = Assignments(
        gm, names_of(gm), half_candidates(rewriter_of(gm), torch.float16)[0], random_measured(gm, random.Random(5))
    )
    noises = [chosen.at(weight).noise for weight in (0.0, 1.0, 10.0, 100.0, 1e4, 1e8)]
    assert noises == sorted(noises, reverse=True)
    assert chosen.bounded(noises[0] / 30).noise <= noises[0] / 30


def test_without_noise_all_is_half():
    gm = graph_of(Branching(), X)
    names = half_candidates(rewriter_of(gm), torch.float16)[0]
    found = Measured(traffic=dict.fromkeys(names, 1e6))
    assert Assignments(gm, names_of(gm), names, found).bounded(1e-9).half == set(names)


def test_a_value_that_must_not_be_half_binds_who_computes_and_who_reads_it():
    gm = graph_of(diamond, X)
    names = half_candidates(rewriter_of(gm), torch.float16)[0]
    found = Measured(traffic=dict.fromkeys(names, 1e6), values={"sin": "it reaches 1e+06"})
    chosen = Assignments(gm, names_of(gm), names, found)
    assert chosen.bound == {
        "sin": "it reaches 1e+06",
        "cos": "it reads sin: it reaches 1e+06",
        "exp": "it reads sin: it reaches 1e+06",
    }
    assert not chosen.at(0.0).half & set(chosen.bound)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_cuts_are_as_cheap_as_those_of_networkx(count, seed):
    draw = random.Random(seed)
    edges = [("(half)", 0, 1.0)]
    for _ in range(count * 3):
        start, end = draw.choice(["(half)", *range(count)]), draw.choice(["(float32)", *range(count)])
        if start != end:
            edges.append(
                (
                    start,
                    end,
                    draw.choice([0.0, draw.random(), math.inf if start != "(half)" and end != "(float32)" else 1]),
                )
            )
    edges.append((count - 1, "(float32)", 1.0))
    graph = nx.DiGraph()
    for start, end, capacity in edges:
        held = graph.get_edge_data(start, end, {"capacity": 0.0})["capacity"]
        graph.add_edge(start, end, capacity=held + capacity)
    halves = source_side(edges)
    found = sum(capacity for start, end, capacity in edges if start in halves and end not in halves)
    assert found == pytest.approx(nx.minimum_cut_value(graph, "(half)", "(float32)"), abs=1e-6)
