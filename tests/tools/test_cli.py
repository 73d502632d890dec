"""The command line as people and scripts use it."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
from typing import ClassVar

import onnx
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fxopt
from fxopt.export import Session
from fxopt.passes import DEFAULT, PASSES
from fxopt.tools.cli import app
from fxopt.tools.console import stages
from tests.tools.bad_inputs import inside

pytestmark = pytest.mark.ort

NET = """
import torch
from torch import nn

print("a greeting")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, image):
        return self.drop(self.norm(self.conv(image))).relu()

def double(x):
    return x * 2

class Gated(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        if x.abs().max() > 1e6:
            x = x * 0
        return x
"""
INPUTS = ("--inputs", "f32[batch,3,8,8]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("cli")
    (made / "models.py").write_text(NET)
    return made


def fxopt_command(folder, *arguments) -> tuple[int, str, str]:
    with inside(folder):
        result = CliRunner().invoke(app, list(arguments), prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


def document(text: str) -> dict:
    """Read exactly one JSON document without NaN or infinities."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def optimized(folder) -> dict:
    status, stdout, stderr = fxopt_command(folder, "optimize", "models.py:Net", *INPUTS, "-o", "net.onnx", "--json")
    assert status == 0, stderr
    return document(stdout)


def test_optimize_writes_what_it_tells(folder, optimized):
    model = onnx.load(folder / "net.onnx")
    assert optimized["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 8, 8]}]
    assert [value.name for value in model.graph.output] == optimized["outputs"]
    assert model.opset_import[0].version == optimized["opset"] == 20
    assert optimized["bytes"] == (folder / "net.onnx").stat().st_size
    assert [step["name"] for step in optimized["report"]["steps"]] == [one.spec() for one in DEFAULT]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert optimized["validation"]["results"]
    assert optimized["validation"]["max_abs"] < 1e-5


def test_written_file_computes_the_model_for_any_batch(folder, optimized):
    space: dict = {}
    torch.manual_seed(0)
    exec(compile(NET, "models.py", "exec"), space)
    torch.manual_seed(0)  # as the command line does before it makes the model
    net = space["Net"]().eval()
    image = torch.randn(5, 3, 8, 8)
    (got,) = Session(folder / "net.onnx").run([image])
    torch.testing.assert_close(got, net(image), rtol=1e-5, atol=1e-6)


def test_optimize_for_people(folder):
    arguments = ("models.py:Net", *INPUTS, "-o", "people.onnx", "-p", "fold-batch-norm", "--opset", "18")
    status, stdout, stderr = fxopt_command(folder, "optimize", *arguments, "--check", "samples", "--strict")
    assert status == 0
    assert stderr == "a greeting\n"  # what the user's file prints never mixes with the result
    assert "fold-batch-norm  changed" in stdout
    assert "wrote people.onnx" in stdout
    assert "ONNX Runtime agrees" in stdout
    assert onnx.load(folder / "people.onnx").opset_import[0].version == 18


def test_no_validate_leaves_the_proof_out(folder):
    arguments = ("optimize", "models.py:double", "--inputs", "f32[n]", "-o", "f.onnx", "--no-validate", "--json")
    status, stdout, _ = fxopt_command(folder, *arguments)
    assert status == 0
    assert document(stdout)["validation"] is None
    assert Session(folder / "f.onnx").run([torch.tensor([1.0, 3.0])])[0].tolist() == [2, 6]


def test_graph_file_in_and_out(folder):
    status, _, stderr = fxopt_command(folder, "optimize", "models.py:Net", *INPUTS, "-o", "net.fxopt", "-p", "")
    assert status == 0, stderr
    assert [spec.shape for spec in fxopt.load(folder / "net.fxopt").inputs] == [("batch", 3, 8, 8)]
    status, stdout, stderr = fxopt_command(folder, "optimize", "net.fxopt", "-o", "again.onnx", "--json")
    assert status == 0, stderr
    assert document(stdout)["inputs"][0]["shape"] == ["batch", 3, 8, 8]


def test_train_keeps_the_graph_trainable(folder):
    arguments = ("models.py:Net", *INPUTS, "-o", "train.fxopt", "-p", "remove-dead-code", "--train")
    status, _, stderr = fxopt_command(folder, "optimize", *arguments)
    assert status == 0, stderr
    gm = fxopt.load(folder / "train.fxopt")
    assert gm.training
    image = torch.randn(64, 3, 8, 8)
    before = gm.get_buffer("norm.running_mean").clone()
    dropped = (gm(image) == 0).float().mean()
    assert dropped > 0.7  # half by dropout, half of the rest by relu
    assert not torch.equal(gm.get_buffer("norm.running_mean"), before)


def test_exported_program_brings_its_own_inputs(folder):
    program = torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.randn(4, 3),))
    torch.export.save(program, folder / "linear.pt2")
    status, stdout, stderr = fxopt_command(folder, "optimize", "linear.pt2", "-o", "linear.onnx", "--json")
    assert status == 0, stderr
    assert document(stdout)["inputs"][0]["shape"] == [4, 3]


