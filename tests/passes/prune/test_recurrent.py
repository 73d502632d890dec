"""LSTM, GRU and RNN: input features and hidden units that go, and what stays with its reason."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes.prune.groups import Family, Group
from tests.passes.prune.nets import captured, net, shrink, shrunk

N = ({0: "batch", 1: "length<=9"},)
X = torch.randn(3, 4, 5)
KINDS: dict[str, Any] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": functools.partial(nn.RNN, nonlinearity="relu"),
}


def around(layer: nn.RNNBase, features: int = 8) -> nn.Module:
    """A recurrent layer of 6 units between two linear ones, all of its outputs and states read."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        out, states = self.inner(self.first(x))
        states = states if isinstance(states, tuple) else (states,)
        return self.last(out), *[self.of_state(state) for state in states]

    wide = 12 if layer.bidirectional else 6
    return net(forward, first=nn.Linear(5, features), inner=layer, last=nn.Linear(wide, 4), of_state=nn.Linear(6, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"bias": False}, {"bidirectional": True}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)  # fmt: skip
def test_features_and_units_go(kind: str, options: dict[str, Any]) -> None:
    layer = KINDS[kind](8, 6, batch_first=True, **options)
    rows = layer.weight_ih_l0.shape[0]
    onnx = options == {"num_layers": 2, "bidirectional": True} and kind in ("lstm", "gru")
    found = shrunk(around(layer), X, dynamic=N, onnx=onnx)
    assert found.shape("inner.weight_ih_l0") == (rows // 2, 4)
    assert found.shape("inner.weight_hh_l0") == (rows // 2, 3)
    if "num_layers" in options:
        wide = 2 if "bidirectional" in options else 1
        assert found.shape("inner.weight_ih_l1") == (rows // 2, 3 * wide)


def test_steps_first() -> None:
    found = shrunk(around(nn.LSTM(8, 6)), X, dynamic=({0: "length<=9", 1: "batch"},))
    assert found.shape("inner.weight_hh_l0") == (12, 3)


def test_features_alone_go() -> None:
    def choose(families: Sequence[Family]) -> list[Group]:
        return list(next(family for family in families if family.name == "first.weight").groups[::2])

    found = shrunk(around(nn.GRU(8, 6, batch_first=True)), X, dynamic=N, choose=choose)
    assert found.shape("inner.weight_ih_l0") == (18, 4)


def test_initial_state_of_zeros_that_the_model_makes_is_cut() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        zeros = x.new_zeros(1, x.shape[0], 6)
        return self.last(self.inner(self.first(x), (zeros, zeros))[0])

    parts = {"first": nn.Linear(5, 8), "inner": nn.LSTM(8, 6, batch_first=True), "last": nn.Linear(6, 4)}
    found = shrunk(net(forward, **parts), X, dynamic=N)
    assert found.shape("inner.weight_hh_l0") == (12, 3)


def test_last_state_of_the_sequence_is_read() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x))[0][:, -1])

    parts = {"first": nn.Linear(5, 8), "inner": nn.GRU(8, 6, batch_first=True), "last": nn.Linear(6, 4)}
    assert shrunk(net(forward, **parts), X, dynamic=N).shape("last.weight") == (4, 3)


def with_state(layer: nn.RNNBase, states: Tensor) -> nn.Module:
    """A recurrent layer that starts with a learned state, f32[layers, 1, units], in place of the usual zeros."""

    def forward(self: Any, x: Tensor) -> Tensor:
        state = self.state.expand(-1, x.shape[0], -1).contiguous()
        return self.last(self.inner(self.first(x), (state, state) if layer.mode == "LSTM" else state)[0])

    return net(forward, first=nn.Linear(5, 8), inner=layer, last=nn.Linear(6, 4), state=states)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_learned_initial_state_is_cut_with_its_units(kind: str) -> None:
    found = shrunk(with_state(KINDS[kind](8, 6, batch_first=True), torch.randn(1, 1, 6)), X, dynamic=N)
    assert found.shape("state") == (1, 1, 3)


def zeroed(gm: fxopt.CapturedModule, rows: Sequence[int], *names: str, gates: int) -> fxopt.CapturedModule:
    """Set the rows of units to 0, in all gates."""
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.startswith(names):
                parameter.view(gates, -1, *parameter.shape[1:])[:, rows] = 0
    return gm


def unread(gm: fxopt.CapturedModule, unit: int) -> fxopt.CapturedModule:
    """Let nothing behind the recurrent layer of 6 units read one of them."""
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name in ("last.weight", "of_state.weight"):
                parameter[:, unit::6] = 0
    return gm


RESTS = "its initial state, or a row of the gate that makes its value, is not 0"


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_unit_whose_learned_initial_state_is_not_zero_stays(kind: str) -> None:
    model = with_state(KINDS[kind](8, 6, batch_first=True), torch.randn(1, 1, 6))
    gates = model.inner.weight_ih_l0.shape[0] // 6
    found = shrink(unread(zeroed(captured(model, X, dynamic=N), [2], "inner", gates=gates), 2), X)
    assert found.shape("inner.weight_hh_l0") == (6 * gates, 6)
    assert any(RESTS in why for why in found.reasons("inner.weight_hh_l0", 1))


