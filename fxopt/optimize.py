"""The front door: ``fxopt.optimize``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from fxopt.capture import capture
from fxopt.graph_module import CapturedModule
from fxopt.judge import Check
from fxopt.manager import PassManager

__all__ = ["optimize"]


def optimize(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., Any],
    passes: str | Iterable[Any] | None = None,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    modes: Literal["both", "current"] = "both",
    calibration: Any = None,
    strict: bool = False,
    check: Check = "all",
    keep_graphs: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> CapturedModule:
    """Capture ``model``, run passes over its graph, and return the graph with its ``report``.

    The model itself is left alone, but for the parameters that the graph shares with it.

    Args:
        model: A module, a GraphModule, an ExportedProgram, a function of tensors, or an already captured graph.
        passes: Names with options, pass instances, torch passes, functions of a GraphModule, or one comma-separated
            text. If not given, ``fxopt.passes.DEFAULT``: the lossless clean-up.
        example_inputs: See :func:`fxopt.capture`.
        dynamic_shapes: See :func:`fxopt.capture`.
        modes: See :func:`fxopt.capture`; ``"current"`` saves half of the tracing of what is only to be deployed.
        calibration: Inputs that passes may measure on: any iterable of tensors, tuples, dicts or ``(input, label)``
            pairs, of any batch size that the graph allows, or a function that returns one. The example inputs are
            taken if not given.
        strict: Raise at the first pass that fails or breaks its contract, instead of leaving it out of the result.
        check: How much to run for checking: ``"all"``, ``"samples"`` or ``"off"``. See :class:`fxopt.PassManager`.
        keep_graphs: Keep the graph before the first pass and after each in ``report.graphs``: :func:`fxopt.view` shows
            what each pass did.
        progress: Called before each pass with its index, the number of passes, and its name.

    Raises:
        CaptureError: the model cannot become one graph.
        PassError: a pass or an option is unknown, the order is impossible, or, with ``strict``, a pass failed.
    """
    if passes is None:
        passes = importlib.import_module("fxopt.passes").DEFAULT
    # A misspelt pass must fail before minutes of tracing, so the list is read first.
    manager = PassManager(passes, strict=strict, check=check, keep_graphs=keep_graphs, progress=progress)
    gm = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, modes=modes)
    if calibration is not None:
        gm = gm.clone()  # a graph that was given captured is the user's
        gm.calibration = calibration
    return manager.run(gm)
