"""ORT's CPU kernels as data: which layer each computes, in which numbers, and how many multiply-accumulates it takes.

The names are those of ONNX and of ORT's contrib operators (``com.microsoft``), as they stand in the graph that ORT's
optimizer leaves at level "extended". A multiply-accumulate is one product that is added to a sum; biases, activations
and the softmax of an attention are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

__all__ = ["FLOATS", "KERNELS", "NUMBERS_8_BIT", "Call", "KernelType", "Kind", "Layer", "Shape", "kind_of"]

Layer = Literal["conv", "linear", "matmul", "attention", "recurrent", "add", "pool", "concat"]
Kind = Literal["integer", "weight-only", "float"]
Shape = tuple[int, ...]

NUMBERS_8_BIT = frozenset({"uint8", "int8"})
FLOATS = frozenset({"float", "float16", "bfloat16", "double"})  # by ORT's names


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of one kernel.

    Attributes:
        attributes: The attributes of its node.
        inputs, outputs: Shape at each position; None where there is nothing.
    """

    attributes: Mapping[str, Any]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]

    def input(self, place: int) -> Shape:
        """Return the shape of an input that must be there."""
        shape = self.inputs[place]
        assert shape is not None
        return shape

    def unequal(self, places: tuple[int, ...]) -> bool:
        """Return whether inputs differ in their shapes."""
        return len({self.inputs[place] for place in places}) > 1

    @property
    def output(self) -> Shape:
        """The shape of the first output."""
        assert self.outputs[0] is not None
        return self.outputs[0]


@dataclasses.dataclass(frozen=True)
class KernelType:
    """What a kernel computes.

    Attributes:
        layer: What it is to a user; "linear" becomes "matmul" where both operands are activations.
        integer: Whether it adds up integers; None if the type of its output, or its accuracy level, tells.
        macs: Multiply-accumulates of one call.
        operands: The inputs that it multiplies or adds.
    """

    layer: Layer
    integer: bool | None
    macs: Callable[[Call], int]
    operands: tuple[int, ...] = (0, 1)


def kind_of(kernel: KernelType, attributes: Mapping[str, Any], numbers: str) -> Kind:
    """Return what a kernel computes in; ``numbers`` is the type of its first output, as "uint8"."""
    if "bits" in attributes:  # MatMulNBits, which at level 4 makes int8 of the activations too
        return "integer" if attributes.get("accuracy_level", 0) == 4 else "weight-only"
    integer = numbers in NUMBERS_8_BIT if kernel.integer is None else kernel.integer
    return "integer" if integer else "float"


# -- multiply-accumulates of one call ----------------------------------------------------------------------------------


def _none(call: Call) -> int:
    return 0


def _conv(weight: int) -> Callable[[Call], int]:
    """The weight is [out, in / groups, *window]: every element of the output sums over all but its first axis."""
    return lambda call: math.prod(call.output) * math.prod(call.input(weight)[1:])


def _conv_transpose(call: Call) -> int:
    """The weight is [in, out / groups, *window]: every element of the input meets all but its first axis."""
    return math.prod(call.input(0)) * math.prod(call.input(1)[1:])


def _matmul(call: Call) -> int:
    """Broadcasting and batches are in the shape of the output; what is left is the common axis."""
    a = call.input(0)
    return math.prod(call.output) * a[-2 if call.attributes.get("transA", 0) and len(a) > 1 else -1]


def _matmul_n_bits(call: Call) -> int:
    return math.prod(call.output) * int(call.attributes["K"])


def _recurrent(call: Call) -> int:
    """Input [steps, batch, in]; weights [directions, gates * hidden, in] and [directions, gates * hidden, hidden]."""
    steps, batch, _ = call.input(0)
    return steps * batch * (math.prod(call.input(1)) + math.prod(call.input(2)))


