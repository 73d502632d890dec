"""Every bad input gets its exit status and one readable error, and leaves no file behind."""

import json
import pathlib
import re
import sys

import pytest

from tests.tools.bad_inputs import BAD_INPUTS, BadInput, inside, prepare, run

pytestmark = pytest.mark.ort


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("bad")
    prepare(made)
    return made


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda case: case.title)
def test_bad_input_gets_one_readable_error(case: BadInput, folder):
    if "/proc/" in case.command and not pathlib.Path("/proc").is_dir():
        pytest.skip("this system has no folder that nobody can write to")
    before = files(folder)
    status, stdout, stderr = run(case, folder)
    assert (status, stdout) == (case.status, ""), stderr
    assert case.message in stderr
    assert "Traceback" not in stderr
    assert "unexpectedly" not in stderr
    assert stderr.startswith("error: ")
    assert len(re.findall(r"^error: ", stderr, re.MULTILINE | re.IGNORECASE)) == 1
    assert len(stderr.splitlines()) <= 15
    assert files(folder) == before


def test_table_is_long_enough_and_names_each_case_once():
    titles = [case.title for case in BAD_INPUTS]
    assert len(set(titles)) == len(titles) >= 30


def test_output_that_was_there_survives_a_failure(folder, tmp_path):
    (tmp_path / "out.onnx").write_text("older")
    case = BadInput("", f"validate {folder}/good.onnx --against {folder}/models.py:Net --inputs 'f32[batch,4]'", 1, "")
    assert run(case, tmp_path)[0] == 1
    command = f"optimize {folder}/models.py:Random --inputs 'f32[batch,4]' -o out.onnx"
    assert run(BadInput("", command, 1, ""), tmp_path)[0] == 1
    assert (tmp_path / "out.onnx").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_json_tells_the_error_too(folder):
    command = "optimize models.py:Raises --inputs 'f32[batch,4]' -o out.onnx --json"
    status, stdout, stderr = run(BadInput("", command, 2, ""), folder)
    told = json.loads(stdout)
    assert (status, told["ok"], told["status"]) == (2, False, 2)
    assert "the tank is empty" in told["error"]
    assert "the tank is empty" in stderr


@pytest.mark.parametrize("command", ["optimize models.py:Net --opest 20 --json", "optimise --json", "optimize --json"])
def test_json_tells_a_wrong_command_too(command, folder):
    status, stdout, stderr = run(BadInput("", command, 2, ""), folder)
    told = json.loads(stdout)
    assert (status, told["ok"], told["status"]) == (2, False, 2)
    assert stderr.startswith("error: " + told["error"].splitlines()[0])


def test_debug_shows_the_traceback(folder):
    command = "optimize models.py:Raises --inputs 'f32[batch,4]' -o out.onnx --debug"
    status, _, stderr = run(BadInput("", command, 2, ""), folder)
    assert status == 2
    assert "Traceback" in stderr
    assert 'raise RuntimeError("the tank is empty")' in stderr


def test_inside_restores_the_interpreter(folder):
    path, place = list(sys.path), pathlib.Path.cwd()
    with inside(folder):
        sys.path.insert(0, "elsewhere")
    assert (sys.path, pathlib.Path.cwd()) == (path, place)
