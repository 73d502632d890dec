"""Operators that cut their input off at one or two numbers: relu, relu6, hardtanh, clamp."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.args import arg

__all__ = ["LIMITS", "limits_of"]

aten = torch.ops.aten

LIMITS: dict[Any, tuple[str | float | None, str | float | None]] = {
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.clip.default: ("min", "max"),
    aten.clamp_min.default: ("min", None),
    aten.clamp_max.default: (None, "max"),
}
"""Operator: the arguments or numbers that are its smallest and its largest result; None where there is no end."""


def limits_of(node: torch.fx.Node) -> tuple[float | None, float | None] | None:
    """Return the smallest and largest result of a call of ``LIMITS``, None for no end.

    None if it is another call, or an end is not known before the graph runs.
    """
    if node.op != "call_function" or node.target not in LIMITS:
        return None
    low, high = (arg(node, entry) if isinstance(entry, str) else entry for entry in LIMITS[node.target])
    if not all(end is None or isinstance(end, int | float) for end in (low, high)):
        return None
    return None if low is None else float(low), None if high is None else float(high)
