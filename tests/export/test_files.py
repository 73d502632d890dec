"""Files in two parts, and failures between the parts."""

import importlib
import os

import onnx
import pytest
import torch
from torch import nn

import fxopt
import fxopt.export
from fxopt.errors import ExportError
from fxopt.export import to_onnx
from fxopt.export.files import file_bytes
from tests.export.proof import captured

pytestmark = pytest.mark.ort


def graph() -> fxopt.CapturedModule:
    return captured(nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3)), torch.randn(3, 40))


def test_external_data_lies_beside_the_model_and_is_found(tmp_path, monkeypatch):
    file = to_onnx(graph(), tmp_path / "net.onnx", external_data="always")
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    assert os.path.getsize(tmp_path / "net.onnx.data") >= 40 * 50 * 4
    assert os.path.getsize(tmp_path / "net.onnx") < 40 * 50 * 4
    monkeypatch.chdir("/")
    onnx.load(file.path)
    assert file.session().output_names == ("output",)


def test_auto_writes_two_parts_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("fxopt.export.files._LARGEST_FILE", 5000)
    to_onnx(graph(), tmp_path / "net.onnx")
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    with pytest.raises(fxopt.ExportError, match="do not fit into one protobuf"):
        to_onnx(graph(), tmp_path / "one.onnx", external_data="never")
    with pytest.raises(fxopt.ExportError, match="do not fit into one protobuf"):
        to_onnx(graph())
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]


def test_a_misspelt_option_is_refused(tmp_path):
    with pytest.raises(fxopt.ExportError, match="external_data is 'yes'; wanted 'auto', 'always' or 'never'"):
        to_onnx(graph(), tmp_path / "net.onnx", external_data="yes")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failure_while_moving_puts_everything_back(failing, tmp_path, monkeypatch):
    to_onnx(graph(), tmp_path / "net.onnx", external_data="always")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    moves, real = [], os.replace

    def replace(source, target):
        moves.append(source)
        if len(moves) == failing:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(fxopt.ExportError, match="No space left on device"):
        to_onnx(graph(), tmp_path / "net.onnx", external_data="always")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(fxopt.ExportError, match=r"cannot write .*net\.onnx: No space left on device"):
        to_onnx(graph(), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("fxopt.export.to_onnx"), "validate_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(graph(), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_save_again_elsewhere(tmp_path):
    file = to_onnx(graph())
    saved = file.save(tmp_path / "copy.onnx")
    assert saved.path == tmp_path / "copy.onnx"
    assert saved.validation is file.validation
    assert saved.path.read_bytes() == file.to_bytes()


def test_bytes_of_a_model_are_those_of_all_its_files(tmp_path):
    whole = to_onnx(graph(), tmp_path / "whole.onnx")
    assert file_bytes(whole.path) == os.path.getsize(whole.path)
    model = onnx.load(whole.path)
    onnx.save(
        model, tmp_path / "parts.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    parts = [name for name in os.listdir(tmp_path) if name != "whole.onnx"]
    assert len(parts) > 3
    assert file_bytes(tmp_path / "parts.onnx") == sum(os.path.getsize(tmp_path / name) for name in parts)


def test_bytes_do_not_count_a_file_that_just_lies_beside(tmp_path):
    file = to_onnx(graph(), tmp_path / "net.onnx")
    (tmp_path / "net.onnx.data").write_bytes(b"of an earlier run")
    assert file_bytes(file.path) == os.path.getsize(file.path)


def test_bytes_of_a_model_whose_weights_are_gone_are_refused(tmp_path):
    to_onnx(graph(), tmp_path / "net.onnx", external_data="always")
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ExportError, match="cannot read"):
        file_bytes(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("blame", {"reference": b""}),
        ("blame", {"optimization": "extended"}),
        ("bisect_ort", {"inputs": (torch.randn(3, 40),)}),
        ("coverage", {}),
        ("node_times", {}),
    ],
    ids=["blame as it stands", "blame", "bisect_ort", "coverage", "node_times"],
)
def test_a_graph_where_a_file_is_wanted_is_refused_with_what_to_do(tool, options):
    want = r"no ONNX model\n +got .*Module\n +wanted .*\n +try +export it first, with fxopt.export.to_onnx"
    with pytest.raises(ExportError, match=want):
        getattr(fxopt.export, tool)(graph(), **options)
