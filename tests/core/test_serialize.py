"""Saved graphs come back the same, in a process that never saw the model; damaged and foreign files are named."""

import copy
import functools
import json
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.serialize import atomic_file
from tests.models import NETS, ConvBnRelu, DictOutput, Mlp, NestedInputs, RunningMean

ROUND_TRIPS = ["TiedLm", "LstmNet", "DictOutput", "KeywordOnly", "RunningMean", "MixedDtype", "StochasticDepth"]


@functools.cache
def shared(name: str) -> fxopt.CapturedModule:
    net = NETS[name]().eval()
    example = net.example(2)
    return fxopt.capture(net, fxopt.Sample(example.args, example.kwargs), dynamic_shapes=example.dynamic_shapes)


def outputs(gm: fxopt.CapturedModule, sample: fxopt.Sample) -> tuple[object, ...]:
    sample = sample.clone()
    with torch.no_grad():
        return gm.flat_outputs(*sample.args, **sample.kwargs)


def assert_same(want: tuple[object, ...], got: tuple[object, ...]) -> None:
    assert len(want) == len(got)
    for w, g in zip(want, got, strict=True):
        assert torch.equal(w, g) if isinstance(w, Tensor) else w == g


def captured(name: str) -> fxopt.CapturedModule:
    """Return a copy that a test may change."""
    return copy.deepcopy(shared(name))


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_keeps_everything(name: str, tmp_path: pathlib.Path) -> None:
    gm = captured(name)
    fxopt.save(gm, tmp_path / "net.fxopt")
    back = fxopt.load(tmp_path / "net.fxopt")
    assert fxopt.graph_text(back) == fxopt.graph_text(gm)
    assert back.inputs == gm.inputs
    assert back.output_names == gm.output_names
    assert [(d.name, d.min, d.max) for d in back.dims.values()] == [(d.name, d.min, d.max) for d in gm.dims.values()]
    assert (back.modes, back.training) == (gm.modes, gm.training)
    want, got = gm.state_dict(), back.state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert {name for name, _ in gm.named_parameters()} == {name for name, _ in back.named_parameters()}
    for batch in (2, 3):
        sample = gm.resized({"batch": batch})
        assert_same(outputs(gm, sample), outputs(back, sample))


@pytest.mark.parametrize("copier", ["load", "deepcopy", "pickle"])
def test_copies_share_no_tensor_and_switch_modes(copier: str, tmp_path: pathlib.Path) -> None:
    gm = captured("StochasticDepth")
    if copier == "load":
        fxopt.save(gm, tmp_path / "net.fxopt")
        twin = fxopt.load(tmp_path / "net.fxopt")
    else:
        twin = copy.deepcopy(gm) if copier == "deepcopy" else pickle.loads(pickle.dumps(gm))
    mine = {tensor.data_ptr() for tensor in [*gm.parameters(), *gm.buffers()]}
    assert mine.isdisjoint(tensor.data_ptr() for tensor in [*twin.parameters(), *twin.buffers()])
    sample = gm.samples[0]
    assert_same(outputs(gm, sample), outputs(twin, sample))
    gm.train()
    evaluated = outputs(twin, sample)
    twin.train()
    torch.manual_seed(3)
    want = outputs(gm, sample)
    torch.manual_seed(3)
    assert_same(want, outputs(twin, sample))
    assert not torch.equal(evaluated[0], want[0]), "training does something else"


def test_a_copy_of_a_tied_net_stays_tied(tmp_path: pathlib.Path) -> None:
    gm = captured("TiedLm")
    count = len(list(gm.parameters()))
    fxopt.save(gm, tmp_path / "net.fxopt")
    for twin in (copy.deepcopy(gm), fxopt.load(tmp_path / "net.fxopt"), pickle.loads(pickle.dumps(gm))):
        assert len(list(twin.parameters())) == count
        assert len(dict(twin.named_parameters(remove_duplicate=False))) > count


def test_frozen_parameters_and_source_lines_survive(tmp_path: pathlib.Path) -> None:
    net = Mlp().eval()
    first = next(iter(net.parameters()))
    first.requires_grad_(False)
    gm = fxopt.capture(net, net.example().args)
    fxopt.save(gm, tmp_path / "net.fxopt")
    back = fxopt.load(tmp_path / "net.fxopt")
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in gm.parameters()]
    assert [p.requires_grad for p in back.parameters()].count(False) == 1
    lines = [fxopt.source_line(node) for node in gm.graph.nodes]
    assert any(lines)
    assert [fxopt.source_line(node) for node in back.graph.nodes] == lines