def test_inputs_from_a_file_with_a_dynamic_axis(folder):
    torch.save(torch.randn(2, 3, 8, 8), folder / "images.pt")
    arguments = ("models.py:Net", "--inputs", "images.pt", "--dynamic", "0:0=count", "-o", "file.onnx", "--json")
    status, stdout, stderr = fxopt_command(folder, "optimize", *arguments)
    assert status == 0, stderr
    assert document(stdout)["inputs"][0]["shape"] == ["count", 3, 8, 8]


def test_validate_agrees_with_the_model(folder, optimized):
    arguments = ("validate", "net.onnx", "--against", "models.py:Net", *INPUTS)
    status, stdout, stderr = fxopt_command(folder, *arguments, "--json")
    assert status == 0, stderr
    found = document(stdout)
    assert found["ok"] is True
    assert {row["optimization"] for row in found["validation"]["results"]} == {"none", "all"}
    assert len({row["case"] for row in found["validation"]["results"]}) >= 3
    status, stdout, _ = fxopt_command(folder, *arguments)
    assert status == 0
    assert stdout.startswith("net.onnx agrees with models.py:Net")


def test_branches_tells_which_sides_were_never_taken(folder):
    gated = ("branches", "models.py:Gated", "-i", "f32[batch,3]", "--runs", "20")
    status, stdout, stderr = fxopt_command(folder, *gated)
    assert status == 0, stderr
    first, second = stdout.splitlines()[-2:]
    assert first.startswith("models.py:22, in forward: if x.sum() > 0:")
    taken = [int(word) for word in first.split()[-2:]]
    assert sum(taken) == 20
    assert min(taken) > 0
    assert second.split()[-3:] == ["0", "20", "true"]
    told = document(fxopt_command(folder, *gated, "--json")[1])
    assert [branch["line"] for branch in told["branches"]] == ["models.py:22", "models.py:24"]
    assert [branch["never"] for branch in told["branches"]] == [[], [True]]
    assert "has no branch" in fxopt_command(folder, "branches", "models.py:Net", *INPUTS)[1]


def test_passes_lists_all_with_options(folder):
    status, stdout, _ = fxopt_command(folder, "passes", "--json")
    rows = {row["name"]: row for row in document(stdout)["passes"]}
    assert status == 0
    assert {item.name for item in PASSES} <= set(rows)
    assert rows["fold-batch-norm"]["contract"] == "ROUNDING"
    assert rows["fold-constants"]["options"]["parameters"] is False
    assert all(row["summary"] for row in rows.values())
    status, stdout, _ = fxopt_command(folder, "passes")
    assert status == 0
    assert all(item.name in stdout for item in PASSES)


@pytest.mark.parametrize("status", [0, 1])
def test_demo_passes_folder_and_status_on(folder, monkeypatch, status):
    given = []
    monkeypatch.setattr("fxopt.tools.demo.run", lambda output: given.append(output) or status)
    assert fxopt_command(folder, "demo", "--output", "there")[0] == status
    assert given == [pathlib.Path("there")]


