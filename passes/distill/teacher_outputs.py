"""What a teacher yields at the values that losses compare: run it once for all data, and train without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fxopt.args import shape_text
from fxopt.dimensions import Sample
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.distill.teacher import matching_inputs
from fxopt.rewriter import Rewriter

__all__ = ["all_outputs", "on_first_sample", "outputs", "tapped"]


def tapped(gm: CapturedModule, taps: Mapping[str, torch.fx.Node]) -> CapturedModule:
    """Return the part of a graph that yields these of its values, as ``{name: value}``."""
    rw = Rewriter(gm.clone(), "merge-teacher")
    nodes = {node.name: node for node in rw.gm.graph.nodes}
    rw.set_outputs({name: nodes[node.name] for name, node in taps.items()}, (), why="what the losses compare")
    rw.finish()
    return rw.gm


def on_first_sample(gm: CapturedModule, taps: Mapping[str, torch.fx.Node]) -> dict[str, torch.Tensor]:
    """Return what nodes of a graph yield for its first sample; nothing of the run is left behind."""
    part = tapped(gm, taps)
    sample = gm.samples[0].clone()
    with isolated(part):
        return part(*sample.args, **sample.kwargs)  # type: ignore[no-any-return]  # a dict, by what tapped() made of it


def outputs(teacher: CapturedModule, student: CapturedModule, sample: Sample) -> dict[str, torch.Tensor]:
    """Return what a tapped teacher yields for inputs of the student."""
    match = matching_inputs(teacher, student)
    given = dict(zip((spec.name for spec in student.inputs), sample.leaves(), strict=True))
    leaves = [given[match[spec.name]].to(spec.dtype) if spec.is_tensor else spec.constant for spec in teacher.inputs]
    own = teacher.samples[0].with_leaves(leaves)
    with torch.no_grad():
        return teacher(*own.args, **own.kwargs)  # type: ignore[no-any-return]  # a dict, by what tapped() made of it


def all_outputs(teacher: CapturedModule, student: CapturedModule, samples: Iterable[Sample]) -> dict[str, torch.Tensor]:
    """Return what a tapped teacher yields for all samples, joined along axis 0.

    Raises:
        PassError: the values of two samples differ in size along another axis.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for sample in samples:
        for name, tensor in outputs(teacher, student, sample).items():
            first = parts.setdefault(name, [])
            if first and first[0].shape[1:] != tensor.shape[1:]:
                raise PassError(
                    describe(
                        f"the teacher's {name!r} has two sizes, and cannot be one tensor for all data",
                        got=f"{shape_text(first[0])} and {shape_text(tensor)}",
                        try_="batches of one size behind axis 0: pad them alike",
                    )
                )
            first.append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
