"""``fxopt optimize --calibration``: files of inputs that the quantize pass measures on."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fxopt.export import coverage
from fxopt.tools.cli import app
from fxopt.tools.console import Counted

pytestmark = pytest.mark.ort

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(NET)
    for index in range(2):
        np.save(tmp_path / f"batch{index}.npy", np.random.default_rng(index).normal(size=(8, 16)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def optimize(*arguments):
    common = ["optimize", "net.py:Net", "-i", "f32[batch,16]", "-p", "quantize{recipe=fast}", "-o", "small.onnx"]
    result = CliRunner().invoke(app, [*common, *arguments], prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


def test_files_calibrate(folder):
    status, said, _ = optimize("--calibration", "batch0.npy", "--calibration", "batch1.npy")
    assert status == 0
    assert "wrote small.onnx" in said
    assert coverage(folder / "small.onnx").integer_share == 1.0


@pytest.mark.parametrize(("file", "why"), [
    ("nothing.npy", "there is no file nothing.npy"), ("net.py", "net.py is not a file of tensors, or is damaged"),
])  # fmt: skip
def test_a_file_that_holds_no_inputs_is_refused(folder, file, why):
    status, _, said = optimize("--calibration", file)
    assert status == 2
    assert why in " ".join(said.split())


def test_items_tell_how_far_they_are():
    seen = []
    items = Counted([1, 2, 3], lambda done, of: seen.append((done, of)))
    assert (list(items), len(items), items[1]) == ([1, 2, 3], 3, 2)
    assert seen == [(0, 3), (1, 3), (2, 3)]
