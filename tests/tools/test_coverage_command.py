"""``fxopt coverage``: the report for people and for programs, and what is wrong with the command."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fxopt.export import coverage, to_onnx
from fxopt.tools.cli import app
from tests.export.proof import captured

pytestmark = pytest.mark.ort


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("coverage") / "net.onnx"
    to_onnx(captured(nn.Linear(3, 5), torch.randn(4, 3)), path, validate=False)
    return path


def command(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["coverage", *map(str, arguments)], prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


def test_report_for_people_and_for_programs(file):
    assert command(file) == (0, f"{file}: {coverage(file)}\n", "")
    status, stdout, _ = command(file, "--size", "n4=6", "--json")
    assert status == 0
    assert json.loads(stdout) == {
        "ok": True,
        "file": str(file),
        "coverage": coverage(file, sizes={"n4": 6}).to_dict(),
    }
    assert json.loads(stdout)["coverage"]["macs"] == 6 * 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.onnx"], "there is no file nothing.onnx"),
        ([__file__], "ONNX Runtime does not accept the model"),
        (["FILE", "--size", "n4"], "--size n4 is not understood"),
        (["FILE", "--size", "batch=2"], "sizes names batch; the model has n4"),
    ],
)
def test_wrong_commands_end_with_status_2(file, arguments, message):
    status, stdout, stderr = command(*[file if one == "FILE" else one for one in arguments])
    assert (status, stdout) == (2, "")
    assert message in stderr
    assert "Traceback" not in stderr
