"""Times of parts of a graph at several widths: what is measured, once each, and that pruning to a budget takes them."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxopt
from fxopt.attributes import made_of_attributes
from fxopt.export import to_onnx, width_costs
from fxopt.export.width_costs import _model_of
from fxopt.passes import Prune
from fxopt.passes.prune import ShrinkMasked
from fxopt.passes.prune.plan import prunable
from fxopt.passes.prune.regions import RUN, regions_of
from fxopt.passes.prune.widths import Widths, sample_shapes

IMAGES = torch.randn(1, 3, 12, 12)


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    nodes: tuple[str, ...]
    shapes: Mapping[tuple[int, ...], Mapping[str, tuple[int, ...]]]


def captured(model, *inputs):
    return fxopt.capture(model.eval(), inputs)


def net():
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6()
    return nn.Sequential(*layers, nn.Conv2d(16, 8, 1), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(800, 4))


def regions_for(gm):
    found = prunable(gm)
    scores = {family.name: torch.ones(len(family.groups)) for family in found.families}
    widths = Widths(found.structure, found.families, scores, min_kept=1, multiple=1)
    return regions_of(widths, sample_shapes(gm))


def test_every_region_has_a_time_at_every_point():
    gm = captured(net(), IMAGES)
    regions = regions_for(gm)
    costs = width_costs(gm, regions, runs=1)
    assert {region.nodes[0] for region in regions if region.nodes} == {
        "conv2d", "conv2d_1", "conv2d_2", "group_norm", "linear"
    }  # fmt: skip
    assert set(costs) == {region.name for region in regions}
    for region in regions:
        assert set(costs[region.name]) == set(region.shapes)
        assert all(0 <= time < 1e6 for time in costs[region.name].values())
    assert costs[RUN][()] > 0


def test_wide_layers_take_longer_than_narrow_ones():
    gm = captured(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), torch.randn(1, 8, 8, 8))
    weight = next(node.name for node in gm.graph.nodes if node.op == "get_attr" and "weight" in node.name)
    bias = next(node.name for node in gm.graph.nodes if node.op == "get_attr" and "bias" in node.name)

    def shapes(wide):
        many = (1, wide, 32, 32)
        return {"input": many, weight: (wide, wide, 3, 3), bias: (wide,), "conv2d": many, "relu": many}

    source = next(node.name for node in gm.graph.nodes if node.op == "placeholder")
    points = {(wide,): {**shapes(wide), source: (1, wide, 32, 32)} for wide in (8, 128)}
    costs = width_costs(gm, [Part("conv2d", ("conv2d", "relu"), points)], runs=5)
    assert costs["conv2d"][128,] > 5 * costs["conv2d"][8,] > 0  # it has 256 times as much to do


def test_what_is_alike_is_measured_once():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(5)), nn.ReLU())
    gm = captured(model, torch.randn(1, 4, 5, 5))
    said = []
    regions = [region for region in regions_for(gm) if region.name in (RUN, "conv2d_1", "conv2d_2", "conv2d_3")]
    costs = width_costs(gm, regions, runs=1, say=said.append)
    assert costs["conv2d_1"] == costs["conv2d_2"] == costs["conv2d_3"]
    assert said[0].startswith(f"{len(costs['conv2d_1'])} models for 4 regions measured in ")
    assert said[0].endswith(" s with 1 thread(s)")


def test_a_model_of_a_region_is_fused_as_in_the_whole():
    gm = captured(net(), IMAGES)
    region = next(region for region in regions_for(gm) if region.name == "conv2d")
    nodes = {node.name: node for node in gm.graph.nodes}
    chain = [nodes[name] for name in region.nodes]
    assert [node.target for node in chain] == [
        torch.ops.aten.conv2d.default, torch.ops.aten.batch_norm.default, torch.ops.aten.relu.default
    ]  # fmt: skip
    model, inputs = _model_of(chain, region.shapes[min(region.shapes)], made_of_attributes(gm.graph))
    assert [node.op_type for node in model.graph] == ["Conv", "BatchNormalization", "Relu"]
    assert [value.shape for value in inputs.values()] == [(1, 3, 12, 12)]
    assert len(model.graph.initializers) == 6


@pytest.mark.parametrize(("layer", "x", "narrow", "groups"), [
    (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 6, 6), {"x": (1, 3, 6, 6), "weight": (3, 1, 3, 3), "bias": (3,)}, 3),
    (nn.Conv1d(8, 4, 3, groups=2), (1, 8, 6), {"x": (1, 4, 6), "weight": (4, 2, 3), "bias": (4,)}, 2),
    (nn.ConvTranspose2d(8, 6, 2, groups=2), (1, 8, 6, 6), {"x": (1, 4, 6, 6), "weight": (4, 3, 2, 2), "bias": (6,)}, 2),
], ids=["depthwise", "grouped", "transposed"])  # fmt: skip
def test_the_number_of_groups_follows_from_the_shapes(layer, x, narrow, groups):
    gm = captured(layer, torch.randn(x))
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    shapes = {}
    for source in node.all_input_nodes:
        kind = "x" if source.op == "placeholder" else str(source.target)
        shapes[source.name] = narrow[kind]
    shapes[node.name] = (1, narrow["bias"][0], *node.meta["val"].shape[2:])
    model, _ = _model_of([node], shapes, made_of_attributes(gm.graph))
    assert next(iter(model.graph)).attributes["group"].value == groups


def test_recurrent_layers_and_attention_have_models():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.last = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            y = self.norm(self.last(self.lstm(x)[0]))
            return y + nn.functional.scaled_dot_product_attention(y, y, y)

    gm = captured(Net(), torch.randn(2, 5, 6))
    regions = regions_for(gm)
    costs = width_costs(gm, regions, runs=1)
    heads = {name.rstrip("_0123456789") for name in costs}
    assert {"lstm", "linear", "scaled_dot_product_attention"} <= heads
    assert all(time >= 0 for row in costs.values() for time in row.values())
    assert len(costs[next(name for name in costs if name.startswith("lstm"))]) > 3


def test_pruning_to_a_budget_of_latency_takes_it_as_it_is():
    model = net()
    gm = captured(model, IMAGES)
    measured = []

    def measure(graph, regions):
        found = width_costs(graph, regions, runs=1)
        # Times of so small a net are noise; a little for each channel makes fewer of them cheaper on any machine.
        measured.append({name: {at: time + 100 * sum(at) for at, time in row.items()} for name, row in found.items()})
        return measured[0]

    masked = Prune(budget="latency:0.95", costs=measure, min_sqnr_db=-60.0)(gm)
    small = ShrinkMasked()(masked.gm).gm
    assert len(measured) == 1
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gm.parameters())
    assert "budget latency:0.95: " in masked.notes[0]
    assert to_onnx(small).validation is not None


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="runs is 0; wanted 1 or more"):
        width_costs(SimpleNamespace(), [], runs=0)
