"""Which node of a file is wrong: what was planted is what is named, and nothing is named where nothing is wrong."""

import json

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.errors import ExportError
from fxopt.export import Session, blame, split_error, to_onnx
from tests.export.faults import faults
from tests.models.branching import Textbook
from tests.models.randomized import randomized

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Convolutions with a residual sum, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.pool, self.last = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.pool((x + self.body(x)).relu())
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def float_graph():
    return fxopt.optimize(randomized(Residual()).eval(), passes.DEFAULT, example_inputs=(IMAGES,))


@pytest.fixture(scope="module")
def integer_graph(float_graph):
    return fxopt.optimize(float_graph, [passes.Quantize(recipe="fast")])


def blamed(model, gm):
    return [value.node for value in blame(model, gm).guilty]


@pytest.mark.parametrize("level", ["none", "all"])
def test_nothing_is_named_where_nothing_is_wrong(float_graph, integer_graph, level):
    for gm in (float_graph, integer_graph):
        report = blame(to_onnx(gm), gm, optimization=level)
        assert report.first is None
        assert len(report.values) >= 6


def test_each_planted_fault_is_named_and_nothing_else(integer_graph):
    model = to_onnx(integer_graph).model
    planted = list(faults(model))
    assert {fault.kind for fault in planted} == {"scale", "weight", "operator"}
    assert len(planted) > 30
    for fault in planted:
        assert blamed(fault.planted(model), integer_graph) == [fault.node], fault


@pytest.mark.slow
def test_each_of_many_faults_in_resnet18_is_named():
    torchvision = pytest.importorskip("torchvision")
    net = randomized(torchvision.models.resnet18(weights=None)).eval()
    images = torch.randn(2, 3, 64, 64)
    gm = fxopt.optimize(net, [*passes.DEFAULT, passes.Quantize(recipe="fast")], example_inputs=(images,))
    model = to_onnx(gm).model
    planted = list({fault.node: fault for fault in faults(model)}.values())
    chosen = planted[:: max(1, len(planted) // 50)][:50]
    assert len(chosen) == 50
    assert [blamed(fault.planted(model), gm) for fault in chosen] == [[fault.node] for fault in chosen]


def test_line_pass_and_operators_of_the_guilty_node_are_named(integer_graph):
    model = to_onnx(integer_graph).model
    fault = [one for one in faults(model) if one.kind == "scale"][6]
    report = blame(fault.planted(model), integer_graph)
    assert report.first is not None
    assert report.first.pass_name == "quantize"
    assert report.first.operators == (model.graph[fault.place].op_type,)
    assert "in forward: " in report.first.source
    assert "1 node computes something else" in str(report)


def test_errors_behind_a_fault_are_inherited(float_graph):
    model = to_onnx(float_graph).model
    first = next(fault for fault in faults(model) if fault.kind == "weight")
    report = blame(first.planted(model), float_graph)
    assert report.of(first.node).inherited_share == 0.0
    behind = report.values[report.values.index(report.of(first.node)) + 1 :]
    assert behind
    assert all(value.inherited_share > 0.99 for value in behind)
    assert all(value.problem is None for value in behind)


def test_the_total_error_of_the_last_value_is_that_of_the_file(integer_graph):
    file = to_onnx(integer_graph)
    (got,) = file.session(optimization="none").run([IMAGES])
    with torch.no_grad():
        want = integer_graph(IMAGES)
    last = blame(file, integer_graph).values[-1]
    assert last.total.max_abs == (got - want).abs().max().item()


def test_fused_kernels_answer_for_what_they_fuse(integer_graph):
    values = blame(to_onnx(integer_graph), integer_graph, optimization="all").values
    assert "QLinearConv" in {operator for value in values for operator in value.operators}


def test_branches_are_one_value():
    gm = fxopt.capture(Textbook().eval(), (torch.randn(3, 10),))
    report = blame(to_onnx(gm), gm)
    assert report.first is None
    assert any("If" in value.operators for value in report.values)


def test_the_report_is_fit_for_json(integer_graph):
    report = blame(to_onnx(integer_graph), integer_graph)
    assert len(json.loads(json.dumps(report.to_dict(), allow_nan=False))["values"]) == len(report.values)


def test_a_file_of_another_graph_is_refused(integer_graph):
    other = to_onnx(fxopt.capture(nn.Tanh(), (IMAGES,)))
    with pytest.raises(ExportError, match="no value of the model has the name of a node"):
        blame(other, fxopt.capture(nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Flatten()), (IMAGES,)))


def test_the_parts_of_an_error_add_up(float_graph, integer_graph):
    file = to_onnx(integer_graph)
    (split,) = split_error(file, integer_graph, float_graph)
    with torch.no_grad():
        exact, quantized = float_graph(IMAGES), integer_graph(IMAGES)
    (off,), (on,) = (Session(file.to_bytes(), optimization=level).run([IMAGES]) for level in ("none", "all"))
    assert split.passes.max_abs == (quantized - exact).abs().max().item()
    assert split.rest.max_abs == (off - quantized).abs().max().item()
    assert split.fusion.max_abs == (on - off).abs().max().item()
    assert split.total.max_abs <= split.passes.max_abs + split.rest.max_abs + split.fusion.max_abs
    assert split.passes.max_abs > 10 * split.rest.max_abs
