"""How far the value of one node, or of one part of a model, may be from the right one if both start from the same.

For a node of a graph the unit is the rounding error that PyTorch makes, known from a run in float64. A part of a file
has no such run: many kernels have no double form. Backward error stands in for it: what a backward stable method yields
is exact for operands that are each off by some eps of themselves (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., section 1.5). So the part runs once more on operands disturbed by up to one eps, and by how much
its value moves is the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch

from fxopt.contracts import Contract
from fxopt.export.kernel_noise import APPROXIMATED
from fxopt.export.slices import Slice
from fxopt.numerics import FLOOR_EPS, largest_noise, measure, node_float64, surely_rounding, violation

__all__ = ["local_problem", "part_problem"]

_FACTOR = Contract.ROUNDING.factor
_APPROXIMATED = frozenset(
    {"Sigmoid", "Tanh", "Erf", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Mish", "LSTM", "GRU", "RNN"}
)
_EPS = {
    ir.DataType.BFLOAT16: torch.finfo(torch.bfloat16).eps,
    ir.DataType.FLOAT16: torch.finfo(torch.float16).eps,
    ir.DataType.FLOAT: torch.finfo(torch.float32).eps,
    ir.DataType.DOUBLE: torch.finfo(torch.float64).eps,
}
_TIES = 1e-3  # share of the integers that may lie one step off: values half-way between two, where runtimes differ


def local_problem(
    gm: torch.fx.GraphModule,
    node: torch.fx.Node,
    known: Mapping[torch.fx.Node, Any],
    want: Any,
    got: Any,
    parts: int,
    contract: Contract | None = Contract.ROUNDING,
) -> str | None:
    """Return how a value breaks what rounding explains, or None if it does not.

    Args:
        gm: The graph.
        node: The node that yields the value.
        known: What both started from: values by node, those of all placeholders among them.
        want: PyTorch's value.
        got: ONNX Runtime's.
        parts: Number of nodes that one kernel of ORT stands for. A fused integer kernel rounds once where they round
            several times, so that each result may lie one step off.
        contract: What the value must keep; None if it only has to have the same shape.
    """
    if contract is None or contract.kind != "ROUNDING":
        return _other_problem(want, got, contract)
    if want.shape != got.shape or want.dtype != got.dtype or torch.equal(want, got):
        return violation(Contract.EXACT, want, got)
    if not want.is_floating_point():
        return _integer_problem(want, got, fused=parts > 1)
    if surely_rounding(want, got, _FACTOR):
        return None
    precise = node_float64(gm, node, known)
    if not isinstance(precise, torch.Tensor) or precise.shape != want.shape:
        precise = want
    scale = float(want.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max())
    noise = max(measure(precise, want.to(precise.dtype)).max_abs, FLOOR_EPS * torch.finfo(want.dtype).eps * scale)
    if node.target in APPROXIMATED:
        noise += torch.finfo(want.dtype).eps * max(1.0, scale)
    return violation(Contract.ROUNDING, want, got, precise, noise)


def part_problem(
    want: torch.Tensor,
    got: torch.Tensor,
    parts: tuple[Slice, Slice],
    disturbed: Callable[[float], torch.Tensor],
    contract: Contract | None,
) -> str | None:
    """Return how a value breaks what rounding explains, or None if it does not.

    Args:
        want: What the right part yields.
        got: What the part that is judged yields, perhaps in another precision.
        parts: Both.
        disturbed: Gives what the right part yields if its operands are off by up to some eps.
        contract: What the value must keep; None if it only has to have the same shape.
    """
    if contract is None or contract.kind != "ROUNDING":
        return _other_problem(want, got, contract)
    both_float = want.is_floating_point() and got.is_floating_point()
    if want.shape != got.shape or (want.dtype != got.dtype and not both_float) or torch.equal(want, got):
        return violation(Contract.EXACT, want, got)
    fused = len(parts[0].nodes) > 1  # one kernel may stand for all of these, see above
    if not both_float:
        return _integer_problem(want, got, fused=fused)
    if surely_rounding(want, got, contract.factor):
        return None
    if (step := _step(parts[1])) is not None and bool(got.isfinite().all() and want.isfinite().all()):
        return _integer_problem((want / step).round(), (got / step).round(), fused=fused)
    eps = max(_coarsest_eps(part) for part in parts)
    wide = want.double()
    finite = wide[wide.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    noise = max(measure(want, disturbed(eps)).max_abs, FLOOR_EPS * eps * scale)
    if not _APPROXIMATED.isdisjoint(operator for part in parts for operator in part.operators):
        noise += eps * max(1.0, scale)
    return violation(contract, wide, got.double(), wide, min(noise, largest_noise(wide, wide, eps)))


def _step(part: Slice) -> float | None:
    """Return the step of the integers that a value is made of, if it is nothing but these in another form."""
    node = part.output.producer()
    scale = node.inputs[1] if node is not None and node.op_type == "DequantizeLinear" else None
    held = None if scale is None else scale.const_value
    return None if held is None or held.size != 1 else float(held.numpy().reshape(()))


def _coarsest_eps(part: Slice) -> float:
    known = {value.dtype for node in part.nodes for value in node.outputs}
    return max((eps for dtype, eps in _EPS.items() if dtype in known), default=torch.finfo(torch.float32).eps)


def _other_problem(want: Any, got: Any, contract: Contract | None) -> str | None:
    """Judge by a floor, bit for bit, or by nothing but the shape."""
    if want.shape != got.shape or (contract is not None and contract.kind == "EXACT"):
        return violation(Contract.EXACT, want, got)
    if contract is None or not (want.is_floating_point() and got.is_floating_point()):
        return None
    return violation(contract, want.double(), got.double())


def _integer_problem(want: torch.Tensor, got: torch.Tensor, *, fused: bool) -> str | None:
    steps = (want.long() - got.long()).abs()
    off = int((steps > 0).sum())
    if int(steps.max()) <= 1 and want.dtype is not torch.bool and (fused or off <= max(1, _TIES * want.numel())):
        return None
    return f"{off} of {want.numel()} elements differ, by up to {int(steps.max())} steps"
