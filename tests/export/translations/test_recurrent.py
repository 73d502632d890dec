"""Recurrent layers against ORT's own kernels: layers, directions, initial states, layouts."""

import itertools

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import to_onnx
from tests.export.proof import captured, op_types, prove

pytestmark = pytest.mark.ort

LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("layers", "bidirectional"), list(itertools.product((1, 2), (False, True))))
def test_recurrent(kind, layers, bidirectional):
    prove(LAYERS[kind](4, 6, layers, bidirectional=bidirectional, batch_first=True), torch.randn(3, 5, 4))


@pytest.mark.parametrize("kind", LAYERS)
def test_dynamic_length_and_no_biases(kind):
    prove(LAYERS[kind](4, 6, bias=False), torch.randn(5, 3, 4))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_initial_state(kind):
    layer = LAYERS[kind](4, 6, 2)
    states = (torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    if kind == "lstm":
        prove(lambda x, h, c: layer(x, (h, c)), torch.randn(5, 3, 4), *states, dynamic=False)
    else:
        prove(lambda x, h: layer(x, h), torch.randn(5, 3, 4), states[0], dynamic=False)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_batch(kind):
    prove(LAYERS[kind](4, 6), torch.randn(5, 4))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_declare_a_dynamic_batch(kind, bias):
    cell = kind(4, 6, bias=bias)
    inputs = [torch.randn(2, 4), torch.randn(2, 6), torch.randn(2, 6)]
    if kind is nn.LSTMCell:
        file = prove(lambda x, h, c: cell(x, (h, c)), *inputs)
    else:
        file = prove(lambda x, h: cell(x, h), *inputs[:2])
    assert [list(map(str, output.shape)) for output in file.model.graph.outputs] == [["n2", "6"]] * (
        2 if kind is nn.LSTMCell else 1
    )


def test_exporting_a_cell_leaves_the_sizes_of_the_graph_dynamic():
    gm = captured(nn.GRUCell(4, 6), torch.randn(2, 4), torch.randn(2, 6))
    sizes = [str(node.meta["val"].shape) for node in gm.graph.nodes if node.op != "output"]
    to_onnx(gm)
    assert [str(node.meta["val"].shape) for node in gm.graph.nodes if node.op != "output"] == sizes


def test_each_layer_is_one_node_with_its_weights_rearranged():
    file = prove(nn.LSTM(4, 6, 2, batch_first=True), torch.randn(3, 5, 4))
    assert op_types(file).count("LSTM") == 2
    assert {"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"} <= set(file.model.graph.initializers)


def test_computed_weights_are_rearranged_by_nodes():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(4, 6, batch_first=True, bidirectional=True)

        def forward(self, x):
            weights = [parameter * (parameter.abs() > 0.1) for parameter in self.layer._flat_weights]
            zeros = torch.zeros(2, x.shape[0], 6)
            return torch._VF.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, True, True)[0]

    prove(Masked(), torch.randn(3, 5, 4))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projections_are_refused():
    gm = captured(nn.LSTM(4, 6, proj_size=3, batch_first=True), torch.randn(3, 5, 4))
    with pytest.raises(fxopt.ExportError, match="proj_size"):
        to_onnx(gm)
