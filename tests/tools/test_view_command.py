"""``fxopt view``: models and files, steps, comparison, formats, and what is refused."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxopt
from fxopt.export import to_onnx
from fxopt.tools.cli import app

pytestmark = pytest.mark.ort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("view")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    gm = fxopt.capture(net, (torch.randn(1, 3, 6, 6),))
    fxopt.save(gm, path / "net.fxopt")
    to_onnx(gm, path / "net.onnx")
    (path / "broken.onnx").write_bytes(b"no model")
    return path


def command(folder, *arguments):
    full = [
        str(folder / one) if one.rpartition(".")[2] in ("onnx", "fxopt", "json", "html", "png") else one
        for one in arguments
    ]
    result = CliRunner().invoke(app, ["view", *full], prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


def test_a_model_with_passes_gets_a_step_for_each(folder):
    status, stdout, _ = command(folder, "net.fxopt", "-p", "fold-batch-norm,remove-identities", "-o", "steps.json")
    assert status == 0
    assert "wrote " in stdout
    content = json.loads((folder / "steps.json").read_text())
    assert [step["label"] for step in content["steps"]] == ["captured", "fold-batch-norm", "remove-identities"]
    assert content["title"] == "net.fxopt"


def test_a_file_is_compared_with_its_model(folder):
    status, *_ = command(folder, "net.onnx", "--against", "net.fxopt", "-o", "both.json")
    assert status == 0
    labels = [step["label"] for step in json.loads((folder / "both.json").read_text())["steps"]]
    assert labels == ["before: graph", "after: net.onnx"]


def test_json_tells_what_was_written(folder):
    status, stdout, _ = command(folder, "net.onnx", "-o", "page.html", "--json")
    assert status == 0
    written = json.loads(stdout)
    assert written["bytes"] == (folder / "page.html").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("net.onnx", "-o", "page.png"), "cannot tell the format of"),
        (("net.onnx", "-p", "fold-batch-norm"), "--passes does not go with an .onnx file"),
        (("missing.onnx",), "there is no file"),
        (("broken.onnx",), "cannot read the model"),
        (("net.fxopt", "-p", "no-such-pass"), "no-such-pass"),
    ],
    ids=["format", "passes", "missing", "broken", "pass"],
)
def test_wrong_commands_end_with_status_2(folder, arguments, text):
    status, _, stderr = command(folder, *arguments)
    assert status == 2
    assert text in stderr


@pytest.mark.ort
def test_operators_are_measured_on_request(tmp_path):
    path = tmp_path / "graph.json"
    model = tmp_path / "net.onnx"
    to_onnx(fxopt.capture(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), (torch.randn(4, 3),)), model)
    result = CliRunner().invoke(app, ["view", str(model), "-o", str(path), "--time"], prog_name="fxopt")
    assert result.exit_code == 0, result.stderr
    content = json.loads(path.read_text())
    assert content["overlays"]["time"]["unit"] == "ms"
    assert any("time" in record["values"] for record in content["records"])
