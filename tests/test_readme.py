"""The code of README.md runs as it is printed, and what the page says of commands and names is so."""

import pathlib
import re
import shlex
import sys

import pytest
import torch
from typer.testing import CliRunner

import fxopt
from fxopt.passes import DEFAULT, PASSES
from fxopt.tools.cli import app
from tests.distributed.launch import torchrun

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()


def python_below(heading: str) -> list[str]:
    """Return the Python code that stands below a heading of the page, block by block."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{heading}\n")]
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


NET_CODE, EXAMPLE_CODE = python_below("In Python")
BRANCH_NET_CODE, BRANCH_CODE = python_below("Python that branches on values")
(INTEGER_CODE,) = python_below("Integers")
(PRUNING_CODE,) = python_below("Smaller nets")
(DISTILLING_CODE,) = python_below("Students and teachers")
(HALF_CODE,) = python_below("Half precision")
(FAULT_CODE,) = python_below("Where it goes wrong")
(LEDGER_CODE,) = python_below("How to read the report")
(MIXED_CODE,) = python_below("Training in half precision")
TRAIN_CODE, SHARD_CODE = python_below("Training on many machines")
(COMMANDS,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def ran(code: str) -> dict:
    """Run code of the page, and return the names that it leaves."""
    names = {"__name__": "example"}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that holds the page's net.py."""
    (tmp_path / "net.py").write_text(NET_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    yield tmp_path
    sys.modules.pop("net", None)


@pytest.mark.ort
def test_python_example_runs_and_writes_a_model_of_any_batch(folder, capsys):
    from fxopt.export import Session

    names = ran(EXAMPLE_CODE)
    said = capsys.readouterr().out
    assert all(item.name in said for item in DEFAULT)
    assert "contract ROUNDING" in said
    images = torch.randn(7, 3, 32, 32)
    (scores,) = Session(folder / "small.onnx").run([images])
    with torch.no_grad():
        torch.testing.assert_close(scores, names["small"](images), rtol=1e-4, atol=1e-5)


@pytest.mark.ort
def test_branch_example_runs_and_guards(folder, capsys):
    from fxopt.export import Session

    (folder / "gated.py").write_text(BRANCH_NET_CODE)
    sys.modules.pop("gated", None)
    names = ran(BRANCH_CODE)
    said = capsys.readouterr().out
    assert "gated.py:11, in forward: if x.norm().item() > 1:" in said
    fast, graph = Session(folder / "fast.onnx"), names["graph"]
    assert fast.output_names[-1] == "guards_hold"
    for scale, holds in ((0.001, False), (10.0, True)):
        x = torch.randn(5, 8) * scale
        scores, guards = fast.run([x])
        assert bool(guards) is holds
        (both,) = Session(folder / "gated.onnx").run([x])
        with torch.no_grad():
            torch.testing.assert_close(both, graph(x), rtol=1e-4, atol=1e-5)
        if holds:
            torch.testing.assert_close(scores, both, rtol=1e-4, atol=1e-5)


@pytest.mark.ort
def test_integer_example_runs_in_integers(folder, capsys):
    from fxopt.export import coverage

    names = ran(INTEGER_CODE)
    said = capsys.readouterr().out
    assert "with correct-bias" in said
    assert "conv_weight" in said
    assert coverage(folder / "int8.onnx").integer_share == 1.0
    assert any("within the budget" in note for note in names["tuned"].report.steps[-1].notes)


@pytest.mark.ort
def test_pruning_example_shrinks_the_net(folder, capsys):
    from fxopt.export import Session

    names = ran(PRUNING_CODE)
    said = capsys.readouterr().out
    assert "0 above 1e-04, 0 masked groups not removed" in said
    assert re.search(r"conv.weight .* of 16 rows masked", said)
    for net in ("small", "trained"):
        assert dict(names[net].named_parameters())["conv.weight"].shape == (8, 3, 3, 3)
    images = torch.randn(7, 3, 32, 32)
    (scores,) = Session(folder / "small.onnx").run([images])
    with torch.no_grad():
        torch.testing.assert_close(scores, names["small"](images), rtol=1e-4, atol=1e-5)


def test_distilling_example_gives_the_student_back(folder, capsys):
    names = ran(DISTILLING_CODE)
    assert "the student is, node for node, the graph that went in" in capsys.readouterr().out
    assert list(names["out"]["terms"]) == ["response", "hint conv"]
    assert names["trained"](torch.randn(7, 3, 32, 32)).shape == (7, 10)
    assert [step.status for step in names["small"].report.steps] == ["changed"] * 3


def test_half_precision_example_trains(folder, capsys):
    names = ran(MIXED_CODE)
    said = capsys.readouterr().out
    assert re.search(r"^conv2d +float16$", said, re.MULTILINE)
    assert "mean loses digits or range in half (net.py:" in said
    images = torch.randn(7, 3, 32, 32)
    model = names["Net"]().eval()
    model.load_state_dict(names["adaptive"].gm.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(names["adaptive"].gm.eval()(images), model(images), rtol=1e-2, atol=1e-2)


@pytest.mark.slow  # tests/distributed trains and shards the same way
def test_examples_of_many_machines_run_under_torchrun(folder):
    for name, code, processes in (("train.py", TRAIN_CODE, 2), ("shard.py", SHARD_CODE, 1)):
        (folder / name).write_text(code)
        torchrun(name, folder=folder, processes=processes)
    trained = fxopt.load(folder / "trained.fxopt")
    masks = [mask for name, mask in trained.named_buffers() if name.endswith("_mask")]
    assert masks
    assert not all(mask.all() for mask in masks)


@pytest.mark.ort
def test_half_precision_example_plans_and_exports(folder, capsys):
    names = ran(HALF_CODE)
    said = capsys.readouterr().out
    assert "cast-half" in said
    assert "emulated" in said
    assert "conv2d" in names["plan"].half
    assert "linear" not in names["plan"].half  # the page denies the head
    assert (folder / "half.onnx").stat().st_size > 0


@pytest.mark.ort
def test_fault_example_blames_bisects_and_bundles(folder, capsys):
    ran(FAULT_CODE)
    said = capsys.readouterr().out
    assert said.count("every node computes what it should") == 2
    assert "quantize (step 1) as a whole breaks the check" in said
    assert "integers.onnx by line:" in said
    assert "bundle is intact, and ONNX Runtime agrees" in said
    assert (folder / "repro" / "repro.py").exists()


@pytest.mark.ort
def test_ledger_example_measures_every_step(folder, capsys):
    captured, folded, integers = (entry.numbers for entry in ran(LEDGER_CODE)["book"].entries)
    assert (captured.integer_share, folded.integer_share, integers.integer_share) == (0.0, 0.0, 1.0)
    assert captured.score == folded.score == 1.0
    assert "quantize" in capsys.readouterr().out
    assert "<svg" in (folder / "ledger.html").read_text()


@pytest.mark.ort
def test_commands_run(folder):
    commands = [shlex.split(line) for line in COMMANDS.splitlines()]
    named = ("optimize", "validate", "passes", "optimize", "blame", "bench", "bundle", "verify", "demo")
    assert [command[:2] for command in commands] == [["fxopt", name] for name in named]
    for command in commands[:-1]:  # tests/tools/test_demo.py runs the demo, and test_cli.py the program as a whole
        done = CliRunner().invoke(app, command[1:], prog_name="fxopt")
        assert done.exit_code == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}\n{done.exception!r}"
    assert (folder / "small.onnx").exists()


def test_passes_that_the_page_names_exist():
    names = {item.name for item in PASSES}
    shown = set(",".join(re.findall(r'"((?:[a-z]+-)+[a-z]+(?:,(?:[a-z]+-)*[a-z]+)*)"', PAGE)).split(","))
    assert {"fold-batch-norm", "remove-identities"} <= shown
    assert shown <= names


def test_make_targets_and_links_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make (\w+)", PAGE, re.MULTILINE)) == {"demo", "test"} <= targets
    assert [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not (ROOT / link).exists()] == []
