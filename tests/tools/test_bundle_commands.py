"""``fxopt bundle`` and ``fxopt verify``."""

import json

import pytest
from typer.testing import CliRunner

from fxopt.tools.cli import app

pytestmark = pytest.mark.ort

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.last(x).relu()
"""


def command(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    arguments = (f"{tmp_path / 'net.py'}:Net", "--inputs", "f32[batch,6]", "-o", tmp_path / "bundle")
    status, stdout, stderr = command("bundle", *arguments)
    assert status == 0, stderr
    assert stdout == f"wrote {tmp_path / 'bundle'}: manifest.json, model.onnx, vectors.npz\n"
    return tmp_path / "bundle"


def test_what_is_bundled_verifies(bundle):
    status, stdout, _ = command("verify", bundle)
    assert status == 0
    assert f"{bundle} is intact, and ONNX Runtime agrees" in stdout


def test_programs_get_one_document(bundle):
    status, stdout, _ = command("verify", bundle, "--json")
    assert (status, json.loads(stdout)["ok"]) == (0, True)


def test_damage_ends_with_status_1_and_is_named(bundle):
    (bundle / "model.onnx").unlink()
    status, stdout, stderr = command("verify", bundle)
    assert (status, stdout) == (1, "")
    assert "model.onnx is missing" in stderr


def test_a_folder_that_is_there_is_not_written_to(bundle, tmp_path):
    status, _, stderr = command("bundle", f"{tmp_path / 'net.py'}:Net", "--inputs", "f32[batch,6]", "-o", bundle)
    assert status == 1
    assert "is there already" in stderr
