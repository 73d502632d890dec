"""Recurrent layers with integer weights: which, which not and why, and what a trained one keeps."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.dynamic_ops import DYNAMIC_LSTM
from fxopt.export import Session, coverage, to_onnx
from fxopt.numerics import measure
from fxopt.pair_sums import can_overflow
from fxopt.passes import QuantizeDynamic
from fxopt.passes.quantize.recurrent_weights import row_integers
from fxopt.quantized_ops import DEQUANTIZE
from fxopt.testing import check_pass
from tests.models import LstmNet

SMALL = QuantizeDynamic(min_elements=64)
aten = torch.ops.aten


def targets(gm: fxopt.CapturedModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def decibels(want: Tensor, got: Tensor) -> float:
    return measure(want, got).sqnr_db


@pytest.mark.parametrize("no_saturation", [False, True])
def test_weights_are_the_nearest_integers_of_their_scales(no_saturation: bool) -> None:
    weight = torch.randn(16, 40)
    integers, scale = row_integers(weight, no_saturation=no_saturation)
    assert integers.dtype is torch.int8
    assert int(integers.min()) >= -127
    steps = np.rint(weight.numpy() / scale.numpy()[:, None]).clip(-127, 127)
    assert (integers.numpy() == steps).all()
    assert bool(can_overflow(integers).any()) is not no_saturation
    if not no_saturation:
        assert integers.abs().amax(1).tolist() == [127] * 16


class Recurrent(nn.Module):
    """A recurrent layer, its sequence, and its last states."""

    def __init__(self, kind: type[nn.RNNBase], *sizes: int, calls: int = 1, **options: object) -> None:
        super().__init__()
        self.layer, self.calls = kind(*sizes, **options), calls

    def forward(self, x: Tensor) -> object:
        results = [self.layer(x * factor) for factor in range(1, 1 + self.calls)]
        return [(y, *state) if isinstance(state, tuple) else (y, state) for y, state in results]


def test_lstm_text():
    check_pass(
        SMALL,
        nn.LSTM(5, 4, bias=False, batch_first=True),
        torch.randn(2, 3, 5),
        changes=1,
        text="""
            %input : f32[2, 3, 5]
            %0 : f32[1, 2, 4] = aten.zeros([1, 2, 4], dtype=float32, device=cpu, pin_memory=False)
            %1 : f32[1, 2, 4] = aten.zeros([1, 2, 4], dtype=float32, device=cpu, pin_memory=False)
            %weight_ih_l0_integers = attribute i8[16, 5]
            %weight_ih_l0_scale = attribute f32[16]
            %weight_hh_l0_integers = attribute i8[16, 4]
            %weight_hh_l0_scale = attribute f32[16]
            %2 : (f32[2, 3, 4], f32[1, 2, 4], f32[1, 2, 4]) = fxopt.dynamic_lstm(%input, [%0, %1], [%weight_ih_l0_integers, %weight_ih_l0_scale, %weight_hh_l0_integers, %weight_hh_l0_scale], False, 1, False, True)
            %3 : f32[2, 3, 4] = getitem(%2, 0)
            %4 : f32[1, 2, 4] = getitem(%2, 1)
            %5 : f32[1, 2, 4] = getitem(%2, 2)
            return %3, %4, %5
        """,  # noqa: E501  (one line of the graph is one line)
    )


@pytest.mark.parametrize(("layers", "bidirectional"), list(itertools.product((1, 2), (False, True))))
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_most_of_the_signal(kind: type[nn.RNNBase], layers: int, bidirectional: bool) -> None:
    net = Recurrent(kind, 8, 12, layers, bidirectional=bidirectional, batch_first=True).eval()
    x = torch.randn(3, 9, 8)
    sites = layers if kind is nn.LSTM else 1
    result = check_pass(SMALL, net, x, dynamic_shapes={"x": {0: "batch", 1: "length"}}, changes=sites, skips=[])
    assert (DYNAMIC_LSTM in targets(result.gm)) is (kind is nn.LSTM)
    matrices = 2 * layers * (1 + bidirectional)
    assert targets(result.gm).count(DEQUANTIZE) == (0 if kind is nn.LSTM else matrices)
    assert all("bias" in name for name, _ in result.gm.named_parameters())
    for want, got in zip(net(x)[0], result.gm(x)[0], strict=True):
        assert decibels(want, got) > 30


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_layer_that_is_called_twice_is_stored_once(kind: type[nn.RNNBase]) -> None:
    net = Recurrent(kind, 8, 12, calls=2).eval()
    result = check_pass(SMALL, net, torch.randn(3, 9, 8), skips=[])
    # GRU: zero points, too.
    assert [t.dtype for t in result.gm.buffers()].count(torch.int8) == (2 if kind is nn.LSTM else 4)
    assert targets(result.gm).count(DYNAMIC_LSTM if kind is nn.LSTM else aten.gru.input) == 2


def test_notes_say_what_is_saved_and_what_is_not():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LSTM(8, 12, batch_first=True), nn.GRU(12, 12, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[0])[0]

    gm = fxopt.optimize(Both().eval(), [SMALL], (torch.randn(3, 9, 8),), strict=True)
    before = 4 * (48 * (8 + 12) + 36 * (12 + 12))
    after = before // 4 + 4 * 2 * (48 + 36) + 2 * 36
    assert gm.report.steps[0].notes == (
        f"weights of {before} bytes take {after} bytes in 8 bits",
        "1 recurrent layers still compute in floats: smaller in a file, not faster",
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_leaves_recurrent_layers_alone_and_says_why():
    x = torch.randn(3, 9, 8)
    lstm = Recurrent(nn.LSTM, 8, 12)
    check_pass(QuantizeDynamic(), lstm, x, skips=["its weights have 960 elements, fewer than 4096"])
    check_pass(QuantizeDynamic(min_elements=1, skip=("layer.weight_hh*",)), lstm, x, skips=["its name is one to skip"])
    check_pass(SMALL, Recurrent(nn.LSTM, 8, 12).double(), x.double(), skips=["its input is torch.float64"])
    check_pass(SMALL, Recurrent(nn.GRU, 8, 12).double(), x.double(), skips=["its weight is torch.float64"])
    projected = Recurrent(nn.LSTM, 8, 12, proj_size=4)
    check_pass(SMALL, projected, x, skips=["it has projections (proj_size), which the integer kernel lacks"])
    check_pass(QuantizeDynamic(min_elements=1, kinds=("linear", "gru")), lstm, x, changes=0, skips=[])


def test_leaves_alone_an_lstm_whose_weight_is_read_by_others():
    class Decayed(Recurrent):
        def forward(self, x: Tensor) -> object:
            return self.layer(x)[0], self.layer.weight_hh_l0.square().sum()

    why = "its weight is also read by square (aten.square.default)"
    check_pass(SMALL, Decayed(nn.LSTM, 8, 12), torch.randn(3, 9, 8), changes=0, skips=[why])


def test_dropout_between_layers_is_left_out_in_evaluation_and_kept_where_it_is_always_on():
    net = LstmNet().eval()  # dropout of 0.2
    example = net.example()
    gm = fxopt.capture(net, fxopt.Sample(example.args, example.kwargs), dynamic_shapes=example.dynamic_shapes)
    assert check_pass(SMALL, gm, changes=2).modified

    class AlwaysOn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(5, 6, 2, dropout=0.5)

        def forward(self, x: Tensor) -> Tensor:
            zeros = torch.zeros(2, x.shape[1], 6)
            return torch._VF.lstm(x, (zeros, zeros), self.layer._flat_weights, True, 2, 0.5, True, False, False)[0]

    result = SMALL(fxopt.capture(AlwaysOn().eval(), (torch.randn(7, 2, 5),), verify=False))
    assert [skip.why for skip in result.skips] == ["dropout between its layers is active in evaluation"]


class Classifier(nn.Module):
    """Tells the frequency of a noisy wave."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.LSTM(2, 32, batch_first=True, bidirectional=True), nn.Linear(64, 4)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(self.steps(wave)[0].mean(1))


def waves(count: int) -> tuple[Tensor, Tensor]:
    """Return f32[count, 24, 2] and the class of each."""
    label = torch.randint(0, 4, (count,))
    angle = torch.arange(24) * (0.3 + 0.15 * label[:, None]) + 6.3 * torch.rand(count, 1)
    wave = torch.stack([angle.sin(), angle.cos()], -1)
    return wave + 0.7 * torch.randn(wave.shape), label


@pytest.mark.ort
def test_a_trained_lstm_keeps_its_accuracy_in_ort():
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(80):
        wave, label = waves(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(wave), label).backward()
        optimizer.step()
    wave, label = waves(1000)
    shapes = {"wave": {0: "batch", 1: "length"}}
    gm = fxopt.optimize(net.eval(), [SMALL], (wave[:16],), dynamic_shapes=shapes, strict=True)
    file = to_onnx(gm)
    assert coverage(file).integer_share == 1
    scores = [
        float((logits.argmax(1) == label).double().mean())
        for logits in (net(wave), gm(wave), Session(file.to_bytes()).run([wave])[0])
    ]
    assert scores[0] > 0.9, "the float net has learned nothing to lose"
    assert min(scores) > scores[0] - 0.01
    assert decibels(net(wave), gm(wave)) > 25
