"""Layers whose activations are quantized when they run, as the kernels that ORT has for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.dynamic_ops import DYNAMIC_LINEAR, DYNAMIC_LSTM
from fxopt.export.emitter import Emitter, Value, dims, rank, tensor_of
from fxopt.export.registry import Refused, translates
from fxopt.export.sizes import product
from fxopt.export.translations.recurrent import gathered, layer_slice

_MICROSOFT = "com.microsoft"


@translates(DYNAMIC_LINEAR)
def dynamic_linear(emit: Emitter, x: Value, weight: Value, scale: Value, bias: Value | None) -> Value:
    columns = emit.transpose(weight, [1, 0])
    outputs = dims(weight)[0]
    return emit(
        "DynamicQuantizeMatMul", x, columns, scale, None, bias, domain=_MICROSOFT, dims=(*dims(x)[:-1], outputs)
    )


@translates(DYNAMIC_LSTM)
def dynamic_lstm(
    emit: Emitter,
    x: Value,
    states: Sequence[Value],
    parameters: Sequence[Value],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    """One node for each layer: output sequence and last states."""
    directions, each = 2 if bidirectional else 1, 6 if has_biases else 4
    if any(tensor_of(parameter) is None for parameter in parameters):
        raise Refused("weights or biases of an integer LSTM are computed when the graph runs")
    lonely = rank(x) == 2
    if lonely:
        length, features = dims(x)
        place, shape = (0, (1, length, features)) if batch_first else (1, (length, 1, features))
        x = emit("Unsqueeze", x, [place], dims=shape)
        states = [emit("Unsqueeze", state, [1], dims=(dims(state)[0], 1, dims(state)[1])) for state in states]
    sequence = emit.transpose(x, [1, 0, 2]) if batch_first else x
    finals: list[list[Value]] = [[] for _ in states]
    for layer in range(layers):
        first = layer * directions * each
        own = [parameters[first + d * each : first + (d + 1) * each] for d in range(directions)]
        initial = [layer_slice(emit, state, layer, layers, directions) for state in states]
        sequence, *last = _layer(emit, sequence, initial, own)
        for held, state in zip(finals, last, strict=True):
            held.append(state)
    results = [emit.transpose(sequence, [1, 0, 2]) if batch_first else sequence]
    results += [held[0] if layers == 1 else emit("Concat", *held, axis=0) for held in finals]
    if lonely:
        places = [0 if batch_first else 1, 1, 1]
        results = [emit("Squeeze", result, [place]) for result, place in zip(results, places, strict=True)]
    return tuple(results)


def _layer(
    emit: Emitter, sequence: Value, initial: Sequence[Value], parameters: Sequence[Sequence[Value]]
) -> tuple[Value, ...]:
    """Return the output sequence and the last states of one layer, ``parameters`` being those of each direction."""
    directions, hidden = len(parameters), dims(parameters[0][2])[1]
    length, batch, _ = dims(sequence)
    weight, scale, recurrent, recurrent_scale = (
        gathered(emit, "LSTM", [own[place : place + 1] for own in parameters]) for place in range(4)
    )
    biases = gathered(emit, "LSTM", [own[4:] for own in parameters]) if len(parameters[0]) > 4 else None
    zeros = emit.constant(torch.zeros(tuple(dims(scale)), dtype=torch.int8))
    outputs = emit.many(
        "DynamicQuantizeLSTM", sequence, emit.transpose(weight, [0, 2, 1]), emit.transpose(recurrent, [0, 2, 1]),
        biases, None, *initial, None, scale, zeros, recurrent_scale, zeros,
        outputs=3, domain=_MICROSOFT,
        hidden_size=hidden, direction="bidirectional" if directions == 2 else "forward",
    )  # fmt: skip
    shape = (length, batch, product([directions, hidden]))
    if directions == 1:
        return emit("Squeeze", outputs[0], [1], dims=shape), *outputs[1:]
    emit.set_dims(outputs[0], (length, directions, batch, hidden))
    return emit.reshape(emit.transpose(outputs[0], [0, 2, 1, 3]), shape), *outputs[1:]
