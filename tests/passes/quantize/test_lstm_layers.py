"""Stacks of LSTM layers of which some compute in integers, and weights that are stored in 8 bits alone."""

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.dynamic_ops import DYNAMIC_LSTM
from fxopt.export import Session, coverage, to_onnx
from fxopt.numerics import measure
from fxopt.passes import Quantize, QuantizeDynamic
from fxopt.passes.quantize.recurrent_weights import row_integers
from fxopt.quantized_ops import DEQUANTIZE
from fxopt.testing import check_pass

SMALL = QuantizeDynamic(min_elements=64)
SHAPES = {"x": {0: "batch", 1: "length"}, "h": {1: "batch"}, "c": {1: "batch"}}
aten = torch.ops.aten


def calls(gm: fxopt.CapturedModule, *targets: object) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target in targets]


class Stack(nn.Module):
    """Three layers that start with given states; yields the sequence and both last states."""

    def __init__(self, bidirectional: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 8, 3, bias=bias, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.layer(x, (h, c))
        return y, h, c

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        states = 6 if self.layer.bidirectional else 3
        return torch.randn(2, 5, 6), torch.randn(states, 2, 8), torch.randn(states, 2, 8)

    def layer_by_layer(self, floats: set[int], x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        """Return the same as the net, with each layer computed alone: by torch if in ``floats``, else in integers."""
        own, directions = self.layer, 2 if self.layer.bidirectional else 1
        hidden, cell = [], []
        for layer in range(3):
            names = [f"{kind}_l{layer}{way}" for way in ("", "_reverse")[:directions] for kind in self.kinds()]
            held = [getattr(own, name) for name in names]
            states = [state[layer * directions : (layer + 1) * directions] for state in (h, c)]
            if layer in floats:
                x, *last = aten.lstm.input(x, states, held, own.bias, 1, 0.0, False, own.bidirectional, True)
            else:
                pairs = [row_integers(t.detach(), no_saturation=True) if t.ndim == 2 else (t,) for t in held]
                parameters = [part for pair in pairs for part in pair]
                x, *last = DYNAMIC_LSTM(x, states, parameters, own.bias, 1, own.bidirectional, True)
            hidden.append(last[0])
            cell.append(last[1])
        return [x, torch.cat(hidden), torch.cat(cell)]

    def kinds(self) -> list[str]:
        return ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.layer.bias else [])]


