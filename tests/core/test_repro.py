"""The folder that bisect saves shows the difference by itself: to fxopt, to torch alone, and to who reads it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxopt
from fxopt.contracts import Contract
from fxopt.numerics import measure
from fxopt.reduce import size_in_nodes
from fxopt.repro import compare
from tests.core.planted import bisected, graph_of, outputs_of, residual_net

aten = torch.ops.aten


@pytest.fixture(scope="module")
def resnet():
    return residual_net()


def ran(script, *code):
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ.get("PATH", "")}
    command = [sys.executable, *(code or [str(script)])]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def saved(resnet, tmp_path_factory):
    found = bisected(resnet, "conv2d_7")
    folder = tmp_path_factory.mktemp("repro")
    found.save(folder)
    return found, folder


def test_the_script_shows_it_in_a_process_of_its_own(saved):
    found, folder = saved
    done = ran(folder / "repro.py")
    assert done.returncode == 1, done.stderr
    assert str(measure(*outputs_of(found.reduced))) in done.stdout
    assert "exceeds the ROUNDING bound" in done.stdout


def test_the_script_says_what_it_is(saved):
    found, folder = saved
    head = (folder / "repro.py").read_text().partition("from pathlib")[0]
    for part in ("spoil{wrong=conv2d_7} (step 1)", "planted.py:", "exceeds the ROUNDING bound", "before.pt2"):
        assert part in head
    assert f"2 of {found.reduced.whole_nodes} nodes, which compute conv2d_7" in head
    assert all(line.startswith("#") or not line for line in head.splitlines())


def test_only_tensors_that_are_read_are_saved(saved, resnet, tmp_path):
    found, folder = saved
    after = fxopt.load(folder / "after.fxopt")
    reads = {str(node.target) for node in after.graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in after.named_parameters()} == reads == {"blocks.3.conv1.weight"}
    found.save(tmp_path, whole=True)
    for name in ("before.fxopt", "after.fxopt", "after.pt2"):
        assert (folder / name).stat().st_size < 0.5 * (tmp_path / name).stat().st_size
    assert size_in_nodes(fxopt.load(tmp_path / "after.fxopt")) == size_in_nodes(found.after)
    assert compare(*(fxopt.load(tmp_path / f"{name}.fxopt") for name in ("before", "after")), Contract.ROUNDING)[1]


def test_programs_of_torch_show_it_without_fxopt(saved):
    found, folder = saved
    code = (
        "import sys, torch\n"
        f"(args, kwargs), = torch.load({str(folder / 'inputs.pt')!r})\n"
        "with torch.no_grad():\n"
        f"    a, b = (torch.export.load({str(folder)!r} + n).module()(*args) for n in ('/before.pt2', '/after.pt2'))\n"
        "print(float((a.double() - b.double()).abs().max()), 'fxopt' in sys.modules)\n"
    )
    done = ran(None, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(measure(*outputs_of(found.reduced)).max_abs), "False"]


def test_a_program_that_torch_refuses_is_explained(resnet, tmp_path, monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("no such operator")

    (tmp_path / "after.pt2").write_text("of an earlier run")
    found = bisected(resnet, "relu_4")
    monkeypatch.setattr(torch.export, "export", refuses)
    script = found.save(tmp_path)
    assert "after.pt2 is missing: torch.export says RuntimeError: no such operator" in script.read_text()
    assert not (tmp_path / "after.pt2").exists()


def test_operators_of_fxopt_in_a_program_are_named(tmp_path):
    class Moody(nn.Module):
        def forward(self, x):
            return torch.sin(fxopt_scaled(x))

    def fxopt_scaled(x):
        return torch.ops.fxopt.quantize(
            torch.tanh(x), torch.tensor(0.1), torch.tensor(0, dtype=torch.int8), 0, -128, 127
        ).float()

    script = bisected(graph_of(Moody, torch.rand(3)), "to").save(tmp_path, whole=True)
    assert "calls fxopt.quantize" in script.read_text()