def test_unit_whose_initial_state_is_an_input_stays() -> None:
    def forward(self: Any, x: Tensor, state: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x), state)[0])

    parts = {"first": nn.Linear(5, 8), "inner": nn.GRU(8, 6, batch_first=True), "last": nn.Linear(6, 4)}
    state = torch.randn(1, 3, 6)
    gm = captured(net(forward, **parts), X, state, dynamic=({0: "batch"}, {1: "batch"}))
    found = shrink(zeroed(gm, [2], "inner", gates=3), X, state)
    assert found.shape("inner.weight_hh_l0") == (18, 6)
    assert "it is an input of the model" in found.reasons("inner.weight_hh_l0", 1)


@pytest.mark.parametrize(("kind", "gate"), [("lstm", 2), ("gru", 2), ("rnn", 0)])
def test_unit_goes_if_the_gate_of_its_value_is_zero_alone(kind: str, gate: int) -> None:
    model = around(KINDS[kind](8, 6, batch_first=True))
    gm = captured(model, X, dynamic=N)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.startswith("inner"):
                parameter.view(-1, 6, *parameter.shape[1:])[gate, 3] = 0
    assert shrink(gm, X).shape("inner.weight_hh_l0")[1] == 5


@pytest.mark.parametrize(("kind", "gate"), [("lstm", 0), ("lstm", 1), ("lstm", 3), ("gru", 0), ("gru", 1)])
def test_unit_stays_if_another_gate_is_zero(kind: str, gate: int) -> None:
    gm = captured(around(KINDS[kind](8, 6, batch_first=True)), X, dynamic=N)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.startswith("inner"):
                parameter.view(-1, 6, *parameter.shape[1:])[gate, 3] = 0
    found = shrink(unread(gm, 3), X)
    assert found.shape("inner.weight_hh_l0")[1] == 6
    assert any(RESTS in why for why in found.reasons("inner.weight_hh_l0", 1))


@pytest.mark.parametrize("name", ["inner.bias_ih_l0", "inner.bias_hh_l1_reverse", "inner.weight_ih_l1"])
def test_unit_that_is_not_zero_in_one_layer_or_direction_stays(name: str) -> None:
    gm = captured(around(nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)), X, dynamic=N)
    with torch.no_grad():
        before = gm.get_parameter(name).clone()
        zeroed(gm, [1], "inner", gates=4)
        gm.get_parameter(name).copy_(before)
    found = shrink(unread(gm, 1), X)
    assert found.shape("inner.weight_hh_l0") == (24, 6)
    assert any(RESTS in why for why in found.reasons("inner.weight_hh_l0", 1))


def test_unit_that_nothing_reads_goes_though_it_is_not_zero() -> None:
    gm = captured(around(nn.LSTM(8, 6, num_layers=2, batch_first=True)), X, dynamic=N)
    with torch.no_grad():
        for name in (
            "inner.weight_hh_l0",
            "inner.weight_hh_l1",
            "inner.weight_ih_l1",
            "last.weight",
            "of_state.weight",
        ):
            gm.get_parameter(name)[:, 4] = 0
    found = shrink(gm, X)
    assert found.shape("inner.weight_hh_l0") == (20, 5)
    assert found.shape("of_state.weight") == (2, 5)


@pytest.mark.parametrize("name", ["inner.weight_hh_l0", "inner.weight_hh_l1", "inner.weight_ih_l1", "last.weight"])
def test_unit_that_one_weight_reads_stays(name: str) -> None:
    gm = captured(around(nn.LSTM(8, 6, num_layers=2, batch_first=True)), X, dynamic=N)
    reads = {"inner.weight_hh_l0", "inner.weight_hh_l1", "inner.weight_ih_l1", "last.weight", "of_state.weight"}
    with torch.no_grad():
        for other in reads - {name}:
            gm.get_parameter(other)[:, 4] = 0
    assert shrink(gm, X).shape("inner.weight_hh_l0") == (24, 6)


def test_feature_that_is_not_zero_and_read_stays() -> None:
    gm = captured(around(nn.GRU(8, 6, bidirectional=True, batch_first=True)), X, dynamic=N)
    with torch.no_grad():
        gm.get_parameter("inner.weight_ih_l0")[:, 2] = 0  # the other direction reads it
    found = shrink(gm, X)
    assert found.shape("first.weight") == (8, 5)
    gm.get_parameter("inner.weight_ih_l0_reverse").data[:, 2] = 0
    assert shrink(gm, X).shape("first.weight") == (7, 5)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projected_units_stay() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x))[0])

    parts = {"first": nn.Linear(5, 8), "inner": nn.LSTM(8, 6, proj_size=4, batch_first=True), "last": nn.Linear(4, 3)}
    gm = zeroed(captured(net(forward, **parts), X, dynamic=N), [1], "inner.weight_hh", "inner.weight_ih", gates=4)
    found = shrink(gm, X)
    assert found.shape("inner.weight_hh_l0") == (24, 4)
    assert found.reasons("inner.weight_hh_l0") == {"its hidden units are projected"}


def test_the_only_unit_stays() -> None:
    parts = {"first": nn.Linear(5, 8), "inner": nn.GRU(8, 1, batch_first=True), "last": nn.Linear(1, 3)}
    gm = captured(net(lambda self, x: self.last(self.inner(self.first(x))[0]), **parts), X, dynamic=N)
    with torch.no_grad():
        gm.get_parameter("inner.weight_ih_l0")[:, 2] = 0
    found = shrink(gm, X)
    assert found.shape("inner.weight_ih_l0") == (3, 8)
    assert found.reasons("inner.weight_ih_l0", 1) == {"it has one hidden unit"}
