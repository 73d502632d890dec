"""LSTM, GRU and simple recurrent layers, one ONNX node for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.export.emitter import Emitter, Value, dims, rank, tensor_of
from fxopt.export.registry import Refused, translates
from fxopt.export.sizes import product

__all__ = ["gathered", "layer_slice"]

aten = torch.ops.aten

# The order in which ONNX wants the gates, as places in PyTorch's order (LSTM: input, forget, cell, output;
# GRU: reset, update, new).
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


@translates(aten.lstm.input)
def lstm(
    emit: Emitter,
    x: Value,
    states: Sequence[Value],
    parameters: Sequence[Value],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    return _stacked(
        emit, "LSTM", x, states, parameters, has_biases, layers, dropout if train else 0, bidirectional, batch_first
    )


@translates(aten.gru.input)
def gru(
    emit: Emitter,
    x: Value,
    state: Value,
    parameters: Sequence[Value],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    return _stacked(
        emit, "GRU", x, [state], parameters, has_biases, layers, dropout if train else 0, bidirectional, batch_first
    )


@translates(aten.rnn_tanh.input, aten.rnn_relu.input)
def rnn(
    emit: Emitter,
    x: Value,
    state: Value,
    parameters: Sequence[Value],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    return _stacked(
        emit, "RNN", x, [state], parameters, has_biases, layers, dropout if train else 0, bidirectional, batch_first
    )


def _stacked(
    emit: Emitter,
    kind: str,
    x: Value,
    states: Sequence[Value],
    parameters: Sequence[Value],
    has_biases: bool,
    layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    """Return the output sequence and the last state (for an LSTM: both)."""
    if dropout > 0:
        raise Refused("dropout between the layers is active: the graph is in train mode")
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    if len(parameters) != layers * directions * each:
        raise Refused("a recurrent layer with projections (proj_size), which ONNX cannot express")
    lonely = rank(x) == 2
    if lonely:
        x = emit(
            "Unsqueeze",
            x,
            [0 if batch_first else 1],
            dims=(1, *dims(x)) if batch_first else (dims(x)[0], 1, dims(x)[1]),
        )
        states = [emit("Unsqueeze", state, [1], dims=(dims(state)[0], 1, dims(state)[1])) for state in states]
    sequence = emit.transpose(x, [1, 0, 2]) if batch_first else x
    finals: list[list[Value]] = [[] for _ in states]
    for layer in range(layers):
        own = parameters[layer * directions * each : (layer + 1) * directions * each]
        initial = [layer_slice(emit, state, layer, layers, directions) for state in states]
        sequence, *last = _layer(
            emit, kind, sequence, initial, [own[d * each : (d + 1) * each] for d in range(directions)]
        )
        for held, state in zip(finals, last, strict=True):
            held.append(state)
    results = [emit.transpose(sequence, [1, 0, 2]) if batch_first else sequence]
    results += [held[0] if layers == 1 else emit("Concat", *held, axis=0) for held in finals]
    if lonely:
        results = [
            emit("Squeeze", results[0], [0 if batch_first else 1]),
            *[emit("Squeeze", state, [1]) for state in results[1:]],
        ]
    return tuple(results)


def layer_slice(emit: Emitter, state: Value, layer: int, layers: int, directions: int) -> Value:
    if layers == 1:
        return state
    return emit("Slice", state, [layer * directions], [(layer + 1) * directions], [0])


def _layer(
    emit: Emitter, kind: str, sequence: Value, initial: Sequence[Value], weights: Sequence[Sequence[Value]]
) -> tuple[Value, ...]:
    """Return the output sequence and the last states of one layer, ``weights`` being those of each direction."""
    assert emit.node is not None
    directions, hidden = len(weights), dims(weights[0][1])[1]
    length, batch, _ = dims(sequence)
    inner = gathered(emit, kind, [direction[:1] for direction in weights])
    recurrent = gathered(emit, kind, [direction[1:2] for direction in weights])
    biases = gathered(emit, kind, [direction[2:] for direction in weights]) if len(weights[0]) > 2 else None
    activation = None
    if kind == "RNN":
        activation = ["Tanh" if emit.node.target is aten.rnn_tanh.input else "Relu"] * directions
    outputs = emit.many(
        kind,
        sequence,
        inner,
        recurrent,
        biases,
        None,
        *initial,
        outputs=1 + len(initial),
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        linear_before_reset=1 if kind == "GRU" else None,
        activations=activation,
    )
    shape = (length, batch, product([directions, hidden]))
    if directions == 1:
        return emit("Squeeze", outputs[0], [1], dims=shape), *outputs[1:]
    emit.set_dims(outputs[0], (length, directions, batch, hidden))
    return emit.reshape(emit.transpose(outputs[0], [0, 2, 1, 3]), shape), *outputs[1:]


def gathered(emit: Emitter, kind: str, parts: Sequence[Sequence[Value]]) -> Value:
    """Return the weights of all directions with ONNX's order of gates: ``[direction, gates * hidden, ...]``.

    Constants are rearranged here and stored under the name of the first; computed ones (masked or dequantized weights)
    are rearranged by nodes.
    """
    gates = _GATES[kind]
    held = [[tensor_of(part) for part in direction] for direction in parts]
    if all(tensor is not None for direction in held for tensor in direction):
        key = ("recurrent", kind, *[id(part) for direction in parts for part in direction])
        rows = [torch.cat([_ordered(t, gates) for t in direction if t is not None]) for direction in held]
        note = {"fxopt.stored": f"directions stacked, gates in ONNX order {gates}"}
        return emit.once(key, lambda: emit.initializer(parts[0][0].name or "weight", torch.stack(rows), note))
    stacked = []
    for direction in parts:
        pieces = []
        for part in direction:
            split = (
                emit.many("Split", part, outputs=len(gates), axis=0, num_outputs=len(gates))
                if len(gates) > 1
                else (part,)
            )
            pieces += [split[gate] for gate in gates]
        stacked.append(emit("Unsqueeze", emit("Concat", *pieces, axis=0), [0]))
    return stacked[0] if len(stacked) == 1 else emit("Concat", *stacked, axis=0)


def _ordered(tensor: torch.Tensor, gates: Sequence[int]) -> torch.Tensor:
    pieces = tensor.chunk(len(gates))
    return torch.cat([pieces[gate] for gate in gates])