def test_unexpected_error_is_one_line_and_status_1(folder, monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fxopt.tools.cli.to_onnx", fail)
    status, stdout, stderr = fxopt_command(folder, "optimize", "models.py:Net", *INPUTS, "-o", "bug.onnx")
    assert (status, stdout) == (1, "")
    assert "fxopt failed unexpectedly: ZeroDivisionError: a bug" in stderr
    assert "Traceback" not in stderr
    assert not (folder / "bug.onnx").exists()


@dataclasses.dataclass(frozen=True)
class Negates(fxopt.Pass):
    """Replace relu by something else, which is wrong."""

    name: ClassVar[str] = "negates"

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(torch.ops.aten.relu.default):
            rw.replace_call(node, torch.ops.aten.neg.default, node.args, why="a seeded mistake")


def test_wrong_pass_is_undone_or_with_strict_ends_the_work(folder, monkeypatch):
    monkeypatch.setattr("fxopt.registry.known_passes", lambda: {"negates": Negates})
    arguments = ("optimize", "models.py:Net", *INPUTS, "-p", "negates", "-o", "undone.onnx")
    status, stdout, stderr = fxopt_command(folder, *arguments, "--strict")
    assert (status, stdout) == (1, "")
    assert "negates breaks its contract EXACT" in stderr
    assert not (folder / "undone.onnx").exists()
    status, stdout, stderr = fxopt_command(folder, *arguments)
    assert status == 0, stderr
    assert "negates  rolled back" in stdout
    assert "Neg" not in {node.op_type for node in onnx.load(folder / "undone.onnx").graph.node}


def test_model_of_a_package(folder):
    (folder / "nets" / "small").mkdir(parents=True)
    (folder / "nets" / "small" / "halves.py").write_text(
        "class Group:\n    @staticmethod\n    def half(x): return x / 2\n"
    )
    try:
        arguments = ("optimize", "nets.small.halves:Group.half", "--inputs", "f32[n]", "-o", "half.onnx")
        status, _, stderr = fxopt_command(folder, *arguments)
    finally:
        for name in ("nets", "nets.small", "nets.small.halves"):
            sys.modules.pop(name, None)
    assert status == 0, stderr
    assert Session(folder / "half.onnx").run([torch.tensor([1.0, 3.0])])[0].tolist() == [0.5, 1.5]


def test_impossible_order_of_passes_is_refused_before_the_model_is_loaded(folder, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Ends(Negates):
        name: ClassVar[str] = "ends"
        ends: ClassVar[frozenset[str]] = frozenset({"no-relu"})

    @dataclasses.dataclass(frozen=True)
    class Needs(Negates):
        name: ClassVar[str] = "needs"
        needs: ClassVar[frozenset[str]] = frozenset({"no-relu"})

    monkeypatch.setattr("fxopt.registry.known_passes", lambda: {"ends": Ends, "needs": Needs})
    arguments = ("optimize", "models.py:Net", *INPUTS, "-p", "ends,needs", "-o", "order.onnx")
    status, stdout, stderr = fxopt_command(folder, *arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(
        "error: needs (step 2) needs 'no-relu', but ends (step 1) ended it; move needs before step 1"
    )
    assert not (folder / "order.onnx").exists()


def test_named_inputs_of_a_saved_graph_may_come_in_any_order(folder):
    (folder / "two.py").write_text("def add(ids, mask): return ids.float() + mask\n")
    spec = "ids=i64[n,4]; mask=f32[n,1]"
    status, _, stderr = fxopt_command(folder, "optimize", "two.py:add", "--inputs", spec, "-o", "two.fxopt")
    assert status == 0, stderr
    other = "mask=f32[n=3,1]; ids=i64[n,4]"
    status, stdout, stderr = fxopt_command(
        folder, "optimize", "two.fxopt", "--inputs", other, "-o", "two.onnx", "--json"
    )
    assert status == 0, stderr
    assert [entry["shape"] for entry in document(stdout)["inputs"]] == [["n", 4], ["n", 1]]
    fixed = "mask=f32[n=3,one=1]; ids=i64[n,4]"
    status, _, stderr = fxopt_command(folder, "optimize", "two.fxopt", "--inputs", fixed, "-o", "two.onnx")
    assert status == 2
    assert "axis 1 of input 'mask' is fixed in the saved model" in stderr


def test_file_called_like_a_module_of_python_hides_nothing(folder):
    import random

    (folder / "random.py").write_text("def half(x): return x / 2\n")
    try:
        arguments = ("optimize", "random.py:half", "--inputs", "f32[n]", "-o", "random.onnx")
        status, _, stderr = fxopt_command(folder, *arguments)
    finally:
        (folder / "random.py").unlink()
    assert status == 0, stderr
    assert sys.modules["random"] is random


def test_no_command_shows_help(folder):
    status, stdout, stderr = fxopt_command(folder)
    assert (status, stdout) == (2, "")
    assert all(name in stderr for name in ("optimize", "validate", "passes", "demo"))
    assert "..." not in stderr.partition("Commands:")[2]  # each command is described in full


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fxopt.tools.cli", "passes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_progress_is_for_terminals_only(monkeypatch, terminal, quiet):
    file = io.StringIO()
    monkeypatch.setattr("fxopt.tools.console.stderr", lambda: Console(file=file, force_terminal=terminal))
    with stages(2, quiet=quiet) as progress:
        progress.extend(1)
        for name in ("load", "capture", "write"):
            progress.begin(name)
    assert ("write" in file.getvalue(), "2/3" in file.getvalue()) == (terminal and not quiet,) * 2


def test_module_runs_as_a_program(folder):
    command = [sys.executable, "-X", "importtime", "-m", "fxopt.tools.cli"]
    shown = subprocess.run([*command, "--version"], cwd=folder, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout.strip()) == (0, f"fxopt {fxopt.__version__}")
    loaded = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert {"torch", "fxopt.passes"} <= loaded
    # Each takes a second or more: not before it is used.
    assert not {"torch._dynamo", "triton.runtime", "onnxscript", "scipy.sparse", "scipy.optimize"} & loaded


def test_program_ends_with_the_status_of_a_wrong_command(folder):
    command = [sys.executable, "-m", "fxopt.tools.cli", "optimize", "no.py:N", "-o", "o.onnx"]
    wrong = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: there is no file no.py")