def test_the_report_survives(tmp_path: pathlib.Path) -> None:
    net = DictOutput().eval()
    gm = fxopt.PassManager([lambda gm: None], check="samples").run(fxopt.capture(net, net.example().args))
    fxopt.save(gm, tmp_path / "net.fxopt")
    assert fxopt.load(tmp_path / "net.fxopt").report.to_dict() == gm.report.to_dict()


CHILD = """
import json, sys, torch, fxopt
gm = fxopt.load(sys.argv[1])
feed = torch.load(sys.argv[2], weights_only=True)
assert "tests" not in sys.modules and "tests.models" not in sys.modules
with torch.no_grad():
    torch.save(gm(feed), sys.argv[3])
gm.train()
gm(feed).sum().backward()
print(json.dumps({"grads": sum(p.grad is not None for p in gm.parameters()), "dims": list(gm.dims)}))
"""


def test_a_fresh_process_without_the_class(tmp_path: pathlib.Path) -> None:
    net = ConvBnRelu().eval()
    example = net.example(2)
    gm = fxopt.capture(net, example.args, dynamic_shapes=example.dynamic_shapes)
    fxopt.save(gm, tmp_path / "net.fxopt")
    feed = net.example(5).args[0]
    torch.save(feed, tmp_path / "feed.pt")
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, "child.py", "net.fxopt", "feed.pt", "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), gm(feed))
    assert json.loads(done.stdout) == {"grads": len(list(gm.parameters())), "dims": ["batch"]}


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, 0.99])
def test_a_cut_file_is_damaged(cut: float, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "net.fxopt"
    fxopt.save(captured("Mlp"), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(fxopt.FileFormatError, match=r"net\.fxopt is not a saved graph, or is damaged"):
        fxopt.load(path)


def test_other_files_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "other.bin"
    path.write_text("hello, this is text")
    with pytest.raises(fxopt.FileFormatError, match=r"other\.bin is not a saved graph"):
        fxopt.load(path)
    torch.save(Mlp().state_dict(), path)
    with pytest.raises(fxopt.FileFormatError, match=r"other\.bin is a torch file, and not a saved graph"):
        fxopt.load(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(fxopt.FileFormatError, match=r"other\.bin is not a saved graph"):
        fxopt.load(path)
    with pytest.raises(FileNotFoundError):
        fxopt.load(tmp_path / "missing.fxopt")


def test_a_newer_file_says_so(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "net.fxopt"
    fxopt.save(captured("Mlp"), path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"version": 99}, path)
    with pytest.raises(fxopt.FileFormatError, match=r"has format 99; this fxopt reads up to \d+\. Update fxopt"):
        fxopt.load(path)


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "net.fxopt"
    path.write_text("before")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"after")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["net.fxopt"]
    with atomic_file(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [p.name for p in tmp_path.iterdir()] == ["net.fxopt"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "net.fxopt"
    gm = captured("Mlp")
    fxopt.save(gm, path)
    before = path.read_bytes()
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    node.kwargs = {"odd": object()}
    with pytest.raises(TypeError, match="cannot be saved"):
        fxopt.save(gm, path)
    assert path.read_bytes() == before


def test_only_captured_graphs_are_saved(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError, match=r"got a Mlp; call fxopt\.capture first"):
        fxopt.save(Mlp(), tmp_path / "net.fxopt")
    assert list(tmp_path.iterdir()) == []


def test_nested_inputs_come_back(tmp_path: pathlib.Path) -> None:
    net = NestedInputs().eval()
    gm = fxopt.capture(net, net.example().args)
    fxopt.save(gm, tmp_path / "net.fxopt")
    back = fxopt.load(tmp_path / "net.fxopt")
    assert_same(outputs(gm, gm.samples[0]), outputs(back, back.samples[0]))


def test_buffers_go_on_counting(tmp_path: pathlib.Path) -> None:
    net = RunningMean().train()
    gm = fxopt.capture(net, net.example().args)
    gm(*net.example().args)
    fxopt.save(gm, tmp_path / "net.fxopt")
    back = fxopt.load(tmp_path / "net.fxopt")
    assert int(back.get_buffer("calls")) == 4
    back(*net.example().args)
    assert int(back.get_buffer("calls")) == 5
    assert int(gm.get_buffer("calls")) == 4


@pytest.mark.parametrize(
    "spoil", [lambda text: text[:-20], lambda text: text.replace("aten::", "aten::no_such_"), lambda text: "{}"]
)
def test_damaged_header_is_named(tmp_path: pathlib.Path, spoil: Callable[[str], str]) -> None:
    path = tmp_path / "graph.fxopt"
    fxopt.save(fxopt.capture(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    content = torch.load(path, weights_only=True)
    content["header"] = spoil(content["header"])
    torch.save(content, path)
    with pytest.raises(fxopt.FileFormatError, match=r"graph\.fxopt is damaged|no_such_linear"):
        fxopt.load(path)
