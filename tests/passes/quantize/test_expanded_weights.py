"""Weights in blocks of layers that have no kernel of blocks: small files, the same numbers, the time of floats."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Contract
from fxopt.export import optimized_model, to_onnx
from fxopt.passes import CodebookWeights, QuantizeWeights
from fxopt.passes.quantize.blocks import quantize_blocks
from fxopt.testing import check_pass
from fxopt.weight_only_ops import EXPAND_NBITS, LOOKUP_NBITS, MATMUL_NBITS
from tests.passes.quantize.nets import Steps

ANY = -100.0  # dB: how good few bits are is not asked here
CONVOLUTIONS = ("linear", "convolution")


class Last(nn.Module):
    """The sequence that a recurrent layer returns beside its state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


LAYERS = {
    "lstm": lambda: Last(nn.LSTM(40, 24, 2, batch_first=True, bidirectional=True)),
    "gru": lambda: Last(nn.GRU(40, 24, batch_first=True)),
    "rnn": lambda: Last(nn.RNN(40, 24, batch_first=True)),
    "lstm_cell": lambda: Steps(nn.LSTMCell(40, 24)),
    "gru_cell": lambda: Steps(nn.GRUCell(40, 24)),
    "rnn_cell": lambda: Steps(nn.RNNCell(40, 24)),
    "conv": lambda: nn.Conv1d(3, 40, 5),
    "grouped_conv": lambda: nn.Conv1d(3, 12, 9, groups=3),
    "transposed_conv": lambda: nn.ConvTranspose1d(3, 20, 4),
}

LONG = {"rnn", "rnn_cell", "grouped_conv"}  # one of each kind is enough


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: held.detach() for name, held in model.named_parameters() if "weight" in name}


def with_weights(model: nn.Module, new: dict[str, Tensor]) -> nn.Module:
    """Give a model other weights."""
    with torch.no_grad():
        for name, held in model.named_parameters():
            held.copy_(new.get(name, held))
    return model


@pytest.mark.ort
@pytest.mark.parametrize(
    ("name", "bits", "symmetric"),
    [
        *(pytest.param(name, 4, False, marks=[pytest.mark.slow] if name in LONG else []) for name in LAYERS),
        ("lstm", 2, False),
        ("lstm", 8, True),
        ("conv", 8, False),
        ("gru", 4, True),
    ],
)
def test_a_layer_computes_with_what_its_blocks_stand_for(name: str, bits: int, symmetric: bool) -> None:
    model, x = LAYERS[name]().eval(), torch.randn(2, 3, 40)
    pass_ = QuantizeWeights(
        bits=bits,
        symmetric=symmetric,
        min_elements=1,
        block_size=16,
        min_sqnr_db=ANY,
        kinds=("recurrent", "convolution"),
    )
    gm = fxopt.optimize(fxopt.capture(model, (x,), dynamic_shapes=({0: "batch"},)), [pass_], strict=True)
    held = matrices(model)
    assert sum(node.target is EXPAND_NBITS for node in gm.graph.nodes) == len(held)
    assert not set(held) & set(gm.state_dict())
    rounded = {
        name: quantize_blocks(weight.flatten(1), bits=bits, block_size=16, symmetric=symmetric)
        for name, weight in held.items()
    }
    wanted = with_weights(model, {name: rounded[name].floats().view(weight.shape) for name, weight in held.items()})
    torch.testing.assert_close(gm(x), wanted(x), rtol=1e-5, atol=1e-5)
    file = to_onnx(gm, contract=Contract.ROUNDING)
    stored = [held for held in file.model.graph.initializers.values() if len(held.shape) > 1]
    assert {str(value.dtype) for value in stored if "blocks" in str(value.name)} == {"UINT8"}
    left = {node.op_type for node in optimized_model(file.to_bytes()).graph}
    assert not left & {"BitShift", "BitwiseAnd", "Cast"}  # ORT computed the weights when it loaded the file


