"""Compute linear layers and LSTMs in 8-bit integers whose ranges are found when the graph runs: no calibration.

    before:  y = linear(x, w, b)
    after:   y = dynamic_linear(x, w as i8[out, in], a scale for each output, b)

and LSTMs likewise. Weights are rounded once, symmetrically, with a scale for each output; activations become u8 on each
run, with one scale for the tensor that they are in. ONNX Runtime 1.32 on a CPU has one kernel for each: com.microsoft's
DynamicQuantizeMatMul and DynamicQuantizeLSTM. A static plan (:class:`Quantize`) puts more of a graph into integers,
convolutions above all, and needs inputs to find its ranges with.

A range is as wide as the largest activation of the batch: one unit that is far larger than the others takes the digits
of all. A speaker encoder of 3 LSTM layers reads the power of a spectrum, 16.8 at most and 0.0002 in the median: its
first layer in integers leaves 2 dB, and without it the others 30. Each layer of a stack is undone alone; its weights
can still be stored in 8 bits (``weights_only=("lstm.weight_*_l0",)``). Layers of random weights keep some 38 dB.
MiniLM-L6 keeps 11, and 18 without the one layer that such a unit feeds (``skip=("*layer.0.output.dense*",)``).

Embeddings are looked up in tables of 8 bits in blocks, of which each run makes the rows floats that it needs.
GRU and simple recurrent layers have no integer kernel. Their weights are stored as integers, of which ORT makes floats
once, when it loads the file: a quarter of the size, and the time of floats. Cells multiply the integers, in blocks of
32 whose activations become integers too (com.microsoft's MatMulNBits); all steps of a loop read the same ones.

Measured with ORT on one thread of an AMD EPYC without VNNI: an LSTM of 128 inputs, 256 units and 50 steps 1.6 ms in
floats and 0.7 in integers; MiniLM-L6 on a sentence of 18 tokens 9.9 and 5.6.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from fxopt.args import arg, dtype, shape, tensor_arg
from fxopt.dynamic_ops import DYNAMIC_LINEAR
from fxopt.layer_operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.pass_base import LossyPass
from fxopt.passes.quantize.lstm_layers import quantize_lstm
from fxopt.passes.quantize.recurrent_weights import (
    RECURRENT,
    Int8Rows,
    is_written,
    matrices_refusal,
    store,
    why_no_constant,
)
from fxopt.passes.quantize.stored_weights import check_kinds, check_names, matrices_of, named_by
from fxopt.passes.quantize.weight_only import TABLES
from fxopt.rewriter import Rewriter

__all__ = ["QuantizeDynamic"]

Node = torch.fx.Node
aten = torch.ops.aten
_KINDS = ("linear", *RECURRENT, "embedding")


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


_CONVOLUTIONS: dict[Any, str] = {
    **dict.fromkeys(
        CONVOLUTIONS, "no integer convolution finds its ranges when it runs; quantize has one, and calibrates"
    ),
    **dict.fromkeys(TRANSPOSED_CONVOLUTIONS, "transposed convolutions have no integer kernel"),
}


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(LossyPass):
    """Quantize linear layers and LSTMs without calibration, and store the weights of GRU, RNN, embeddings in 8 bits.

    Attributes:
        kinds: What is quantized: "linear" (products with any constant matrix), "lstm", "gru", "rnn", "embedding"
            (tables whose rows are looked up, in blocks of 8 bits).
        skip: Patterns of names of weights, nodes or modules that stay as they are.
        weights_only: Patterns of names of weights or nodes of LSTM layers whose weights are stored in 8 bits, as those
            of a GRU are, and which compute in floats.
        min_elements: Layers with smaller weights stay as they are.
        no_saturation: Choose weight scales with which the 16-bit sums of CPUs without VNNI cannot overflow.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB.
    """

    name: ClassVar[str] = "quantize-dynamic"
    evaluation_only: ClassVar[bool] = True
    remedy: ClassVar[str] = (
        "weights_only=('NAME*',) computes an LSTM layer in floats, from weights of 8 bits; "
        "quantize-weights does so for linear layers"
    )
    kinds: tuple[str, ...] = _KINDS
    skip: tuple[str, ...] = ()
    weights_only: tuple[str, ...] = ()
    min_elements: int = 4096
    no_saturation: bool = True
    min_sqnr_db: float = 10.0

    def __post_init__(self) -> None:
        """Check the options."""
        check_kinds(self.kinds, _KINDS)
        if self.min_elements < 0:
            raise ValueError(f"min_elements is {self.min_elements}; wanted 0 or more")
        check_names(self.skip)
        check_names(self.weights_only, "weights_only")

    def run(self, rw: Rewriter) -> None:
        """Quantize every layer whose weights allow it."""
        if "embedding" in self.kinds:
            tables = dataclasses.replace(TABLES, skip=self.skip, min_elements=self.min_elements)
            tables.store(rw, self._is_product)
        rows = Int8Rows(rw, skip=self.skip, min_elements=self.min_elements, no_saturation=self.no_saturation)
        stored = 0
        if "linear" in self.kinds:
            _quantize_products(rw, rows)
            for call in rw.calls(*_CONVOLUTIONS):
                rw.skip(call, _CONVOLUTIONS[call.target])
        for call in rw.calls(*(target for kind in self.kinds for target in RECURRENT.get(kind, ()))):
            if call.target is aten.lstm.input:
                stored += quantize_lstm(rw, call, rows, self.weights_only)
            else:
                stored += _store(rw, call, rows)
        if rows.bytes_before:
            rw.notes.append(f"weights of {rows.bytes_before} bytes take {rows.bytes_after} bytes in 8 bits")
        if stored:
            rw.notes.append(f"{stored} recurrent layers still compute in floats: smaller in a file, not faster")

    def _is_product(self, call: Node) -> bool:
        """Return whether a call multiplies by a matrix that becomes integers, as far as the call alone tells."""
        if "linear" not in self.kinds or call.target not in _FORMS or _call_refusal(call) is not None:
            return False
        weight = tensor_arg(call, _FORMS[call.target].weight)
        return weight.op == "get_attr" and not named_by(self.skip, call, (weight,))


def _store(rw: Rewriter, call: Node, rows: Int8Rows) -> bool:
    """Store the weights of a recurrent layer as integers, or record why not; return whether they are."""
    matrices = matrices_of(call)
    if not rows.dequantized.issuperset(matrices):
        if (reason := matrices_refusal(rw, call, matrices, rows, is_written)) is not None:
            rw.skip(call, reason)
            return False
        store(rw, matrices, rows)
    return True


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