@pytest.mark.parametrize(
    ("floats", "bidirectional"), [({0}, False), ({1}, True), ({2}, False), ({0, 2}, True), ({1, 2}, False)], ids=str
)
def test_some_layers_of_a_stack_stay_floats(floats: set[int], bidirectional: bool) -> None:
    net = Stack(bidirectional, bias=floats != {1}).eval()
    names = tuple(f"*_l{layer}{way}" for layer in floats for way in ("", "_reverse"))
    why = [f"layer {layer}: its name is one to skip" for layer in sorted(floats)]
    pass_ = QuantizeDynamic(min_elements=64, skip=names)
    result = check_pass(pass_, net, *net.inputs(), dynamic_shapes=SHAPES, skips=why, changes=3 - len(floats))
    runs = calls(result.gm, DYNAMIC_LSTM, aten.lstm.input)
    alike = 0 if floats == {0, 2} or floats == {1} else 1
    assert len(runs) == 3 - alike, "neighbours that compute alike are one call"
    given = net.inputs()
    with torch.no_grad():
        for want, got in zip(net.layer_by_layer(floats, *given), result.gm(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_without_a_batch_too():
    net = nn.LSTM(6, 8, 2).eval()
    x = torch.randn(5, 6)
    result = check_pass(QuantizeDynamic(min_elements=64, skip=("*_l0",)), net, x, changes=1)
    y, (h, c) = result.gm(x)
    assert (y.shape, h.shape, c.shape) == ((5, 8), (2, 8), (2, 8))
    assert measure(net(x)[0], y).sqnr_db > 30


class Encoder(nn.Module):
    """Reads powers of a spectrum, a few far larger than the others, and yields the last state of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.LSTM(12, 16, 3, batch_first=True), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x)[1][0][-1])


def powers() -> tuple[Encoder, Tensor]:
    net, size = Encoder().eval(), torch.logspace(0, -5, 12)
    with torch.no_grad():
        net.steps.weight_ih_l0.mul_(8 / size)
    return net, torch.rand(8, 9, 12) * size


def test_the_layer_that_loses_too_much_is_undone_and_the_others_are_not():
    net, x = powers()
    pass_ = QuantizeDynamic(min_elements=64, min_sqnr_db=25.0)
    with pytest.raises(fxopt.ContractError, match=r"weights_only=\('NAME\*',\) computes an LSTM layer in floats"):
        fxopt.optimize(net, [pass_], (x,), strict=True)
    gm = fxopt.optimize(net, [pass_], (x,), dynamic_shapes={"x": {0: "batch"}})
    (step,) = gm.report.steps
    assert step.rolled_back[0].sites == ("lstm[0]",)
    (kept,) = calls(gm, aten.lstm.input)
    (integer,) = calls(gm, DYNAMIC_LSTM)
    assert integer in kept.users or any(integer in user.users for user in kept.users)
    assert measure(net(x), gm(x)).sqnr_db > 25
    small = 4 * 64 * 16 * 4 + 16 * 8 * 4  # bytes of the weights of the other layers
    assert f"weights of {small} bytes take" in step.notes[0]


@pytest.mark.ort
def test_a_mixed_stack_computes_the_same_in_ort():
    net, x = powers()
    gm = fxopt.optimize(net, [QuantizeDynamic(min_elements=64, skip=("*_l0",))], (x,), dynamic_shapes={"x": {0: "n"}})
    file = to_onnx(gm)
    assert coverage(file).kernels["recurrent"] == (2, 3)
    (got,) = Session(file.to_bytes()).run([x[:1]])
    assert measure(gm(x[:1]), got).sqnr_db > 45


# -- weights alone -----------------------------------------------------------------------------------------------------


def rounded(layer: nn.Module) -> nn.Module:
    """Let a layer hold what its weights are in 8 bits."""
    with torch.no_grad():
        for weight in (parameter for parameter in layer.parameters() if parameter.ndim == 2):
            integers, scale = row_integers(weight, no_saturation=False)
            weight.copy_(integers * scale[:, None])
    return layer


def test_an_lstm_of_stored_weights_is_one_of_rounded_weights():
    net, given = Stack(), Stack().inputs()
    pass_ = QuantizeDynamic(min_elements=64, weights_only=("layer.*",))
    result = check_pass(pass_, net, *given, dynamic_shapes=SHAPES, skips=[], changes=3)
    assert len(calls(result.gm, DEQUANTIZE)) == 6
    assert not calls(result.gm, DYNAMIC_LSTM)
    assert result.notes[1] == "3 recurrent layers still compute in floats: smaller in a file, not faster"
    rounded(net.layer)
    for want, got in zip(net(*given), result.gm(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_layers_are_named_one_by_one():
    net, x = powers()
    gm = fxopt.optimize(net, [QuantizeDynamic(min_elements=64, weights_only=("steps.*_l0",))], (x,), strict=True)
    assert len(calls(gm, DEQUANTIZE)) == 2
    assert [node.args[4] for node in calls(gm, DYNAMIC_LSTM, aten.lstm.input)] == [1, 2]
    assert not any("weight" in name for name, _ in gm.named_parameters())


def test_a_layer_that_is_called_twice_stores_its_weights_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)[0])[0]

    pass_ = QuantizeDynamic(min_elements=64, weights_only=("*_l0",))
    result = check_pass(pass_, Twice().eval(), torch.randn(5, 2, 8), skips=[])
    assert len(calls(result.gm, DEQUANTIZE)) == 2
    assert len(calls(result.gm, DYNAMIC_LSTM)) == len(calls(result.gm, aten.lstm.input)) == 2


class Cell(nn.Module):
    """One step of a recurrent layer, and a head."""

    def __init__(self, kind: type[nn.RNNCellBase], **options: str) -> None:
        super().__init__()
        self.cell, self.head = kind(32, 32, **options), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x)
        return self.head(state[0] if isinstance(state, tuple) else state)


CELLS = {
    "lstm": (nn.LSTMCell, {}), "gru": (nn.GRUCell, {}), "tanh": (nn.RNNCell, {}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_stores_its_weights(name: str) -> None:
    kind, options = CELLS[name]
    net, x = Cell(kind, **options).eval(), torch.randn(3, 32)
    pass_ = QuantizeDynamic(min_elements=1024, kinds=("lstm", "gru", "rnn"))
    result = check_pass(pass_, net, x, dynamic_shapes={"x": {0: "batch"}}, skips=[], changes=1)
    assert len(calls(result.gm, DEQUANTIZE)) == 2
    rounded(net.cell)
    torch.testing.assert_close(result.gm(x), net(x), rtol=0, atol=1e-6)
    large = QuantizeDynamic(kinds=pass_.kinds, min_elements=10_000)
    rows = {"lstm": 128, "gru": 96}.get(name, 32)
    check_pass(large, net, x, changes=0, skips=[f"its weights have {64 * rows} elements, fewer than 10000"])


@pytest.mark.ort
@pytest.mark.parametrize("name", CELLS)
def test_the_weights_of_a_cell_are_bytes_in_a_file(name: str) -> None:
    kind, options = CELLS[name]
    net, x = Cell(kind, **options).eval(), torch.randn(3, 32)
    file = to_onnx(fxopt.optimize(net, [QuantizeDynamic(min_elements=1024)], (x,), strict=True))
    assert file.validation is not None
    floats = len(to_onnx(fxopt.capture(net, (x,))).to_bytes())
    weights = sum(parameter.numel() for parameter in net.cell.parameters() if parameter.ndim == 2)
    assert len(file.to_bytes()) < floats - 2 * weights


# -- static quantization -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A convolution, two recurrent layers and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(16, 16, 3)
        self.steps, self.last = nn.LSTM(16, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.last(self.steps(self.front(x).relu().transpose(1, 2))[0])[0][:, -1])


def test_static_quantization_says_that_recurrent_layers_stay_floats_and_what_takes_them():
    x = torch.randn(4, 16, 12)
    passes = [Quantize(), QuantizeDynamic(min_elements=64, kinds=("lstm", "gru", "rnn"))]
    gm = fxopt.optimize(Mixed().eval(), passes, (x,), calibration=[x], strict=True)
    skips = {skip.node: skip.why for skip in gm.report.steps[0].skips if "recurrent" in skip.why}
    assert sorted(skips) == ["gru", "gru_cell", "lstm"]
    assert set(skips.values()) == {
        "recurrent layers stay floats in a static plan; quantize-dynamic behind it makes their weights integers"
    }
    assert not any("weight" in name for name, _ in gm.named_parameters())


def test_convolutions_are_left_and_the_report_says_why():
    x = torch.randn(4, 16, 12)
    why = "no integer convolution finds its ranges when it runs; quantize has one, and calibrates"
    transposed = nn.Sequential(nn.Conv1d(16, 8, 3), nn.ConvTranspose1d(8, 16, 3))
    check_pass(SMALL, transposed, x, changes=0, skips=[why, "transposed convolutions have no integer kernel"])
    check_pass(QuantizeDynamic(kinds=("lstm",)), transposed, x, changes=0, skips=[])
