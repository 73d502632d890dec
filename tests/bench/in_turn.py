"""Time two sessions in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from torch import Tensor

from fxopt.export import Session


def in_turn(sessions: Sequence[Session], x: Tensor, runs: int) -> tuple[float, float, float]:
    """Return the median microseconds of two sessions of one input, and the median of first over second."""
    feeds = {sessions[0].ort.get_inputs()[0].name: x.numpy()}
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(runs):
        for which in (0, 1) if run % 2 else (1, 0):
            started = time.perf_counter()
            sessions[which].ort.run(None, feeds)
            times[which].append((time.perf_counter() - started) * 1e6)
    ratio = statistics.median(first / second for first, second in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio
