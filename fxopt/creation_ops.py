"""fxopt's operators that make tensors whose size is dynamic.

``fxopt::linspace(start, end, steps, *, dtype, device)``
    What ``aten::linspace`` yields, whose own number of steps is a plain number. f32[steps], or of ``dtype``, a float
    type; ``start`` and ``end`` are numbers.
"""

from __future__ import annotations

import torch

__all__ = ["LINSPACE"]

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(
    "linspace(Scalar start, Scalar end, SymInt steps, *, ScalarType? dtype=None, Device? device=None) -> Tensor"
)


def _linspace(
    start: float, end: float, steps: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> torch.Tensor:
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(steps, dtype=dtype, device=device)
    return torch.linspace(start, end, int(steps), dtype=dtype, device=device)


_LIBRARY.impl("linspace", _linspace, "BackendSelect")  # it has no tensor whose device would say which kernel to take

LINSPACE = torch.ops.fxopt.linspace.default
