"""Files side by side: what is measured is of these files, and adds up; no claim about times."""

import json
import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import ExportError
from fxopt.export import bench, coverage, to_onnx

pytestmark = pytest.mark.ort


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    found = []
    for width in (32, 4096):
        gm = fxopt.capture(Net(width).eval(), (torch.randn(2, 64),), dynamic_shapes=({0: "batch"},))
        found.append(folder / f"{width}.onnx")
        to_onnx(gm, found[-1], validate=False)
    return found


def test_every_number_is_of_its_file(files):
    report = bench(files, sizes={"batch": 4}, runs=9, threads=1)
    small, large = report.files
    assert small.speed == 1.0
    assert large.speed < 1.0  # a hundred times the work
    assert large.file_mib * 2**20 == files[1].stat().st_size
    assert large.peak_mib > large.file_mib / 2 > small.peak_mib / 1000
    for each in report.files:
        assert 0 < each.median_ms <= each.p95_ms
        assert math.isclose(each.per_second, 4 / (each.median_ms / 1e3))


def test_lines_are_those_of_the_user_and_their_shares_add_up(files):
    (lines,) = bench(files[1:], runs=3, threads=1, memory=False).lines
    assert sum(line.share for line in lines) == pytest.approx(1.0)
    assert all("linear.py" in line.source or "test_bench.py" in line.source for line in lines)
    assert {kernel for line in lines for kernel in line.kernels} <= {"Gemm", "FusedGemm", "Relu", "MatMul", "Add"}


def test_memory_may_be_left_out(files):
    assert bench(files[:1], runs=1, memory=False).files[0].peak_mib is None


def test_the_report_is_fit_for_json_and_for_people(files):
    report = bench(files, runs=2, memory=False)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["runs"] == 2
    assert str(files[0]) in str(report)
    assert "by line:" in str(report)


def test_files_with_other_inputs_are_refused(files, tmp_path):
    to_onnx(fxopt.capture(nn.Linear(3, 3), (torch.randn(1, 3),)), tmp_path / "a.onnx", validate=False)
    integers = fxopt.capture(nn.Embedding(5, 3), (torch.zeros(1, 2, dtype=torch.long),))
    to_onnx(integers, tmp_path / "b.onnx", validate=False)
    with pytest.raises(ExportError, match="takes other inputs than the first file"):
        bench([tmp_path / "a.onnx", tmp_path / "b.onnx"], runs=1)


@pytest.mark.parametrize(("files_given", "runs"), [((), 1), (("a.onnx",), 0)])
def test_nothing_to_run_is_refused(files_given, runs):
    with pytest.raises(ValueError, match=r"there is no file|runs is 0"):
        bench(files_given, runs=runs)


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "bert"])
def test_the_work_of_optimized_graphs_maps_to_source_lines(name):
    from tests.zoo import architectures

    built = architectures.build(name)
    gm = fxopt.optimize(built.model, example_inputs=fxopt.Sample(built.args, built.kwargs), check="off",
                        dynamic_shapes=built.dynamic_shapes)  # fmt: skip
    layers = coverage(to_onnx(gm, validate=False)).layers
    known = sum(layer.macs for layer in layers if layer.source)
    assert known >= 0.99 * sum(layer.macs for layer in layers) > 0