@pytest.mark.parametrize("name", ["lstm", "gru_cell", "transposed_conv"])
def test_a_layer_reads_tables(name: str) -> None:
    model, x = LAYERS[name]().eval(), torch.randn(2, 3, 40)
    gm = fxopt.optimize(
        fxopt.capture(model, (x,)), [CodebookWeights(bits=4, min_elements=1, min_sqnr_db=ANY)], strict=True
    )
    calls = [node for node in gm.graph.nodes if node.target is LOOKUP_NBITS]
    assert len(calls) == len(matrices(model))
    expanded = [
        LOOKUP_NBITS(
            *(gm.get_buffer(str(call.args[0].target)), gm.get_parameter(str(call.args[1].target)), *call.args[2:])
        )
        for call in calls
    ]
    names = [str(call.args[0].target).removesuffix("_places") for call in calls]
    wanted = with_weights(model, dict(zip(names, expanded, strict=True)))
    torch.testing.assert_close(gm(x), wanted(x), rtol=1e-5, atol=1e-5)


def test_convolutions_stay_unless_they_are_named():
    net, x = nn.Sequential(nn.Conv1d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 6, 12)), torch.randn(2, 8, 8)
    result = check_pass(QuantizeWeights(min_elements=64), net, x, changes=1)
    assert [skip.node for skip in result.skips] == ["conv1d"]
    assert [node.target for node in result.gm.graph.nodes if node.target in (EXPAND_NBITS, MATMUL_NBITS)] == [
        MATMUL_NBITS
    ]
    result = check_pass(QuantizeWeights(min_elements=64, kinds=CONVOLUTIONS, min_sqnr_db=ANY), net, x)
    assert sum(node.target in (EXPAND_NBITS, MATMUL_NBITS) for node in result.gm.graph.nodes) == 2


def test_a_weight_that_blocks_would_make_larger_stays():
    net, x = nn.Conv2d(6, 6, 1, groups=6), torch.randn(2, 6, 4, 4)  # rows of one number
    result = check_pass(QuantizeWeights(min_elements=1, kinds=("convolution",)), net, x, changes=0)
    assert ["its blocks would take" in skip.why for skip in result.skips] == [True]


def test_gradients_reach_what_stands_before():
    net = nn.Sequential(nn.Linear(40, 40), Last(nn.LSTM(40, 24, batch_first=True)))
    gm = fxopt.optimize(
        fxopt.capture(net, (x := torch.randn(2, 3, 40),)),
        [QuantizeWeights(kinds=("recurrent",), min_elements=1, min_sqnr_db=ANY)],
        strict=True,
    )
    gm(x).sum().backward()
    assert all(bool(held.grad.any()) for name, held in gm.named_parameters() if name.startswith("0."))


def test_a_saved_graph_comes_back(tmp_path):
    gm = fxopt.optimize(
        fxopt.capture(LAYERS["gru"]().eval(), (x := torch.randn(2, 3, 40),)),
        [QuantizeWeights(min_elements=1, min_sqnr_db=ANY)],
        strict=True,
    )
    fxopt.save(gm, tmp_path / "net.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "net.fxopt")(x), gm(x))


@pytest.mark.ort
def test_files_are_as_small_as_what_they_hold(tmp_path):
    x = torch.randn(2, 3, 128)
    captured = fxopt.capture(Last(nn.LSTM(128, 256, batch_first=True)).eval(), (x,))
    sizes = {}
    for bits, passes in itertools.chain([(32, [])], ((bits, [QuantizeWeights(bits=bits)]) for bits in (4, 8))):
        to_onnx(fxopt.optimize(captured, passes, strict=True), path := tmp_path / f"{bits}.onnx")
        sizes[bits] = path.stat().st_size
    assert sizes[4] < sizes[32] / 5.5
    assert sizes[8] < sizes[32] / 3.3
