"""How far the value of one node may be from PyTorch's when both start from the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxopt.contracts import Contract
from fxopt.export.kernel_noise import APPROXIMATED
from fxopt.numerics import measure, node_float64, surely_rounding, violation

__all__ = ["local_problem"]

_FACTOR = Contract.ROUNDING.factor
_TIES = 1e-3  # share of the integers that may lie one step off: values half-way between two, where runtimes differ


def local_problem(
    gm: torch.fx.GraphModule, node: torch.fx.Node, known: Mapping[torch.fx.Node, Any], want: Any, got: Any, parts: int
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
    """
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
    noise = max(measure(precise, want.to(precise.dtype)).max_abs, 4 * torch.finfo(want.dtype).eps * scale)
    if node.target in APPROXIMATED:
        noise += torch.finfo(want.dtype).eps * max(1.0, scale)
    return violation(Contract.ROUNDING, want, got, precise, noise)


def _integer_problem(want: torch.Tensor, got: torch.Tensor, *, fused: bool) -> str | None:
    steps = (want.long() - got.long()).abs()
    off = int((steps > 0).sum())
    if int(steps.max()) <= 1 and want.dtype is not torch.bool and (fused or off <= max(1, _TIES * want.numel())):
        return None
    return f"{off} of {want.numel()} elements differ, by up to {int(steps.max())} steps"
