"""Weights of recurrent layers, and of others, as 8-bit integers with a scale for each output.

before:  y, h, c = lstm(x, [h0, c0], [w, r, b, b'])
after:   y, h, c = dynamic_lstm(x, [h0, c0], [w as i8, scales, r as i8, scales, b, b'])

before:  y, h = gru(x, h0, [w, r, b, b'])
after:   y, h = gru(x, h0, [dequantize(w as i8, scales), dequantize(r as i8, scales), b, b'])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.args import arg, dtype, tensor_arg
from fxopt.dynamic_ops import DYNAMIC_LSTM
from fxopt.effects import is_in_place
from fxopt.ops import UPDATE_BUFFER
from fxopt.passes.quantize.saturation import avoid_saturation
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.stored_weights import StoredWeights, named_by, refusal, tensor_bytes
from fxopt.passes.quantize.weights import channel_scales, parameters_of, weight_integers
from fxopt.quantized_ops import DEQUANTIZE, FAKE_QUANTIZE
from fxopt.rewriter import Rewriter
from fxopt.weight_only_ops import LOOKUP_NBITS

__all__ = ["RECURRENT", "Int8Rows", "quantize_lstm", "row_integers", "store_gated", "why_no_constant"]

Node = torch.fx.Node
aten = torch.ops.aten
RECURRENT: dict[str, tuple[Any, ...]] = {
    "lstm": (aten.lstm.input,),
    "gru": (aten.gru.input,),
    "rnn": (aten.rnn_tanh.input, aten.rnn_relu.input),
}
"""The operators of each kind of recurrent layer."""

_SPEC = QuantSpec("weight", 8, signed=True, symmetric=True, axis=0)
_QUANTIZED = (DEQUANTIZE, FAKE_QUANTIZE, LOOKUP_NBITS)


def row_integers(weight: torch.Tensor, *, no_saturation: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as i8[out, in] and a scale for each row, f32[out].

    Args:
        weight: f32[out, in].
        no_saturation: Raise scales as far as 16-bit sums of products with u8 need it; see :func:`avoid_saturation`.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    scale = channel_scales(weight, _SPEC)
    if no_saturation:
        scale = avoid_saturation(weight, scale, 0, limits=_SPEC.limits)
    spec = dataclasses.replace(_SPEC, scale=scale, zero_point=(0,) * len(scale))
    return weight_integers(weight, spec), parameters_of(spec)[0]


class Int8Rows:
    """The matrices of one graph that become integers: which can, and the nodes that read what was stored for them.

    Attributes:
        bytes_before, bytes_after: Of what was stored so far, as floats, and as integers with their scales.
        dequantized: Nodes that yield the floats that stored integers stand for.
    """

    def __init__(self, rw: Rewriter, *, skip: Sequence[str], min_elements: int, no_saturation: bool) -> None:
        self.skip, self.min_elements, self.no_saturation = skip, min_elements, no_saturation
        self.bytes_before = self.bytes_after = 0
        self.dequantized: set[Node] = set()
        self._rw = rw
        self._stored = StoredWeights(rw)
        self._nodes: dict[int, tuple[Node, Node]] = {}

    def reads(self, read: Node) -> list[Node]:
        """Return every ``get_attr`` node that reads the same tensor."""
        return self._stored.reads(self._rw.tensor(read))

    def refusal(self, layer: Node, read: Node, min_elements: int) -> str | None:
        """Return why a matrix stays as it is, whoever reads it; None if it need not."""
        reads, tensor = self.reads(read), self._rw.tensor(read)
        if (reason := refusal(layer, reads, tensor, self.skip, min_elements)) is not None:
            return reason
        if tensor.ndim != 2:
            return f"its constant operand has {tensor.ndim} axes, not 2"
        if len({other.graph for other in reads}) > 1:
            return "its weight is read by more than one graph"
        return None

    def nodes(self, read: Node, *, near: Node, by_rows: bool = True, sums: bool = True) -> tuple[Node, Node]:
        """Return the nodes that read integers and scales, the same for every reader of a tensor.

        Args:
            read: The node that reads the matrix.
            near: Where the nodes are placed if there are none yet.
            by_rows: Whether its rows are the outputs; its columns otherwise.
            sums: Whether integers are multiplied, so that sums must not saturate.
        """
        tensor = self._rw.tensor(read)
        if id(tensor) not in self._nodes:
            matrix = tensor.detach() if by_rows else tensor.detach().t()
            integers, scale = row_integers(matrix, no_saturation=self.no_saturation and sums)
            self.bytes_before += tensor_bytes(tensor)
            self.bytes_after += tensor_bytes(integers, scale)
            path = str(read.target)
            self._nodes[id(tensor)] = (
                self._rw.constant(f"{path}_integers", integers, near=near),
                self._rw.constant(f"{path}_scale", scale, near=near),
            )
        return self._nodes[id(tensor)]


def why_no_constant(weight: Node) -> str | None:
    """Return why the operand of a layer is no weight that can be stored in another form, or None if it is one."""
    if weight.op == "get_attr":
        return None
    if weight.op == "placeholder":
        return "its weight is handed in when the graph runs"
    if weight.target in _QUANTIZED:
        return "its weight is quantized already"
    return "its weight is computed when the graph runs"


def quantize_lstm(rw: Rewriter, call: Node, rows: Int8Rows) -> bool:
    """Let an LSTM compute in integers, or record why not; return whether it does now."""
    reason = _lstm_refusal(rw, call, rows)
    if reason is not None:
        rw.skip(call, reason)
        return False
    each = _each(call)
    parameters: list[Node] = []
    for place, parameter in enumerate(arg(call, "params")):
        parameters += rows.nodes(parameter, near=call) if place % each < 2 else [parameter]
    options = (arg(call, name) for name in ("has_biases", "num_layers", "bidirectional", "batch_first"))
    rw.replace_call(
        call, DYNAMIC_LSTM, (tensor_arg(call, "input"), list(arg(call, "hx")), parameters, *options),
        why="integers, with ranges that are found when the graph runs",
    )  # fmt: skip
    return True


def store_gated(rw: Rewriter, call: Node, rows: Int8Rows) -> bool:
    """Store the weights of a GRU or simple recurrent layer as integers, or record why not; return whether they are."""
    if rows.dequantized.issuperset(_matrices(call)):  # another call of the same layer came first
        return True
    reason = _matrices_refusal(rw, call, rows, _is_written)
    if reason is not None:
        rw.skip(call, reason)
        return False
    for read in _matrices(call):
        reads = rows.reads(read)
        first = min(user for other in reads for user in other.users)
        why = f"{read.target} in 8 bits"
        integers, scale = rows.nodes(read, near=first, sums=False)
        zero_points = torch.zeros(rw.tensor(scale).shape, dtype=torch.int8)
        zero_point = rw.constant(f"{read.target}_zero_point", zero_points, near=first)
        rows.bytes_after += tensor_bytes(zero_points)
        floats = rw.insert_call(DEQUANTIZE, (integers, scale, zero_point, 0), before=first, why=why)
        rows.dequantized.add(floats)
        for other in reads:
            rw.replace_value(other, floats, why=why)
    return True


def _each(call: Node) -> int:
    return 4 if arg(call, "has_biases") else 2


def _matrices(call: Node) -> list[Node]:
    """Return the nodes of the weights of all layers and directions, each once, biases left out."""
    found = [node for place, node in enumerate(arg(call, "params")) if place % _each(call) < 2]
    return list(dict.fromkeys(found))


def _lstm_refusal(rw: Rewriter, call: Node, rows: Int8Rows) -> str | None:
    directions = 2 if arg(call, "bidirectional") else 1
    if len(arg(call, "params")) != arg(call, "num_layers") * directions * _each(call):
        return "it has projections (proj_size), which the integer kernel lacks"
    if _drops_out(call):
        return "dropout between its layers is active in evaluation"
    for operand in (tensor_arg(call, "input"), *arg(call, "hx")):
        if dtype(operand) is not torch.float32:
            return f"its input is {dtype(operand)}"
    return _matrices_refusal(rw, call, rows, lambda user: user.target is not aten.lstm.input)


def _matrices_refusal(rw: Rewriter, call: Node, rows: Int8Rows, forbidden: Callable[[Node], bool]) -> str | None:
    matrices = _matrices(call)
    for matrix in matrices:
        if (reason := why_no_constant(matrix)) is not None:
            return reason
    if named_by(rows.skip, call, [read for matrix in matrices for read in rows.reads(matrix)]):
        return "its name is one to skip"
    total = sum(rw.tensor(matrix).numel() for matrix in matrices)
    if total < rows.min_elements:
        return f"its weights have {total} elements, fewer than {rows.min_elements}"
    for matrix in matrices:
        if (reason := rows.refusal(call, matrix, 1)) is not None:
            return reason
        for user in (user for read in rows.reads(matrix) for user in read.users):
            if forbidden(user):
                return f"its weight is also read by {user.name} ({user.target})"
    return None


def _is_written(user: Node) -> bool:
    return user.target is UPDATE_BUFFER or is_in_place(user.target)


def _drops_out(call: Node) -> bool:
    """Return whether an LSTM drops values between its layers while it evaluates."""
    modes = call.meta.get("modes", {})
    train, share = (modes[name][1] if name in modes else arg(call, name) for name in ("train", "dropout"))
    return bool(train) and share > 0 and arg(call, "num_layers") > 1
