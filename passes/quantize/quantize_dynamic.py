"""Compute linear layers and LSTMs in 8-bit integers whose ranges are found when the graph runs: no calibration.

    before:  y = linear(x, w, b)
    after:   y = dynamic_linear(x, w as i8[out, in], a scale for each output, b)

and LSTMs likewise. Weights are rounded once, symmetrically, with a scale for each output; activations become u8 on each
run, with one scale for the tensor that they are in. ONNX Runtime 1.32 on a CPU has one kernel for each: com.microsoft's
DynamicQuantizeMatMul and DynamicQuantizeLSTM. A static plan (:class:`Quantize`) puts more of a graph into integers,
convolutions above all, and needs inputs to find its ranges with.

A range is as wide as the largest activation of the batch: one unit that is far larger than the others takes the digits
of all. Layers of random weights keep some 38 dB. MiniLM-L6 keeps 11, and 18 without the one layer that such a unit
feeds (``skip=("*layer.0.output.dense*",)``).

GRU and simple recurrent layers have no integer kernel. Their weights are stored as integers and made floats on each
run: a quarter of the size, and some time on top, which a sequence of 50 steps hides and a single step does not.

Measured with ORT on one thread of an AMD EPYC without VNNI: an LSTM of 128 inputs, 256 units and 50 steps 1.6 ms in
floats and 0.7 in integers, a GRU 1.2 and 1.4; MiniLM-L6 on a sentence of 18 tokens 9.9 and 5.6.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from fxopt.args import arg, dtype, shape, tensor_arg
from fxopt.dynamic_ops import DYNAMIC_LINEAR
from fxopt.pass_base import LossyPass
from fxopt.passes.quantize.recurrent_weights import RECURRENT, Int8Rows, quantize_lstm, store_gated, why_no_constant
from fxopt.passes.quantize.stored_weights import check_names
from fxopt.rewriter import Rewriter

__all__ = ["QuantizeDynamic"]

Node = torch.fx.Node
aten = torch.ops.aten
_KINDS = ("linear", *RECURRENT)


@dataclasses.dataclass(frozen=True)
class _Form:
    """The arguments of an operator that multiplies by a matrix, and whether its rows are the outputs."""

    input: str
    weight: str
    bias: str | None
    by_rows: bool


_FORMS: dict[Any, _Form] = {
    aten.linear.default: _Form("input", "weight", "bias", True),
    aten.matmul.default: _Form("self", "other", None, False),
    aten.mm.default: _Form("self", "mat2", None, False),
    aten.addmm.default: _Form("mat1", "mat2", "self", False),
}


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(LossyPass):
    """Quantize linear layers and LSTMs without calibration, and store the weights of GRU and RNN in 8 bits.

    Attributes:
        kinds: What is quantized: "linear" (products with any constant matrix), "lstm", "gru", "rnn".
        skip: Patterns of names of weights or nodes that stay as they are.
        min_elements: Layers with smaller weights stay as they are.
        no_saturation: Choose weight scales with which the 16-bit sums of CPUs without VNNI cannot overflow.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB.
    """

    name: ClassVar[str] = "quantize-dynamic"
    evaluation_only: ClassVar[bool] = True
    kinds: tuple[str, ...] = _KINDS
    skip: tuple[str, ...] = ()
    min_elements: int = 4096
    no_saturation: bool = True
    min_sqnr_db: float = 10.0

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.kinds, tuple):
            raise TypeError(f"kinds is {self.kinds!r}; wanted a tuple, such as ('linear', 'lstm')")
        if unknown := [kind for kind in self.kinds if kind not in _KINDS]:
            raise ValueError(f"kinds holds {unknown[0]!r}; wanted {', '.join(_KINDS)}")
        if not self.kinds:
            raise ValueError(f"kinds is empty; wanted some of {', '.join(_KINDS)}")
        if self.min_elements < 0:
            raise ValueError(f"min_elements is {self.min_elements}; wanted 0 or more")
        check_names(self.skip)

    def run(self, rw: Rewriter) -> None:
        """Quantize every layer whose weights allow it."""
        rows = Int8Rows(rw, skip=self.skip, min_elements=self.min_elements, no_saturation=self.no_saturation)
        if "linear" in self.kinds:
            _quantize_products(rw, rows)
        if "lstm" in self.kinds:
            for call in rw.calls(*RECURRENT["lstm"]):
                quantize_lstm(rw, call, rows)
        gated = [target for kind in ("gru", "rnn") if kind in self.kinds for target in RECURRENT[kind]]
        stored = sum([store_gated(rw, call, rows) for call in rw.calls(*gated)])
        if rows.bytes_before:
            rw.notes.append(f"weights of {rows.bytes_before} bytes take {rows.bytes_after} bytes in 8 bits")
        if stored:
            rw.notes.append(f"{stored} GRU or RNN layers still compute in floats: smaller in a file, not faster")


def _quantize_products(rw: Rewriter, rows: Int8Rows) -> None:
    reasons: dict[int, str | None] = {}
    for call in rw.calls(*_FORMS):
        weight = tensor_arg(call, _FORMS[call.target].weight)
        if (reason := why_no_constant(weight)) is not None:
            if call.target is aten.linear.default:  # the others multiply activations more often than weights
                rw.skip(call, reason)
            continue
        key = id(rw.tensor(weight))
        if key not in reasons:  # before the first change: afterwards others read it
            reasons[key] = _weight_refusal(call, weight, rows)
        if (reason := reasons[key] or _call_refusal(call)) is not None:
            rw.skip(call, reason)
        else:
            _replace(rw, call, rows)


def _weight_refusal(call: Node, weight: Node, rows: Int8Rows) -> str | None:
    """Return why a weight stays as it is: the float weight would have to stay beside the integers, among others."""
    if (reason := rows.refusal(call, weight, rows.min_elements)) is not None:
        return reason
    for user in (user for read in rows.reads(weight) for user in read.users):
        form = _FORMS.get(user.target)
        if form is None or arg(user, form.weight) not in rows.reads(weight):
            return f"its weight is also read by {user.name} ({user.target})"
        if (reason := _call_refusal(user)) is not None and user is not call:
            return f"its weight is also read by {user.name}: {reason}"
        if form.by_rows != _FORMS[call.target].by_rows:
            return f"its weight is read transposed by {user.name}"
    return None


def _call_refusal(call: Node) -> str | None:
    form = _FORMS[call.target]
    x = tensor_arg(call, form.input)
    if dtype(x) is not torch.float32:
        return f"its input is {dtype(x)}"
    if call.target is aten.addmm.default and (arg(call, "alpha") != 1 or arg(call, "beta") != 1):
        return "alpha or beta is not 1"
    bias = None if form.bias is None else arg(call, form.bias)
    if bias is not None and (len(shape(bias)) != 1 or shape(bias)[0] != shape(call)[-1]):
        return "what is added is no vector of its outputs"
    return None


def _replace(rw: Rewriter, call: Node, rows: Int8Rows) -> None:
    form = _FORMS[call.target]
    weight = tensor_arg(call, form.weight)
    integers, scale = rows.nodes(weight, near=call, by_rows=form.by_rows)
    bias = None if form.bias is None else arg(call, form.bias)
    rw.replace_call(
        call, DYNAMIC_LINEAR, (tensor_arg(call, form.input), integers, scale, bias),
        why=f"weight {weight.target} in 8 bits, activations when the graph runs",
    )  # fmt: skip
