"""Writing a file: metadata, refusals, and nothing left behind by a failure."""

import importlib
import os

import onnx
import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import to_onnx
from tests.export.proof import captured

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """What a training step changes: dropout and running statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x):
        return self.body(x).mean((2, 3))


X = torch.randn(2, 3, 6, 6)


def graph() -> fxopt.CapturedModule:
    return fxopt.capture(Net(), (X,), dynamic_shapes={"x": {0: "batch"}}).eval()


def test_a_file_is_written_validated_and_legal(tmp_path):
    path = tmp_path / "net.onnx"
    file = to_onnx(graph(), path)
    assert file.path == path
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert file.validation is not None
    assert file.validation.max_abs < 1e-5
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert str(file).startswith(f"{path}: 4 nodes")


def test_metadata_of_the_model(tmp_path):
    to_onnx(graph(), tmp_path / "net.onnx", metadata={"owner": "me"})
    model = onnx.load(tmp_path / "net.onnx")
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert held == {
        "fxopt.version": fxopt.__version__,
        "fxopt.passes": "",
        "fxopt.contract": "EXACT",
        "torch.version": torch.__version__,
        "owner": "me",
    }
    assert (model.producer_name, model.producer_version) == ("fxopt", fxopt.__version__)


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23])
def test_every_opset(opset, tmp_path):
    file = to_onnx(graph(), tmp_path / "net.onnx", opset=opset)
    assert file.opset == opset
    onnx.checker.check_model(onnx.load(file.path), full_check=True)


@pytest.mark.parametrize("opset", [11, 17, 24, 99])
def test_other_opsets_are_refused(opset):
    with pytest.raises(fxopt.ExportError, match=f"opset {opset} cannot be written; wanted 18 to 23"):
        to_onnx(graph(), opset=opset)


def test_a_module_is_captured_and_exported_as_in_evaluation():
    net = Net().train()
    file = to_onnx(net, example_inputs=(X,), dynamic_shapes={"x": {0: "batch"}})
    assert net.training
    (got,) = file.session().run([X[:1]])
    torch.testing.assert_close(got, net.eval()(X[:1]), rtol=1e-4, atol=1e-5)


def test_a_module_without_inputs_is_refused():
    with pytest.raises(fxopt.ExportError, match="a Net is not a captured graph"):
        to_onnx(Net())
    with pytest.raises(fxopt.ExportError, match="belong to a module that is not captured yet"):
        to_onnx(graph(), example_inputs=(X,))


def test_train_mode_is_refused_with_the_line():
    with pytest.raises(fxopt.ExportError) as caught:
        to_onnx(graph().train())
    message = str(caught.value)
    assert message.startswith("the graph is in train mode, and an ONNX file only evaluates")
    assert "node    batch_norm (aten.batch_norm.default)" in message
    assert "try     call .eval() on the graph before the export" in message


class DropsOnlyInTraining(nn.Module):
    """A model of its own branch on the mode, and one of torch's: attention weights are dropped in training alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        y, weights = self.attention(x, x, x)
        return (torch.bernoulli(y.abs().clamp(0, 1)) if self.training else y * 2), weights


def test_what_only_training_computes_is_not_in_the_file():
    x = torch.randn(2, 5, 8)
    gm = fxopt.capture(DropsOnlyInTraining().eval(), (x,))
    before = str(gm.graph)
    file = to_onnx(gm)
    assert {node.op_type for node in file.model.graph}.isdisjoint({"Dropout", "Bernoulli", "RandomUniformLike"})
    assert str(gm.graph) == before  # and it still trains
    assert gm.modes == "both"
    with pytest.raises(fxopt.ExportError, match="the graph is in train mode"):
        to_onnx(gm.train())


def test_a_branch_of_training_without_randomness_is_refused_too():
    class Scaled(nn.Module):
        def forward(self, x):
            return x * 2 if self.training else x * 3

    gm = fxopt.capture(Scaled().eval(), (X,))
    assert to_onnx(gm).validation is not None
    with pytest.raises(fxopt.ExportError, match="the graph is in train mode"):
        to_onnx(gm.train())


def test_a_buffer_that_is_written_in_evaluation_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = nn.Buffer(torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    with pytest.raises(fxopt.ExportError, match=r"buffer|train mode"):
        to_onnx(captured(Counting(), torch.randn(3, 4)))


def test_counters_that_rest_in_evaluation_are_ignored():
    assert "num_batches_tracked" not in str(to_onnx(graph()).model.graph)


@pytest.mark.parametrize("path", ["missing/net.onnx", "."])
def test_unwritable_paths_are_refused_before_any_work(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("fxopt.export.to_onnx"), "translate", None)  # must not be reached
    with pytest.raises(fxopt.ExportError, match="cannot write"):
        to_onnx(graph(), path)
    assert os.listdir(tmp_path) == []


def test_a_wrong_translation_leaves_no_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    from fxopt.export.registry import TRANSLATIONS

    path = tmp_path / "net.onnx"
    to_onnx(graph(), path)
    before = path.read_bytes()
    monkeypatch.setitem(TRANSLATIONS, torch.ops.aten.relu.default, lambda emit, x: emit("Abs", x))
    with pytest.raises(fxopt.NumericsError):
        to_onnx(graph(), path)
    with pytest.raises(fxopt.NumericsError):
        to_onnx(graph(), tmp_path / "new.onnx")
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert path.read_bytes() == before


def test_without_validation_a_wrong_file_is_written(tmp_path, monkeypatch):
    from fxopt.export.registry import TRANSLATIONS

    monkeypatch.setitem(TRANSLATIONS, torch.ops.aten.relu.default, lambda emit, x: emit("Abs", x))
    assert to_onnx(graph(), tmp_path / "net.onnx", validate=False).validation is None


def test_a_model_in_memory():
    file = to_onnx(graph())
    assert file.path is None
    assert file.session().input_names == ("x",)


def test_bfloat16_and_half_models_run():
    for dtype in (torch.float16, torch.bfloat16):
        layer = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8)).to(dtype)
        to_onnx(captured(layer, torch.randn(3, 4).to(dtype)), contract=fxopt.Contract.lossy("sqnr_db", 30.0))
