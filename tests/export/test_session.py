"""Sessions: inputs by position and name, levels of optimization, types that numpy lacks."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import Session, optimized_model, to_onnx
from tests.export.proof import captured

pytestmark = pytest.mark.ort


def two_inputs():
    return to_onnx(captured(lambda a, b: (a - b, a * 2), torch.randn(3, 4), torch.randn(3, 4)))


def test_inputs_by_position_and_by_name():
    session = two_inputs().session(optimization="none", threads=1)
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(session.run([a, b])[0], a - b)
    assert torch.equal(session.run({"b": b, "a": a})[0], a - b)
    assert torch.equal(session.run([a.t().contiguous().t(), b])[0], a - b)


def test_wrong_inputs_are_named():
    session = two_inputs().session()
    with pytest.raises(fxopt.ExportError, match="the model takes 2 inputs and got 1: a, b"):
        session.run([torch.randn(2, 4)])
    with pytest.raises(fxopt.ExportError, match="ONNX Runtime fails to run the model"):
        session.run([torch.randn(2, 4), torch.randn(2, 5)])


def test_a_broken_model_is_refused():
    with pytest.raises(fxopt.ExportError, match="ONNX Runtime does not accept the model"):
        Session(b"not a model")
    with pytest.raises(ValueError, match="optimization is 'some'; wanted one of none, basic, extended, all"):
        Session(b"", optimization="some")


def test_the_optimized_graph_is_what_ort_runs():
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    file = to_onnx(captured(layer, torch.randn(3, 3, 6, 6)))
    assert [node.op_type for node in file.model.graph] == ["Conv", "BatchNormalization", "Relu"]
    optimized = optimized_model(file.to_bytes(), optimization="extended")
    assert [node.op_type for node in optimized.graph] == ["FusedConv"]


class Sides(nn.Module):
    """A layer in front of a branch, and one in each side of it."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        x = self.first(x).sigmoid()
        if x.sum() > 0:
            return self.left(x).tanh()
        return self.right(x)


def test_the_optimized_graph_of_a_model_with_weights_beside_it(tmp_path):
    file = to_onnx(captured(Sides(), torch.randn(3, 32))).save(tmp_path / "net.onnx", external_data="always")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["net.onnx", "net.onnx.data"]
    beside, whole = optimized_model(file.path), optimized_model(file.to_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert [node.op_type for node in beside.graph] == [node.op_type for node in whole.graph]
    assert beside.graph.initializers.keys() == whole.graph.initializers.keys()
    for name, value in beside.graph.initializers.items():
        assert (value.const_value.numpy() == whole.graph.initializers[name].const_value.numpy()).all()


@pytest.mark.parametrize("external_data", ["always", "never"])
def test_the_saved_optimized_graph_runs_where_it_lies(external_data, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    file = to_onnx(captured(Sides(), torch.randn(3, 32)))
    file = file.save(tmp_path / "net.onnx", external_data=external_data)
    saved = tmp_path / "elsewhere" / "optimized.onnx"
    session = Session(file.path, optimization="extended", save_optimized=saved)
    assert saved.with_name("optimized.onnx.data").exists() == (external_data == "always")
    for path in tmp_path.glob("net.onnx*"):
        path.unlink()
    x = torch.randn(5, 32)
    assert torch.equal(Session(saved, optimization="none").run([x])[0], session.run([x])[0])


def test_bfloat16_in_and_out():
    file = to_onnx(captured(lambda x: x * 2, torch.randn(3, 4).bfloat16()))
    x = torch.randn(5, 4).bfloat16()
    (got,) = file.session().run([x])
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, x * 2)


def test_empty_batches():
    file = to_onnx(captured(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), torch.randn(3, 2, 4)))
    (got,) = file.session().run([torch.randn(0, 2, 4)])
    assert got.shape == (0, 3)
