"""The time of each operator of a file in ORT, by name, to colour a picture with."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Mapping

from fxopt.export.coverage_run import Inputs, drawn_inputs, kernel_times
from fxopt.export.files import OnnxFile, loadable
from fxopt.export.session import Session

__all__ = ["NodeTimes", "node_times"]


@dataclasses.dataclass(frozen=True)
class NodeTimes:
    """Times of operators.

    Attributes:
        ms: Median over the runs, in milliseconds, by the name of the node in the graph that the file was exported from,
            or of the operator in a file of others. A fused kernel has one of the names that it stands for.
        runs: Number of runs.
    """

    ms: Mapping[str, float]
    runs: int


def node_times(
    model: OnnxFile | str | os.PathLike[str] | bytes,
    inputs: Inputs | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    runs: int = 20,
    threads: int | None = None,
) -> NodeTimes:
    """Measure where the time of a model goes.

    A picture shows it: ``fxopt.view(gm, overlays={"time": node_times(file)})``.

    Args:
        model: The ONNX model, whoever made it.
        inputs: What to run on; drawn by ``sizes`` if not given, as :func:`fxopt.export.coverage` does.
        sizes: Lengths of dynamic axes by name; 1 for the others.
        runs: Number of runs.
        threads: Threads within one operator; ORT's choice if not given.

    Raises:
        ExportError: ORT cannot load or run the model.
        ValueError: ``runs`` is less than 1, or ``sizes`` names a size that the model does not have.
    """
    if runs < 1:
        raise ValueError(f"runs is {runs}; wanted 1 or more")
    source = loadable(model)
    if inputs is None:
        inputs = drawn_inputs(Session(source, optimization="none"), sizes)
    found: dict[str, list[float]] = {}
    for kernel, times in kernel_times(source, inputs, runs, threads):
        sums = found.get(kernel.origin.name, [0.0] * runs)
        found[kernel.origin.name] = [a + b for a, b in zip(sums, times, strict=True)]
    return NodeTimes({name: statistics.median(times) * 1e3 for name, times in found.items() if name}, runs)
