"""Split the error of what ONNX Runtime finally computes: what the passes cost, what the file costs, what fusion costs.

    float graph, eager     -> graph after the passes, eager     quantization, or what else the passes do
                           -> the file, ORT's optimizer off     the rest: other kernels, or a wrong translation
                           -> the file, ORT's optimizer on      fusion: what its optimizer makes of the file

The three differences of an output add up to its error, number by number.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from fxopt.dimensions import Sample
from fxopt.errors import InputError, describe
from fxopt.export.files import OnnxFile, loadable
from fxopt.export.session import Session
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.numerics import Errors, measure

__all__ = ["ErrorSplit", "split_error"]


@dataclasses.dataclass(frozen=True)
class ErrorSplit:
    """Where the error of one output comes from.

    Attributes:
        output: Its name.
        total: ORT, optimizer on, against the float graph.
        passes: The graph after the passes against the float graph, both in PyTorch.
        rest: ORT, optimizer off, against that graph in PyTorch.
        fusion: ORT with its optimizer on against off.
    """

    output: str
    total: Errors
    passes: Errors
    rest: Errors
    fusion: Errors

    def __str__(self) -> str:
        parts = {"total": self.total, "passes": self.passes, "rest": self.rest, "fusion": self.fusion}
        shown = (f"{name} {errors.max_abs:.2e} ({errors.sqnr_db:.0f} dB)" for name, errors in parts.items())
        return f"{self.output}: {', '.join(shown)}"


def split_error(
    model: OnnxFile | str | os.PathLike[str] | bytes,
    gm: CapturedModule,
    float_gm: CapturedModule,
    inputs: Any = None,
) -> tuple[ErrorSplit, ...]:
    """Return where the error of each floating-point output comes from, on one sample.

    Args:
        model: The ONNX model.
        gm: The graph that it was exported from, in eval mode.
        float_gm: The graph before the passes, in eval mode.
        inputs: A sample; the first of ``gm`` if not given.

    Raises:
        InputError: the two graphs have other outputs.
        ExportError: ORT refuses the model.
    """
    sample = Sample.of(inputs) if inputs is not None else gm.samples[0]
    source = loadable(model)
    before, after = (_outputs(graph, sample) for graph in (float_gm, gm))
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        raise InputError(
            describe(
                "the graphs before and after the passes have other outputs",
                got=", ".join(str(tuple(tensor.shape)) for tensor in after),
                wanted=", ".join(str(tuple(tensor.shape)) for tensor in before),
            )
        )
    leaves = gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    plain = Session(source, optimization="none")
    off, on = plain.run(tensors), Session(source).run(tensors)
    return tuple(
        ErrorSplit(name, measure(a, d), measure(a, b), measure(b, c), measure(c, d))
        for name, a, b, c, d in zip(plain.output_names, before, after, off, on, strict=False)
        if a.is_floating_point()
    )


def _outputs(gm: CapturedModule, sample: Sample) -> list[torch.Tensor]:
    copy = sample.clone()
    with isolated(gm):
        outputs = gm.flat_outputs(*copy.args, **dict(copy.kwargs))
    return [output for output in outputs if isinstance(output, torch.Tensor)]
