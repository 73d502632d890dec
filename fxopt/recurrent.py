"""Keep recurrent layers whole while tracing.

torch's own fake kernel of ``lstm`` runs the time steps one by one, so that a trace fixes the length of the sequence.
While a model is traced, recurrent layers call stand-ins that only state the shapes of their results; the traced graph
then gets the real ATen operators back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

__all__ = ["RECURRENT_OPERATORS", "WholeRecurrentLayers", "shape_only"]

_LIBRARY = torch.library.Library("fxopt_trace", "DEF")
_OPTIONS = "bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, bool batch_first"
_LIBRARY.define(f"lstm(Tensor input, Tensor[] hx, Tensor[] params, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    _LIBRARY.define(f"{_name}(Tensor input, Tensor hx, Tensor[] params, {_OPTIONS}) -> (Tensor, Tensor)")


def _lstm(input: torch.Tensor, hx: Sequence[torch.Tensor], params: Any, *options: Any) -> tuple[torch.Tensor, ...]:
    bidirectional = options[4]
    width = hx[0].shape[-1] * (2 if bidirectional else 1)
    return input.new_empty((*input.shape[:-1], width)), torch.empty_like(hx[0]), torch.empty_like(hx[1])


def _gated(input: torch.Tensor, hx: torch.Tensor, params: Any, *options: Any) -> tuple[torch.Tensor, ...]:
    width = hx.shape[-1] * (2 if options[4] else 1)
    return input.new_empty((*input.shape[:-1], width)), torch.empty_like(hx)


_LIBRARY.impl("lstm", _lstm, "Meta")
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    _LIBRARY.impl(_name, _gated, "Meta")

RECURRENT_OPERATORS: dict[OpOverload, OpOverload] = {
    torch.ops.fxopt_trace.lstm.default: torch.ops.aten.lstm.input,
    torch.ops.fxopt_trace.gru.default: torch.ops.aten.gru.input,
    torch.ops.fxopt_trace.rnn_tanh.default: torch.ops.aten.rnn_tanh.input,
    torch.ops.fxopt_trace.rnn_relu.default: torch.ops.aten.rnn_relu.input,
}
_SHAPES_ONLY = {operator: stand_in for stand_in, operator in RECURRENT_OPERATORS.items()}


def shape_only(target: Any) -> Any:
    """Return what to call with fake tensors in place of ``target``: a stand-in for a recurrent layer, else itself."""
    return _SHAPES_ONLY.get(target, target)


_STAND_INS = {
    torch._VF.lstm: torch.ops.fxopt_trace.lstm,
    torch._VF.gru: torch.ops.fxopt_trace.gru,
    torch._VF.rnn_tanh: torch.ops.fxopt_trace.rnn_tanh,
    torch._VF.rnn_relu: torch.ops.fxopt_trace.rnn_relu,
}


class WholeRecurrentLayers(TorchFunctionMode):
    """While active, recurrent layers over padded (not packed) sequences call the stand-ins."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stand_in = _STAND_INS.get(func)
        # The packed form has the batch sizes, a tensor, where this one has the states.
        if stand_in is not None and len(args) == 9 and isinstance(args[3], bool):
            return stand_in(*args)
        return func(*args, **(kwargs or {}))
