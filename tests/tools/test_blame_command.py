"""``fxopt blame``: a right file, a wrong one, for people and for programs."""

import json

import onnx_ir as ir
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxopt
from fxopt.export import to_onnx
from fxopt.tools.cli import app
from tests.export.faults import faults

pytestmark = pytest.mark.ort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold a graph, its file, and one whose ReLU was replaced."""
    path = tmp_path_factory.mktemp("blame")
    gm = fxopt.capture(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), (torch.randn(4, 3),))
    fxopt.save(gm, path / "net.fxopt")
    file = to_onnx(gm, path / "right.onnx")
    fault = next(fault for fault in faults(file.model) if fault.kind == "operator")
    ir.save(fault.planted(file.model), path / "wrong.onnx")
    return path


def command(folder, file, *options):
    arguments = ["blame", str(folder / file), "--against", str(folder / "net.fxopt"), *options]
    result = CliRunner().invoke(app, arguments, prog_name="fxopt")
    return result.exit_code, result.stdout


def test_a_right_file_ends_with_status_0(folder):
    status, stdout = command(folder, "right.onnx", "--optimization", "all")
    assert status == 0
    assert "every node computes what it should" in stdout


def test_a_wrong_file_ends_with_status_1_and_names_the_node(folder):
    status, stdout = command(folder, "wrong.onnx")
    assert status == 1
    assert "relu (aten.relu.default) at" in stdout
    assert "computed by Abs" in stdout


def test_programs_get_every_value(folder):
    status, stdout = command(folder, "wrong.onnx", "--json")
    found = json.loads(stdout)
    assert (status, found["ok"]) == (1, False)
    assert [value["node"] for value in found["blame"]["values"] if value["problem"]] == ["relu"]
