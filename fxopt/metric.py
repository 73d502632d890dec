"""Ask the user's metric how good a graph is, and take nothing but a number for an answer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch

from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated

__all__ = ["Metric", "measured"]

Metric = Callable[[Callable[..., Any]], float]
"""Takes what is called as the model is, and returns how good it is: higher is better."""


def measured(
    metric: Metric, gm: CapturedModule, what: str, *, of: str = "quantize", model: Callable[..., Any] | None = None
) -> float:
    """Return the metric of a graph, which runs without gradients and with a fixed random state.

    Args:
        metric: See :data:`Metric`.
        gm: The graph.
        what: What the graph is, for the message of an error.
        of: The pass that asks.
        model: What runs the graph in its place, if not the graph itself.

    Raises:
        TypeError: the metric returns no number.
        ValueError: it returns NaN.
        Exception: whatever the metric raises, with a note.
    """
    try:
        with isolated(gm):
            found = metric(gm if model is None else model)
    except Exception as error:
        error.add_note(f"in the metric of {of}, called on {what}")
        raise
    if isinstance(found, torch.Tensor) and found.numel() == 1:
        found = found.item()
    if not isinstance(found, numbers.Real) or isinstance(found, bool):
        raise TypeError(f"the metric returned a {type(found).__name__} for {what}; wanted a number, higher for better")
    if math.isnan(found):
        raise ValueError(f"the metric returned NaN for {what}; wanted a number, higher for better")
    return float(found)
