"""Run calibration inputs of few rows together, and those of many in parts: as many numbers in fewer or shorter runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxopt.calibration_data import calibration_of, calibration_samples
from fxopt.dimensions import Sample
from fxopt.graph_module import CapturedModule

__all__ = [
    "LeftOut", "MergedRows", "calibration_rows", "first_rows", "halved_rows", "merged_rows", "regrouped_rows",
    "row_count",
]  # fmt: skip


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


def calibration_rows(gm: CapturedModule, rows: int) -> list[Sample]:
    """Return the first calibration inputs of a graph that have so many rows together, merged where it allows that."""
    return merged_rows(gm, list(first_rows(calibration_samples(gm, calibration_of(gm)), rows)))


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


def regrouped_rows(gm: CapturedModule, samples: list[Sample], most: int) -> list[Sample]:
    """Return all rows of the samples in as few samples of at most ``most`` rows as the graph allows.

    A sample whose rows the graph does not let apart stays as it is.
    """
    found: list[Sample] = []
    for sample in merged_rows(gm, samples):
        count = row_count(sample)
        found += _parts(gm, sample, [*range(0, count, most), count]) if count > most else [sample]
    return found


def halved_rows(gm: CapturedModule, sample: Sample, most: int) -> list[Sample]:
    """Return the first rows of a sample as two samples, where the graph takes any number of rows; else itself.

    Args:
        gm: The graph.
        sample: The sample.
        most: How many rows the two may have together.
    """
    count = min(most, row_count(sample))
    return _parts(gm, sample, [0, (count + 1) // 2, count]) if count > 1 else [sample]


def _parts(gm: CapturedModule, sample: Sample, ends: Sequence[int]) -> list[Sample]:
    """Return the rows of a sample from each end to the next; itself where the graph does not take so few."""
    rows = _rows_of(gm)
    slices = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
    if rows is None or not all(gm.dims[rows].allows(part.stop - part.start) for part in slices):
        return [sample]
    leaves = gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
    found = []
    for part in slices:
        some = list(leaves)
        for place in _tensors(gm):
            some[place] = leaves[place][part]
        found.append(sample.with_leaves(some))
    return found


def _rows_of(gm: CapturedModule) -> str | None:
    """Return the name of the size that is the number of rows of every input, or None if there is none."""
    sizes = {spec.shape[0] if spec.shape else None for spec in gm.inputs if spec.is_tensor}
    rows = next(iter(sizes)) if len(sizes) == 1 else None
    return rows if isinstance(rows, str) and rows in gm.dims else None


def _tensors(gm: CapturedModule) -> list[int]:
    return [place for place, spec in enumerate(gm.inputs) if spec.is_tensor]
