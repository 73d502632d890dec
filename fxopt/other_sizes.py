"""Compare a captured graph with its model where dynamic sizes are others than those of the examples.

torch takes a dynamic size for more than 1, and traces what the model does there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from fxopt.dimensions import Dimension
from fxopt.eager import difference, run_eagerly
from fxopt.errors import CaptureError, describe
from fxopt.graph_module import CapturedModule

__all__ = ["OtherSizesError", "compare_other_sizes"]


class OtherSizesError(CaptureError):
    """The graph does something else than the model for some sizes.

    Attributes:
        sizes: Those of the dynamic dimensions, by name.
    """

    def __init__(self, sizes: Mapping[str, int], dims: Mapping[str, Dimension], **rows: str | None) -> None:
        self.sizes, self._dims, self._rows = dict(sizes), dims, rows
        told = " and ".join(f"{name} is {size}" for name, size in sizes.items())
        super().__init__(
            describe(
                f"the captured graph does something else than the model where {told}",
                **rows,
                try_=f"in dynamic_shapes, {_range_without(sizes, dims)}, or leave that axis out",
            )
        )

    def because(self, reason: str) -> OtherSizesError:
        """Return this error with what stands in the way of a graph that does the same."""
        return OtherSizesError(self.sizes, self._dims, **{**self._rows, "because": reason})


def _range_without(sizes: Mapping[str, int], dims: Mapping[str, Dimension]) -> str:
    name, size = next(iter(sizes.items()))  # where two together differ, one without its size is enough
    if size > 1:
        return f"a range of {name!r} without {size}"
    return f"'{dataclasses.replace(dims[name], min=size + 1)}' in place of '{dims[name]}'"


def compare_other_sizes(gm: CapturedModule, model: torch.nn.Module, *, any_sizes: bool) -> None:
    """Compare graph and model for sizes 0 and 1 of each dynamic axis, and for 1 of all.

    Args:
        gm: The graph.
        model: What it was captured from.
        any_sizes: Whether torch was not asked what the sizes are, so that a few more are to be compared.

    Raises:
        OtherSizesError: they differ, or the graph does not run where the model does.
    """
    for sizes in _other_sizes(gm, any_sizes=any_sizes):
        if all(gm.dims[name].allows(size) for name, size in sizes.items()):
            _compare_resized(gm, model, sizes)


def _other_sizes(gm: CapturedModule, *, any_sizes: bool) -> Iterator[dict[str, int]]:
    sample = gm.samples[0]
    now = gm.sizes_of(gm.flatten_inputs(*sample.args, **sample.kwargs))
    for name, size in now.items():
        more = {2, size + 1, 2 * size - 1} if any_sizes else set()
        yield from ({name: other} for other in sorted({0, 1} | more) if other != size)
    if len(now) > 1:
        yield dict.fromkeys(now, 1)


def _compare_resized(gm: CapturedModule, model: torch.nn.Module, sizes: dict[str, int]) -> None:
    sample = gm.resized(sizes)
    try:
        want = run_eagerly(model, sample)
    except CaptureError:
        return  # the model does not take these sizes
    try:
        found = difference(gm, sample, want)
    except Exception as error:
        if 0 in sizes.values():
            return  # of no rows an error is as good an answer as any
        raise OtherSizesError(sizes, gm.dims, got=f"{type(error).__name__}: {str(error)[:300]}") from error
    if found:
        raise OtherSizesError(sizes, gm.dims, source=found[2], got=found[1])
