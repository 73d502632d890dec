"""``fxopt bisect``: the pass and the place, what reproduces it, and ORT's optimizers."""

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
    """Hold a saved graph, and a file of it in integers."""
    path = tmp_path_factory.mktemp("bisect")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    gm = fxopt.capture(net, (torch.randn(16, 64),))
    fxopt.save(gm, path / "net.fxopt")
    to_onnx(fxopt.optimize(gm, ["quantize"]), path / "integers.onnx", validate=False)
    return path


def command(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bisect", *map(str, arguments)], prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


def test_the_first_rewrite_that_is_not_rounding_is_named(folder, tmp_path):
    list_of_passes = "fold-constants,binarize-weights{min_sqnr_db=-60}"
    status, stdout, _ = command(folder / "net.fxopt", "-p", list_of_passes, "-o", tmp_path / "repro")
    assert status == 0
    assert "binarize-weights{min_sqnr_db=-60.0} (step 2) at linear_1 breaks the check" in stdout
    assert {"before.fxopt", "after.fxopt", "after.onnx", "inputs.pt", "repro.py"} <= {
        each.name for each in (tmp_path / "repro").iterdir()
    }


def test_a_lower_bound_moves_it(folder):
    options = ("-p", "binarize-weights{min_sqnr_db=-60}", "--min-sqnr-db", "-20", "--json")
    status, stdout, stderr = command(folder / "net.fxopt", *options)
    assert status == 1
    assert "the check is good after the last pass" in stdout + stderr


def test_programs_get_one_document(folder):
    status, stdout, _ = command(folder / "net.fxopt", "-p", "quantize{min_sqnr_db=0}", "--json")
    found = json.loads(stdout)
    assert (status, found["pass"], found["site"]) == (0, "quantize{min_sqnr_db=0.0}", "")


def test_of_a_file_the_optimizer_of_ort_is_named(folder):
    status, stdout, _ = command(folder / "integers.onnx", "--min-sqnr-db", "200", "--json")
    found = json.loads(stdout)
    assert status == 0
    assert found["optimizer"] in found["modified"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.fxopt"], "--passes is missing"),
        (["net.fxopt", "-p", "no-such-pass"], "there is no pass 'no-such-pass'"),
        (["integers.onnx", "-p", "quantize"], "--passes does not go with an .onnx file"),
        (["nothing.onnx"], "there is no file"),
    ],
)
def test_wrong_commands_end_with_status_2(folder, arguments, message):
    status, stdout, stderr = command(folder / arguments[0], *arguments[1:])
    assert (status, stdout) == (2, "")
    assert message in stderr
