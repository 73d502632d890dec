"""Run a model in eager mode without a trace of it left behind, and compare it with the graph that was made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.args import shape_text, source_line
from fxopt.dimensions import Sample
from fxopt.errors import CaptureError, describe
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.numerics import measure
from fxopt.trace_errors import user_location

__all__ = ["compare", "compare_other_ways", "difference", "run_eagerly"]


def run_eagerly(model: torch.nn.Module, sample: Sample) -> list[Any]:
    """Return the leaves of the model's outputs, leaving its buffers, the inputs and the random state as they were.

    Raises:
        CaptureError: the model raises on its own example inputs, or returns something that no graph can.
    """
    try:
        with isolated(model):
            copy = sample.clone()
            result = model(*copy.args, **copy.kwargs)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            describe(
                f"the model itself raises on the example inputs: {type(error).__name__}: {str(error)[:500]}",
                source=user_location(error),
                got=", ".join(shape_text(leaf) for leaf in sample.leaves()),
                try_="inputs with which model(*args, **kwargs) runs",
            )
        ) from error
    leaves = pytree.tree_leaves(result, is_leaf=lambda leaf: leaf is None)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, torch.Tensor | bool | int | float):
            raise CaptureError(
                describe(
                    "the model returns something that is neither a tensor nor a number",
                    got=f"{type(leaf).__name__} {leaf!r}"[:200],
                    wanted="tensors and numbers, in any nesting of tuples, lists, dicts and registered pytrees",
                )
            )
    return list(leaves)


def compare(gm: CapturedModule, model: torch.nn.Module, sample: Sample, want: Sequence[Any]) -> None:
    """Compare what the graph yields for a sample with what the model did.

    Raises:
        CaptureError: they differ by more than rounding.
    """
    if found := difference(gm, sample, want):
        index, problem, source = found
        again = run_eagerly(model, sample)[index]
        steady = isinstance(again, torch.Tensor) and _same_up_to_rounding(want[index], again)
        raise CaptureError(
            describe(
                f"the captured graph computes something else than the model: {problem}",
                source=source,
                because=None if steady else "the model itself gives another result each time it is run",
                try_="state that forward() keeps in Python (counters, caches) must become buffers or arguments",
            )
        )


def difference(gm: CapturedModule, sample: Sample, want: Sequence[Any]) -> tuple[int, str, str | None] | None:
    """Return the first output that differs from what is wanted by more than rounding: its number, how, and its line."""
    with isolated(gm):
        copy = sample.clone()
        got = gm.flat_outputs(*copy.args, **copy.kwargs)
    problem = None
    for index, (w, g) in enumerate(zip(want, got, strict=True)):
        if not isinstance(w, torch.Tensor):
            problem = None if w == g else f"got {g!r}, wanted {w!r}"
        elif w.shape != g.shape or w.dtype != g.dtype:
            problem = f"got {shape_text(g)}, wanted {shape_text(w)}"
        elif not _same_up_to_rounding(w, g):
            worst = measure(w, g).worst_flat
            problem = f"got {g.flatten()[worst].item()}, wanted {w.flatten()[worst].item()}"
        if problem:
            node = gm.graph.output_node().args[0][index]  # type: ignore[index]  # outputs are one tuple
            source = source_line(node) if isinstance(node, torch.fx.Node) else None
            return index, f"output {index}: {problem}", source
    return None


def _same_up_to_rounding(want: torch.Tensor, got: torch.Tensor) -> bool:
    if torch.equal(want, got):
        return True
    if not want.is_floating_point():
        return False
    scale = float(want.detach().nan_to_num().abs().max())
    same_holes = torch.equal(want.isnan(), got.isnan())
    return same_holes and measure(want, got).max_abs <= 64 * torch.finfo(want.dtype).eps * scale


def compare_other_ways(gm: CapturedModule, module: torch.nn.Module, samples: tuple[Sample, ...]) -> None:
    """Compare graph and model where branches may go another way: on the samples, smaller, larger and negated."""
    for sample in samples:
        for _, other in sample.other_ways():
            try:
                want = run_eagerly(module, other)
            except CaptureError:
                continue  # such inputs are none that the model takes
            compare(gm, module, other, want)
