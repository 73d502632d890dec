"""``fxopt bisect``: the pass and the place, what reproduces it, and ORT's optimizers."""

import json

import numpy
import onnxruntime as ort
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxopt
from fxopt.errors import ExportError
from fxopt.export import to_onnx
from fxopt.tools import fault_commands
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
    files = "before.fxopt, after.fxopt, before.pt2, after.pt2, before.onnx, after.onnx, inputs.pt, repro.py"
    assert {each.name for each in (tmp_path / "repro").iterdir()} == set(files.split(", "))
    assert f"wrote {tmp_path / 'repro'}: {files}; 3 of 7 nodes\n" in stdout


def test_the_files_for_onnx_show_it_too(folder, tmp_path):
    options = ("-p", "binarize-weights{min_sqnr_db=-60}", "-o", tmp_path, "--json")
    status, stdout, _ = command(folder / "net.fxopt", *options)
    written = json.loads(stdout)["written"]
    assert (status, written["nodes"], written["whole_nodes"], written["missing"]) == (0, 3, 7, [])
    ((args, _),) = torch.load(tmp_path / "inputs.pt")
    for name in ("before", "after"):
        session = ort.InferenceSession(tmp_path / f"{name}.onnx")
        feeds = {each.name: value.numpy() for each, value in zip(session.get_inputs(), args, strict=True)}
        want = fxopt.load(tmp_path / f"{name}.fxopt")(*args).detach().numpy()
        numpy.testing.assert_allclose(session.run(None, feeds)[0], want, rtol=1e-4, atol=1e-5)


def test_whole_graphs_are_written_if_asked_for(folder, tmp_path):
    options = ("-p", "binarize-weights{min_sqnr_db=-60}", "-o", tmp_path, "--whole")
    status, stdout, _ = command(folder / "net.fxopt", *options)
    assert status == 0
    assert "repro.py; 7 of 7 nodes" in stdout


def test_a_file_that_onnx_cannot_hold_is_named(folder, tmp_path, monkeypatch):
    def refuses(*arguments, **options):
        raise ExportError("no such operator\n  got  this")

    monkeypatch.setattr(fault_commands, "to_onnx", refuses)
    options = ("-p", "binarize-weights{min_sqnr_db=-60}", "-o", tmp_path)
    status, stdout, _ = command(folder / "net.fxopt", *options)
    assert status == 0
    assert "before.onnx is missing: no such operator\nafter.onnx is missing: no such operator\n" in stdout


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


def test_of_a_file_the_part_that_shows_it_is_written(folder, tmp_path):
    status, stdout, _ = command(folder / "integers.onnx", "--min-sqnr-db", "200", "-o", tmp_path / "repro")
    assert status == 0
    assert "model.onnx, inputs.npz, repro.py; " in stdout
    assert {each.name for each in (tmp_path / "repro").iterdir()} == {"model.onnx", "inputs.npz", "repro.py"}
