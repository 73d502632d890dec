"""``fxopt optimize --ledger``: the page or the JSON of every step, and what is refused before the work begins."""

import json

import pytest
from typer.testing import CliRunner

from fxopt.tools.cli import app
from tests.tools.bad_inputs import inside

pytestmark = pytest.mark.ort

NET = """
import torch
from torch import nn

number = 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, image):
        return self.norm(self.conv(image)).relu()

def score(model):
    return model(torch.ones(2, 3, 8, 8)).mean()

def text(model):
    return "good"

def broken(model):
    raise RuntimeError("no labels")

def misfit(model):
    return model(torch.ones(3))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "measured_net.py").write_text(NET)
    return tmp_path


def optimize(folder, *arguments) -> tuple[int, str, str]:
    given = ["optimize", "measured_net.py:Net", "-i", "f32[batch,3,8,8]", "-p", "fold-batch-norm", "-o", "net.onnx"]
    with inside(folder):
        result = CliRunner().invoke(app, [*given, *arguments], prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


def test_json_of_every_step_with_its_score(folder):
    status, stdout, stderr = optimize(folder, "--ledger", "steps.json", "--metric", "measured_net.py:score", "--json")
    assert status == 0, stderr
    assert json.loads(stdout)["ledger"] == "steps.json"
    first, last = json.loads((folder / "steps.json").read_text())["entries"]
    assert (first["step"], last["step"]) == ("captured", "fold-batch-norm")
    assert last["score"] == pytest.approx(first["score"], abs=1e-5)
    assert last["file_bytes"] == (folder / "net.onnx").stat().st_size < first["file_bytes"]


def test_page_of_every_step_without_a_score(folder):
    status, stdout, stderr = optimize(folder, "--ledger", "steps.html")
    assert status == 0, stderr
    assert "wrote steps.html: what each step cost and brought" in stdout
    page = (folder / "steps.html").read_text()
    assert "fold-batch-norm" in page
    assert "<figcaption>Latency</figcaption>" in page
    assert "<figcaption>Score</figcaption>" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "measured_net.py:score"], "--metric goes with --ledger only"),
        (["--ledger", "steps.txt"], "--ledger: cannot tell the format of steps.txt"),
        (["--ledger", "nowhere/steps.html"], "--ledger: cannot write nowhere/steps.html: there is no folder nowhere"),
        (["--ledger", "s.html", "--metric", "measured_net.py:scor"], "try       measured_net.py:score"),
        (["--ledger", "s.html", "--metric", "score"], "'score' names no function"),
        (["--ledger", "s.html", "--metric", "no.py:score"], "wanted  net.py:score or package.module:score"),
        (["--ledger", "s.html", "--metric", "measured_net.py:number"], "is not a function, but a value of type int"),
        (["--ledger", "s.html", "--train"], "--train does not go with an .onnx file"),
        (["--ledger", "s.html", "--train", "-o", "net.fxopt"], "--ledger does not go with --train"),
    ],
    ids=["metric alone", "suffix", "folder", "name", "no colon", "no file", "number", "onnx in training", "training"],
)
def test_wrong_options_end_with_status_2_before_the_work_begins(folder, arguments, message):
    status, stdout, stderr = optimize(folder, *arguments)
    assert (status, stdout) == (2, "")
    assert message in stderr
    assert [path.name for path in folder.iterdir() if path.suffix in (".onnx", ".fxopt")] == []


@pytest.mark.parametrize(
    ("metric", "status", "message"),
    [
        ("text", 2, "--metric measured_net.py:text fails: TypeError: the metric returned a str for the captured graph"),
        (
            "broken",
            2,
            'in broken: raise RuntimeError("no labels")\n  in the metric of the ledger, called on the captured',
        ),
        ("misfit", 1, "input 'image' does not fit the captured graph: rank 1 instead of 4"),
    ],
)
def test_wrong_metrics_are_told_with_their_line(folder, metric, status, message):
    got, stdout, stderr = optimize(folder, "--ledger", "s.html", "--metric", f"measured_net.py:{metric}")
    assert (got, stdout) == (status, "")
    assert message in stderr
    assert not (folder / "s.html").exists()