def _attention(call: Call) -> int:
    """Input [batch, queries, in] and one weight [in, q + k + v] of ``com.microsoft``, or the q, k and v of others."""
    query, second = call.input(0), call.input(1)
    if len(query) == 3 and len(second) == 2:
        batch, queries, _ = query
        value = call.output[-1]
        past = next((shape[-2] for shape in call.inputs[4:] if shape is not None and len(shape) == 5), 0)
        inner = (second[1] - value) // 2 + value
        return batch * queries * (math.prod(second) + (queries + past) * inner)
    cached = [shape[-2] for shape in call.outputs[1:] if shape is not None and len(shape) == 4]
    keys = cached[0] if cached else second[-2]
    return (math.prod(query) + math.prod(call.output)) * keys


def _einsum(call: Call) -> int:
    """Two operands: one product for each combination of all letters, ``...`` by broadcasting."""
    equation = call.attributes["equation"].replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    batch: dict[int, int] = {}  # axes under the dots, counted from their end
    for place, term in enumerate(terms):
        shape = call.input(place)
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        for letter, size in zip(before, shape, strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
        for letter, size in zip(reversed(after), reversed(shape), strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
        for axis in range(hidden):
            size = shape[len(before) + hidden - 1 - axis]
            batch[axis] = max(size, batch.get(axis, 1))
    return math.prod(sizes.values()) * math.prod(batch.values()) * (len(terms) - 1)


KERNELS: dict[str, KernelType] = {
    "Conv": KernelType("conv", False, _conv(1)),
    "FusedConv": KernelType("conv", False, _conv(1)),
    "NhwcFusedConv": KernelType("conv", False, _conv(1)),
    "ConvInteger": KernelType("conv", True, _conv(1)),
    "QLinearConv": KernelType("conv", True, _conv(3), (0, 3)),
    "ConvTranspose": KernelType("conv", False, _conv_transpose),
    "MatMul": KernelType("linear", False, _matmul),
    "FusedMatMul": KernelType("linear", False, _matmul),
    "Gemm": KernelType("linear", False, _matmul),
    "FusedGemm": KernelType("linear", False, _matmul),
    "QGemm": KernelType("linear", True, _matmul, (0, 3)),
    "QLinearMatMul": KernelType("linear", True, _matmul, (0, 3)),
    "MatMulInteger": KernelType("linear", True, _matmul),
    "MatMulInteger16": KernelType("linear", True, _matmul),
    "MatMulIntegerToFloat": KernelType("linear", True, _matmul),
    "DynamicQuantizeMatMul": KernelType("linear", True, _matmul),
    "MatMulNBits": KernelType("linear", None, _matmul_n_bits),
    "Einsum": KernelType("linear", False, _einsum),
    "Attention": KernelType("attention", False, _attention),
    "QAttention": KernelType("attention", True, _attention),
    "MultiHeadAttention": KernelType("attention", False, _attention, (0, 1, 2)),
    "GroupQueryAttention": KernelType("attention", False, _attention, (0, 1, 2)),
    "RNN": KernelType("recurrent", False, _recurrent),
    "LSTM": KernelType("recurrent", False, _recurrent),
    "GRU": KernelType("recurrent", False, _recurrent),
    "DynamicQuantizeLSTM": KernelType("recurrent", True, _recurrent, (0, 1, 2)),
    "Add": KernelType("add", False, _none),
    "QLinearAdd": KernelType("add", True, _none, (0, 3)),
    "SkipLayerNormalization": KernelType("add", False, _none),
    "MaxPool": KernelType("pool", None, _none, (0,)),
    "AveragePool": KernelType("pool", False, _none, (0,)),
    "LpPool": KernelType("pool", False, _none, (0,)),
    "GlobalAveragePool": KernelType("pool", False, _none, (0,)),
    "GlobalMaxPool": KernelType("pool", False, _none, (0,)),
    "QLinearAveragePool": KernelType("pool", True, _none, (0,)),
    "QLinearGlobalAveragePool": KernelType("pool", True, _none, (0,)),
    "Concat": KernelType("concat", None, _none, ()),
    "QLinearConcat": KernelType("concat", True, _none, ()),
}
