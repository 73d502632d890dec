"""Run calibration inputs of few rows together: as many numbers in fewer runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxopt.calibration_data import calibration_samples
from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule

__all__ = ["LeftOut", "MergedRows", "first_rows", "halved_rows", "merged_rows", "row_count"]


class MergedRows:
    """Calibration inputs, neighbours of the same shape merged to at most ``most`` rows where the graph allows it.

    To be iterated over as often as the data can be.
    """

    def __init__(self, gm: CapturedModule, data: Any, most: int) -> None:
        self.gm, self.data, self.most = gm, data, most

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples."""
        held: list[Sample] = []
        for sample in calibration_samples(self.gm, self.data):
            if held and sum(map(row_count, held)) + row_count(sample) > self.most:
                yield from merged_rows(self.gm, held)
                held = []
            held.append(sample)
        yield from merged_rows(self.gm, held)


class LeftOut:
    """Calibration inputs without those from one number on to before another, and others in their place, if any.

    To be iterated over as often as the data can be.
    """

    def __init__(self, gm: CapturedModule, data: Any, start: int, stop: int, *, instead: Sequence[Sample] = ()) -> None:
        self.gm, self.data, self.start, self.stop, self.instead = gm, data, start, stop, instead

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples."""
        yield from self.instead
        for number, sample in enumerate(calibration_samples(self.gm, self.data)):
            if not self.start <= number < self.stop:
                yield sample


def row_count(sample: Sample) -> int:
    """Return the size of the first axis of the first tensor that has axes, or 1."""
    tensors = (leaf for leaf in sample.leaves() if isinstance(leaf, torch.Tensor) and leaf.ndim)
    return next((int(tensor.shape[0]) for tensor in tensors), 1)


def first_rows(samples: Iterator[Sample], rows: int) -> Iterator[Sample]:
    """Yield samples until they have so many rows together."""
    for sample in samples:
        yield sample
        rows -= row_count(sample)
        if rows <= 0:
            return


def merged_rows(gm: CapturedModule, samples: list[Sample]) -> list[Sample]:
    """Return the samples as one, its rows all of theirs, where the graph takes any number of rows; else themselves."""
    rows = _rows_of(gm)
    if rows is None or len(samples) < 2:
        return samples
    leaves = [gm.flatten_inputs(*sample.args, **dict(sample.kwargs)) for sample in samples]
    tensors = _tensors(gm)
    alike = len({tuple(one[place].shape[1:] for place in tensors) for one in leaves}) == 1
    total = sum(int(one[tensors[0]].shape[0]) for one in leaves)
    if not alike or not gm.dims[rows].allows(total):
        return samples
    together = list(leaves[0])
    for place in tensors:
        together[place] = torch.cat([one[place] for one in leaves])
    return [samples[0].with_leaves(together)]


def halved_rows(gm: CapturedModule, sample: Sample, most: int) -> list[Sample]:
    """Return the first rows of a sample as two samples, where the graph takes any number of rows; else itself.

    Args:
        gm: The graph.
        sample: The sample.
        most: How many rows the two may have together.
    """
    rows = _rows_of(gm)
    if rows is None:
        return [sample]
    count = min(most, row_count(sample))
    middle = (count + 1) // 2
    if count < 2 or not gm.dims[rows].allows(middle) or not gm.dims[rows].allows(count - middle):
        return [sample]
    leaves = gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
    halves = []
    for part in (slice(0, middle), slice(middle, count)):
        half = list(leaves)
        for place in _tensors(gm):
            half[place] = leaves[place][part]
        halves.append(sample.with_leaves(half))
    return halves


def _rows_of(gm: CapturedModule) -> str | None:
    """Return the name of the size that is the number of rows of every input, or None if there is none."""
    sizes = {spec.shape[0] if spec.shape else None for spec in gm.inputs if spec.is_tensor}
    rows = next(iter(sizes)) if len(sizes) == 1 else None
    return rows if isinstance(rows, str) and rows in gm.dims else None


def _tensors(gm: CapturedModule) -> list[int]:
    return [place for place, spec in enumerate(gm.inputs) if spec.is_tensor]
