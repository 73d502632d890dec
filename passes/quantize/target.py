"""What a runtime computes in integers: a table of facts, by which the quantizers are placed.

A kernel is *heavy* if it is worth quantizing its operands for: it asks for integers. The others join only where
integers arrive anyway and are wanted behind. Operators that only move numbers (``moves``) keep the scale of these.

Facts of ORT: read from what ONNX Runtime 1.32 makes on a CPU of ``DequantizeLinear -> op -> QuantizeLinear``;
``tests/passes/quantize/test_target.py`` holds each row against the installed version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

from fxopt.layer_operators import CELLS, CONVOLUTIONS, RECURRENT

__all__ = ["GENERIC", "ORT_CPU", "TARGETS", "Kernel", "Target"]

aten = torch.ops.aten

Output = Literal["required", "preferred", "optional"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How an operator is computed in integers.

    Attributes:
        operands: Names of the arguments that must be integers; one that is a list of tensors counts as all of them.
        weight: The one of ``operands`` that may be a constant with a scale for each output channel.
        weight_axis: The axis of the output channels of that constant.
        bias: Name of the argument that becomes 32-bit integers.
        output: Whether the result must be requantized for the kernel to be an integer one, may stay a float where a
            plan says so, which takes longer, or stays one unless integers are wanted.
        heavy: Whether it asks for integers.
        same_scale: Whether operands and result share one scale where they can; see :mod:`shared_scales`.
    """

    operands: tuple[str, ...]
    weight: str | None = None
    weight_axis: int = 0
    bias: str | None = None
    output: Output = "required"
    heavy: bool = False
    same_scale: bool = False


_UNUSED: dict[Any, str] = dict.fromkeys(
    (*RECURRENT, *CELLS),
    "recurrent layers stay floats in a static plan; quantize-dynamic behind it makes their weights integers",
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a runtime computes in integers, and in which.

    Attributes:
        name: What the user calls it.
        kernels: Operator: its integer kernel.
        moves: Operator that only moves numbers: the argument that they come from.
        signed_activations: Whether activations are signed.
        symmetric_activations: Whether their zero point is 0.
        unused: Why operators that multiply by weights have no integer kernel.
        fewest_products: How many products for each number of its result make a convolution among floats faster in
            integers, conversions included.
        fewest_macs: The same of any layer: its multiply-accumulates in all.
        fewest_channels: Of how many input channels a convolution of integers whose result stays a float is faster than
            one of floats.
        fewest_terms: How many products each number of a matrix product must add up: one or two are read faster in
            floats than they are converted.
        block_tables: Whether it looks rows up in tables of 8 bits in blocks.
    """

    name: str
    kernels: Mapping[Any, Kernel]
    moves: Mapping[Any, str]
    signed_activations: bool = False
    symmetric_activations: bool = False
    unused: Mapping[Any, str] = dataclasses.field(default_factory=lambda: dict(_UNUSED))
    fewest_products: int = 0
    fewest_macs: int = 0
    fewest_channels: int = 0
    fewest_terms: int = 3
    block_tables: bool = False


_CONV = Kernel(("input", "weight"), weight="weight", bias="bias", heavy=True)
_HEAVY: dict[Any, Kernel] = {
    **dict.fromkeys(CONVOLUTIONS, _CONV),
    aten.linear.default: Kernel(("input", "weight"), "weight", 0, "bias", "optional", heavy=True),
    aten.addmm.default: Kernel(("mat1", "mat2"), "mat2", 1, "self", "optional", heavy=True),
    aten.mm.default: Kernel(("self", "mat2"), "mat2", 1, output="optional", heavy=True),
    aten.matmul.default: Kernel(("self", "other"), "other", 1, output="optional", heavy=True),
    aten.bmm.default: Kernel(("self", "mat2"), output="optional", heavy=True),
}  # fmt: skip
_JOINING: dict[Any, Kernel] = {
    aten.add.Tensor: Kernel(("self", "other")),
    aten.mul.Tensor: Kernel(("self", "other")),
    aten.sigmoid.default: Kernel(("self",)),
    aten.leaky_relu.default: Kernel(("self",)),
    aten.avg_pool2d.default: Kernel(("self",)),
    aten.adaptive_avg_pool2d.default: Kernel(("self",)),
    aten.cat.default: Kernel(("tensors",), same_scale=True),
}
_MOVES: dict[Any, str] = {
    aten.view.default: "self",
    aten.reshape.default: "self",
    aten.flatten.using_ints: "self",
    aten.unflatten.int: "self",
    aten.squeeze.dim: "self",
    aten.squeeze.dims: "self",
    aten.squeeze.default: "self",
    aten.unsqueeze.default: "self",
    aten.transpose.int: "self",
    aten.permute.default: "self",
    aten.t.default: "self",
    aten.contiguous.default: "self",
    aten.clone.default: "self",
    aten.select.int: "self",
    aten.slice.Tensor: "self",
    aten.index_select.default: "self",
    aten.max_pool2d.default: "self",
    **dict.fromkeys((getattr(aten, f"upsample_nearest{rank}d").vec for rank in (1, 2, 3)), "input"),
    **dict.fromkeys((getattr(aten, f"_upsample_nearest_exact{rank}d").vec for rank in (1, 2, 3)), "input"),
    **dict.fromkeys((getattr(aten, f"upsample_nearest{rank}d").default for rank in (1, 2, 3)), "self"),
    **dict.fromkeys((getattr(aten, f"_upsample_nearest_exact{rank}d").default for rank in (1, 2, 3)), "self"),
}
_ORT_CONVOLUTIONS = dict.fromkeys(CONVOLUTIONS, dataclasses.replace(_CONV, output="preferred"))

ORT_CPU = Target(
    "ort-cpu",
    _HEAVY | _ORT_CONVOLUTIONS | _JOINING | {aten.hardsigmoid.default: Kernel(("self",))},
    _MOVES,
    fewest_products=48,
    fewest_macs=16384,
    fewest_channels=16,
    block_tables=True,
)
"""ONNX Runtime's CPU provider: unsigned activations with a zero point, signed weights by channel.

A convolution of one group whose result stays a float becomes an integer matrix product of its windows; hardsigmoid the
sum of x / 6 and 1/2, whose saturation at 0 and 1 is that of the integers.
``python -m tests.bench float_layers`` shows the first two numbers, ``float_results`` the last.
"""

GENERIC = Target("onnx", _HEAVY | _JOINING, _MOVES, signed_activations=True, symmetric_activations=False)
"""Any runtime of ONNX: signed activations."""

TARGETS: dict[str, Target] = {target.name: target for target in (ORT_CPU, GENERIC)}
