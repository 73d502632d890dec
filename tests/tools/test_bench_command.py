"""``fxopt bench``: for people and for programs, and what is wrong with the command."""

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
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "net.onnx"
    to_onnx(fxopt.capture(nn.Linear(3, 5), (torch.randn(4, 3),), dynamic_shapes=({0: "n"},)), path, validate=False)
    return path


def command(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


def test_two_files_side_by_side(file):
    status, stdout, _ = command(file, "--against", file, "--runs", "2", "--no-memory")
    assert status == 0
    assert stdout.count(f"{file} by line:") == 2


def test_programs_get_one_document(file):
    status, stdout, _ = command(file, "--size", "n=7", "--runs", "2", "--threads", "1", "--no-memory", "--json")
    found = json.loads(stdout)
    assert (status, found["ok"], found["runs"], len(found["files"])) == (0, True, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.onnx"], "there is no file nothing.onnx"),
        (["FILE", "--size", "n"], "--size n is not understood"),
        (["FILE", "--size", "batch=2"], "sizes names batch"),
        (["FILE", "--runs", "0"], "--runs"),
    ],
)
def test_wrong_commands_end_with_status_2(file, arguments, message):
    status, stdout, stderr = command(*[file if one == "FILE" else one for one in arguments])
    assert (status, stdout) == (2, "")
    assert message in stderr
