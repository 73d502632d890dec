"""The labels as an argument of the merged graph: which of their sizes are dynamic, and the example for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.args import shape_text
from fxopt.errors import PassError, describe
from fxopt.functionalize import fake_mode_of
from fxopt.graph_module import CapturedModule, size_of, size_text
from fxopt.rewriter import Rewriter

__all__ = ["add_labels", "example_sizes", "labels_of_samples"]


def labels_of_samples(gm: CapturedModule, labels: Any) -> list[torch.Tensor]:
    """Return the example labels of each sample of a graph.

    Args:
        gm: The graph.
        labels: A tensor, or a list of them, one for each sample.

    Raises:
        TypeError: they are no tensors.
        PassError: there is another number of them than of samples.
    """
    listed = list(labels) if isinstance(labels, list | tuple) else [labels]
    wrong = [type(item).__name__ for item in listed if not isinstance(item, torch.Tensor)]
    if wrong:
        raise TypeError(f"labels are {wrong[0]}; wanted a tensor, or a list of tensors, one for each sample")
    if len(listed) != len(gm.samples):
        raise PassError(
            describe(
                "there is another number of example labels than of samples",
                got=f"{len(listed)} labels",
                wanted=f"{len(gm.samples)}",
            )
        )
    return listed


def add_labels(
    rw: Rewriter, examples: Sequence[torch.Tensor], like: torch.Tensor, class_axis: int | None, *, why: str
) -> torch.fx.Node:
    """Add the argument ``labels``.

    Args:
        rw: Of the graph.
        examples: The labels of each sample.
        like: The value that they belong to. Labels of its rank have its sizes; labels of one axis less have them
            without the axis of the classes; others share its first axis, and are of fixed size along all others.
        class_axis: Axis of the classes, from 0.
        why: Reason, for the report.

    Raises:
        PassError: an example has another size than the value has on its sample.
    """
    first = examples[0]
    if first.ndim == like.ndim:
        sizes: list[Any] = list(like.shape)
    elif class_axis is not None and first.ndim == like.ndim - 1:
        sizes = [size for axis, size in enumerate(like.shape) if axis != class_axis]
    else:
        sizes = [*like.shape[:1], *first.shape[1:]] if first.ndim else []
    for index, example in enumerate(examples):
        wanted = example_sizes(rw.gm, sizes, index)
        if list(example.shape) != wanted or example.dtype != first.dtype:
            raise PassError(
                describe(
                    f"the labels of sample {index} do not fit it",
                    got=shape_text(example),
                    wanted=f"{shape_text(first.new_empty(()))[:-2]}{wanted}",
                    because=f"they belong to {shape_text(like, rw.gm.symbol_names)}",
                )
            )
    mode = fake_mode_of(rw.gm.graph)
    with mode:
        fake = torch.empty(sizes, dtype=first.dtype, device=first.device)
    node: torch.fx.Node = rw.add_argument("labels", fake, list(examples), why=why)
    return node


def example_sizes(gm: CapturedModule, sizes: Sequence[Any], sample: int = 0) -> list[int]:
    """Return sizes, which may be symbolic, as they are for one of the graph's samples."""
    given = gm.samples[sample]
    leaves = [leaf for leaf, spec in zip(given.leaves(), gm.inputs, strict=True)]
    known = gm.sizes_of(leaves)
    return [size if isinstance(size, int) else size_of(size_text(size, gm.symbol_names), known) for size in sizes]
