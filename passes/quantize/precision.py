"""How far a quantized graph is from its floats, as a metric: it asks for no labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.merged_rows import calibration_rows
from fxopt.passes.quantize.simulate import run_by_node, signal_to_noise

__all__ = ["Precision"]

_ROWS = 16  # of calibration inputs


class Precision:
    """Signal to quantization noise of the worst output, in dB, on the example inputs or on calibration inputs.

    Whichever is less: the contract of a pass is about the former, and the latter are what the user has more of.
    """

    def __init__(self, floats: CapturedModule, calibrated: CapturedModule) -> None:
        """Take the graph to compare with.

        Args:
            floats: The float graph.
            calibrated: A graph of the same inputs, with calibration inputs that can be read again.
        """
        sets: list[Sequence[Sample]] = [calibration_rows(calibrated, _ROWS), floats.samples]
        self._sets = [samples for samples in sets if samples]
        self._want = [run_by_node(floats, samples) for samples in self._sets]

    def __call__(self, model: Any) -> float:
        """Return it for another graph with the same inputs."""
        got = (run_by_node(model, samples) for samples in self._sets)
        return min(signal_to_noise(want, have) for want, have in zip(self._want, got, strict=True))
