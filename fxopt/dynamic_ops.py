"""fxopt's operators of integer layers that find the range of their activations when they run, without calibration.

``fxopt::dynamic_linear(x, weight, scale, bias)``
    ``linear(x, weight * scale, bias)`` with ``x`` rounded to 8 bits: ``weight`` i8[out, in], ``scale`` f32[out].
``fxopt::dynamic_lstm(x, states, parameters, has_biases, layers, bidirectional, batch_first)``
    A stack of LSTM layers as ``aten::lstm`` has it, evaluated without dropout and without projections. ``parameters``
    holds for each layer and direction the input weight i8[4 hidden, in], its scale f32[4 hidden], the recurrent weight
    i8[4 hidden, hidden], its scale, and, if ``has_biases``, both biases f32[4 hidden].

Activations become u8 with one scale for the whole tensor, as ONNX's DynamicQuantizeLinear-11 defines it: the range
holds 0, is cut into 255 steps, and halves are rounded to even. Sums are exact, then multiplied by both scales in
float32, which is bit for bit what ONNX Runtime 1.32 does on a CPU in DynamicQuantizeMatMul. Rows that are in one batch
share a range: what else is in the batch changes a result by as much as rounding does.

An LSTM quantizes its whole input at once, and the hidden states of a batch at each step. ORT's DynamicQuantizeLSTM does
so too for a batch of 1, or on one thread; with more threads it cuts a batch into parts, one a thread, whose hidden
states have ranges of their own (unless the hidden size is above 256 and the batch below 5). Its sigmoid and tanh differ
from torch's in the last digit, and with it, now and then, a hidden state is rounded to the other side.

Gradients are those of the layer of floats that the integers stand for, and go to input, states and biases. NaN and
infinities, and ranges too wide for float32, give NaN; ORT leaves NaN out of the range and yields numbers.

Sources: ONNX operator specification, DynamicQuantizeLinear-11, LSTM-14;
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["DYNAMIC_LINEAR", "DYNAMIC_LSTM", "dynamic_range"]

Tensor = torch.Tensor
_LEVELS = 255

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define("dynamic_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor")
_LIBRARY.define(
    "dynamic_lstm(Tensor x, Tensor[] states, Tensor[] parameters, bool has_biases, int layers, bool bidirectional, "
    "bool batch_first) -> (Tensor, Tensor, Tensor)"
)


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a tensor as u8, both of its type and without axes.

    Args:
        x: Floats of any shape; without elements, its range is that of zeros.

    Returns:
        scale: Of one step: the range, widened to hold 0, cut into 255; 1 for zeros alone.
        zero_point: The integer in [0, 255] that stands for 0. NaN, as the scale is, if ``x`` holds NaN.
    """
    low, high = (x.amin(), x.amax()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / _LEVELS
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, torch.round((-low / scale).clamp(0, _LEVELS))


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x`` in integers times i8[out, in] transposed, in floats, [..., out]."""
    step, zero_point = dynamic_range(x)
    integers = torch.round(x / step).add(zero_point).clamp(0, _LEVELS) - zero_point
    # Exact in any order: float64 holds every integer below 2**53.
    sums = F.linear(integers.double(), weight.double())
    return sums.to(x.dtype) * (step * scale.to(x.dtype))


def _floats(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight that integers with a scale a row stand for."""
    return weight.to(scale.dtype) * scale[:, None]


# -- linear ------------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    product = _product(x, weight, scale)
    return product if bias is None else product + bias


def _linear_shape(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep_linear(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    _, weight, scale, _ = inputs
    ctx.save_for_backward(weight, scale)


def _linear_gradient(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    weight, scale = ctx.saved_tensors
    of_input = outer @ _floats(weight, scale).to(outer.dtype) if ctx.needs_input_grad[0] else None
    of_bias = outer.reshape(-1, outer.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return of_input, None, None, of_bias


# -- LSTM --------------------------------------------------------------------------------------------------------------


def _lstm(
    x: Tensor,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lonely = x.ndim == 2
    if lonely:
        x, states = x.unsqueeze(0 if batch_first else 1), [state.unsqueeze(1) for state in states]
    sequence = x.transpose(0, 1) if batch_first else x
    directions, each = 2 if bidirectional else 1, 6 if has_biases else 4
    hidden, cell = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            own = parameters[place * each : (place + 1) * each]
            steps, last, memory = _direction(sequence, states[0][place], states[1][place], own, direction == 1)
            outputs.append(steps)
            hidden.append(last)
            cell.append(memory)
        sequence = torch.cat(outputs, -1)
    result, h, c = sequence.transpose(0, 1) if batch_first else sequence, torch.stack(hidden), torch.stack(cell)
    if lonely:
        result, h, c = result.squeeze(0 if batch_first else 1), h.squeeze(1), c.squeeze(1)
    return result.contiguous(), h, c


def _direction(
    sequence: Tensor, h: Tensor, c: Tensor, parameters: Sequence[Tensor], backwards: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the steps [length, batch, hidden] of one layer in one direction, and its last states."""
    weight, scale, recurrent, recurrent_scale, *biases = parameters
    inner = _product(sequence, weight, scale)
    places = range(len(sequence))
    steps: dict[int, Tensor] = {}
    for place in reversed(places) if backwards else places:
        gates = inner[place] + _product(h, recurrent, recurrent_scale)
        if biases:
            gates = gates + (biases[0] + biases[1])
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps[place] = h
    ordered = [steps[place] for place in places]
    return torch.stack(ordered) if ordered else h.new_zeros((0, *h.shape)), h.clone(), c.clone()


def _lstm_shape(
    x: Tensor,
    states: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h, c = states
    width = h.shape[-1] * (2 if bidirectional else 1)
    return x.new_empty((*x.shape[:-1], width)), h.new_empty(h.shape), c.new_empty(c.shape)


def _keep_lstm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, states, parameters, *ctx.options = inputs
    ctx.save_for_backward(x, *states, *parameters)


def _lstm_gradient(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
    """Run the layer of floats again, and take its gradients."""
    x, h, c, *parameters = ctx.saved_tensors
    has_biases, layers, bidirectional, batch_first = ctx.options
    each = 6 if has_biases else 4
    floats: list[Tensor] = []
    for first in range(0, len(parameters), each):
        weight, scale, recurrent, recurrent_scale, *biases = parameters[first : first + each]
        floats += [_floats(weight, scale), _floats(recurrent, recurrent_scale), *biases]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, h, c, *floats)]
    with torch.enable_grad():
        options = (has_biases, layers, 0.0, False, bidirectional, batch_first)
        results = torch.ops.aten.lstm.input(leaves[0], leaves[1:3], leaves[3:], *options)
    found = torch.autograd.grad(results, leaves, outer)
    of_parameters: list[Tensor | None] = []
    for first in range(3, len(found), each - 2):
        of_parameters += [None, None, None, None, *found[first + 2 : first + each - 2]]
    return found[0], [found[1], found[2]], of_parameters, None, None, None, None


_LIBRARY.impl("dynamic_linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("dynamic_lstm", _lstm, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::dynamic_linear", _linear_shape)
torch.library.register_fake("fxopt::dynamic_lstm", _lstm_shape)
torch.library.register_autograd("fxopt::dynamic_linear", _linear_gradient, setup_context=_keep_linear)
torch.library.register_autograd("fxopt::dynamic_lstm", _lstm_gradient, setup_context=_keep_lstm)

DYNAMIC_LINEAR = torch.ops.fxopt.dynamic_linear.default
DYNAMIC_LSTM = torch.ops.fxopt.dynamic_lstm.default
