"""Weights of recurrent layers, and of others, as 8-bit integers with a scale for each output.

before:  y, h = gru(x, h0, [w, r, b, b'])
after:   y, h = gru(x, h0, [dequantize(w as i8, scales), dequantize(r as i8, scales), b, b'])

:mod:`lstm_layers` lets an LSTM multiply the integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.args import shape
from fxopt.effects import is_in_place
from fxopt.ops import UPDATE_BUFFER
from fxopt.passes.quantize.saturation import avoid_saturation
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.stored_weights import StoredWeights, matrices_of, named_by, refusal, tensor_bytes
from fxopt.passes.quantize.weights import channel_scales, parameters_of, weight_integers
from fxopt.quantized_ops import DEQUANTIZE, FAKE_QUANTIZE
from fxopt.rewriter import Rewriter
from fxopt.weight_only_ops import EXPAND_NBITS, LOOKUP_NBITS

__all__ = [
    "RECURRENT", "Int8Rows", "is_written", "matrices_refusal", "row_integers", "store", "why_no_constant",
]  # fmt: skip

Node = torch.fx.Node
aten = torch.ops.aten
RECURRENT: dict[str, tuple[Any, ...]] = {
    "lstm": (aten.lstm.input, aten.lstm_cell.default),
    "gru": (aten.gru.input, aten.gru_cell.default),
    "rnn": (aten.rnn_tanh.input, aten.rnn_relu.input, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default),
}
"""The operators of each kind of recurrent layer, and of its cell."""

_SPEC = QuantSpec("weight", 8, signed=True, symmetric=True, axis=0)
_QUANTIZED = (DEQUANTIZE, FAKE_QUANTIZE, EXPAND_NBITS, LOOKUP_NBITS)


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


def matrices_refusal(
    rw: Rewriter, call: Node, matrices: Sequence[Node], rows: Int8Rows, forbidden: Callable[[Node], bool]
) -> str | None:
    """Return why some of the matrices of a call cannot be stored as integers, or None if they can.

    Args:
        rw: Of the pass.
        call: A recurrent layer or a stack of them; it is all of it that must not be too small.
        matrices: The nodes that read the weights in question.
        rows: What is stored.
        forbidden: Whether a reader of a weight keeps it a float.
    """
    for matrix in matrices:
        if (reason := why_no_constant(matrix)) is not None:
            return reason
    if named_by(rows.skip, call, [read for matrix in matrices for read in rows.reads(matrix)]):
        return "its name is one to skip"
    total = sum(math.prod(shape(matrix)) for matrix in matrices_of(call))
    if total < rows.min_elements:
        return f"its weights have {total} elements, fewer than {rows.min_elements}"
    for matrix in matrices:
        if (reason := rows.refusal(call, matrix, 1)) is not None:
            return reason
        for user in (user for read in rows.reads(matrix) for user in read.users):
            if forbidden(user):
                return f"its weight is also read by {user.name} ({user.target})"
    return None


def store(rw: Rewriter, matrices: Sequence[Node], rows: Int8Rows) -> None:
    """Store matrices as integers, and let all that read them read the floats that these stand for."""
    for read in matrices:
        if read in rows.dequantized:  # another call of the same layer came first
            continue
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


def is_written(user: Node) -> bool:
    """Return whether a reader of a weight writes it."""
    return user.target is UPDATE_BUFFER or is_in_place(user.target)
