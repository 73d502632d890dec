"""Values that are joined share a scale, but for those whose limit the shared integers could not stand for."""

import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.export import coverage, to_onnx
from fxopt.limits import limits_of
from fxopt.passes.quantize.placement import move_source, place
from fxopt.passes.quantize.shared_scales import bounds_of
from fxopt.passes.quantize.target import ORT_CPU
from tests.models.randomized import randomized

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Joined(nn.Module):
    """Values of several kinds that are joined; ``kinds`` names what stands behind each convolution."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in kinds)
        self.ends = nn.ModuleList(ENDS[kind]() for kind in kinds)
        self.last = nn.Conv2d(4 * len(kinds), 5, 1)

    def forward(self, x):
        parts = [end(conv(x)) for conv, end in zip(self.convs, self.ends, strict=True)]
        return self.last(torch.cat(parts, 1))


ENDS = {
    "plain": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "pooled relu": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)),
    "averaged relu": lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1)),
}


class Dense(nn.Module):
    """One-shot aggregation: the input, which has both signs, joined with a chain of layers that end in ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(32, 5, 1)

    def forward(self, x):
        parts = [self.stem(x)]
        for conv in self.convs:
            parts.append(conv(parts[-1]).relu())
        return self.last(torch.cat(parts, 1))


def graph_of(net):
    return fxopt.optimize(randomized(net).eval(), passes.DEFAULT, example_inputs=(IMAGES,))


def groups_of_operands(gm):
    plan = place(gm, ORT_CPU)
    (joined,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    return [plan[part.name].group for part in joined.args[0]], plan[joined.name].group


@pytest.mark.parametrize(
    ("kinds", "shared"),
    [
        (("relu", "relu"), [True, True]),
        (("plain", "plain"), [True, True]),
        (("plain", "relu"), [True, False]),
        (("relu6", "relu6"), [True, True]),
        (("relu", "relu6"), [True, False]),
        (("plain", "pooled relu", "relu6"), [True, False, False]),
        (("relu", "averaged relu"), [True, True]),
    ],
)
def test_operands_share_unless_a_limit_would_be_lost(kinds, shared):
    groups, joined = groups_of_operands(graph_of(Joined(*kinds)))
    assert joined
    assert [group == joined for group in groups] == shared


@pytest.mark.ort
@pytest.mark.parametrize("net", [Dense(), Joined("plain", "relu", "relu6"), Joined("relu", "relu")])
def test_all_work_is_done_in_integers(net):
    gm = graph_of(net)
    small = fxopt.optimize(gm, [passes.Quantize(recipe="fast")], strict=True)
    assert coverage(to_onnx(small)).integer_share == 1.0  # which ORT agrees with


def test_a_limit_in_one_join_does_not_break_another_one_that_shares_an_operand():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in range(3))
            self.pool = nn.AvgPool2d(3, 1, 1)
            self.first, self.second = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            a, b, c = (conv(x) for conv in self.convs)
            averaged = self.pool(a.relu())
            return self.first(torch.cat([averaged, b.relu()], 1)), self.second(torch.cat([averaged, c], 1))

    gm = graph_of(Twice())
    plan = place(gm, ORT_CPU)
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    (_, limited), (averaged, _) = first.args[0], second.args[0]
    assert plan[averaged.name].group == plan[second.name].group  # which has both signs
    assert plan[limited.name].group != plan[averaged.name].group


BOUNDED = {
    "relu": (lambda x: x.relu(), (0.0, math.inf)),
    "relu6": (lambda x: nn.functional.relu6(x), (0.0, 6.0)),
    "clamp": (lambda x: x.clamp(-0.5, 0.25), (-0.5, 0.25)),
    "relu of a clamp": (lambda x: x.clamp(-0.5, 0.25).relu(), (0.0, 0.25)),
    "relu of what is below": (lambda x: x.clamp(-0.5, -0.25).relu(), (0.0, 0.0)),
    "sigmoid": (lambda x: x.sigmoid(), (0.0, 1.0)),
    "moved": (lambda x: x.relu().transpose(1, 2).flatten(1), (0.0, math.inf)),
    "average": (lambda x: nn.functional.avg_pool2d(x.clamp(0.5, 1.0), 3, 1, 1), (0.0, 1.0)),
    "sum": (lambda x: x.relu() + x.sigmoid(), (0.0, math.inf)),
    "difference": (lambda x: torch.add(x.relu(), x.sigmoid(), alpha=-2), (-math.inf, math.inf)),
    "product": (lambda x: x.relu() * x.sigmoid(), (0.0, math.inf)),
    "joined": (lambda x: torch.cat([x.clamp(-1, 0), x.clamp(2, 3)], 1), (-1.0, 3.0)),
    "unknown": (lambda x: x.sin(), (-math.inf, math.inf)),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_hold_and_are_those_that_the_operators_tell(name):
    function, wanted = BOUNDED[name]
    gm = fxopt.capture(function, (10 * IMAGES,))
    moves = {node: source for node in gm.graph.nodes if (source := move_source(node, ORT_CPU)) is not None}

    def limits(node):
        if (ends := limits_of(node)) is None:
            return None
        low, high = ends
        return -math.inf if low is None else low, math.inf if high is None else high

    (result,) = gm.graph.output_node().args[0]
    found = bounds_of(result, limits, moves)
    assert found == wanted
    values = function(10 * IMAGES)
    assert found[0] <= values.min()
    assert values.max() <= found[1]
