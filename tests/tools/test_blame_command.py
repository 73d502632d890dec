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


def test_another_file_may_be_what_is_right(folder):
    arguments = ["blame", str(folder / "wrong.onnx"), "--against", str(folder / "right.onnx"), "--inputs", "f32[4,3]"]
    result = CliRunner().invoke(app, [*arguments, "--json"], prog_name="fxopt")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (1, False)
    assert [value["target"] for value in found["blame"]["values"] if value["problem"]] == ["Relu"]
    assert CliRunner().invoke(app, [*arguments, "--min-sqnr-db", "-100"], prog_name="fxopt").exit_code == 0


def test_a_file_alone_is_compared_with_what_ort_makes_of_it(folder):
    result = CliRunner().invoke(app, ["blame", str(folder / "wrong.onnx")], prog_name="fxopt")
    assert result.exit_code == 0  # it computes what it says
    assert "ORT optimizer 'extended'" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimization", "none"], "there is nothing to compare the file with"),
        (["--against", "right.onnx", "--dynamic", "0:0=batch"], "--dynamic does not go with an .onnx file"),
        (["--against", "gone.onnx"], "there is no file"),
        (["--against", "right.onnx", "--inputs", "f32[4,3]; f32[4,3]"], "the inputs do not fit the model"),
        (["--against", "right.onnx", "--inputs", "f32[4"], "--inputs"),
    ],
)
def test_what_cannot_be_compared_is_bad_input(folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["blame", "wrong.onnx", *options], prog_name="fxopt")
    assert result.exit_code == 2
    assert message in result.stderr
