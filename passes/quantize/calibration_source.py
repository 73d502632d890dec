"""Where a pass takes its calibration inputs from."""

from __future__ import annotations

from typing import Any

from fxopt.graph_module import CapturedModule

__all__ = ["calibration_of"]


def calibration_of(gm: CapturedModule) -> Any:
    """Return the calibration inputs that a graph carries, or its examples: what ``calibration_samples`` takes."""
    return gm.samples if gm.calibration is None else gm.calibration
