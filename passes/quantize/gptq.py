"""Round weights so that the errors of some make up for those of others: GPTQ.

    before:  y = linear(x, w)
    after:   y = linear(x, q s)         q integers of the plan, s its scales: InsertQdq rounds q s to q

One column of a weight after the other is rounded to nearest, and what that costs at the output is spread over the
columns that are still to come, in the proportion that the inputs of calibration ask for. The inputs are those that the
layer gets where all layers before it are quantized and settled already. A channel for which the result is no better
than rounding to nearest keeps the latter.

Source: Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, Accurate Post-Training Quantization for Generative Pre-trained
Transformers, ICLR 2023.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.calibration_data import calibration_of
from fxopt.passes.quantize.layer_inputs import PlannedLayer, planned_layers
from fxopt.passes.quantize.planned_pass import PlannedPass
from fxopt.rewriter import Rewriter

__all__ = ["Gptq", "gptq_integers", "layer_hessian"]

_LAZY = 128  # columns after which the rest of the matrix is brought up to date at once


@dataclasses.dataclass(frozen=True)
class Gptq(PlannedPass):
    """Put the weights of a plan on its grid by GPTQ. Runs before :class:`InsertQdq` with the same plan.

    Attributes:
        plan: ``{node: QuantSpec}`` with scales.
        target: Name of the runtime that the plan was made for.
        damping: What is added to the diagonal of the Hessian, as a share of its mean.
        by_activation: Round the columns first whose inputs are largest.
        megabytes: Memory for the activations of the calibration inputs; it takes in as many inputs as fit.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB.
    """

    name: ClassVar[str] = "gptq"
    damping: float = 0.01
    by_activation: bool = True
    megabytes: int = 2048

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}; wanted above 0, or the Hessian may have no inverse")

    def run(self, rw: Rewriter) -> None:
        """Replace the weights.

        Raises:
            PassError: the graph is quantized or in train mode, or the plan does not fit it.
            CalibrationError: the calibration data do not fit.
        """
        layers = planned_layers(
            rw, self.plan, self.target, calibration_of(rw.gm), megabytes=self.megabytes, with_targets=False
        )
        for layer, settle in layers:
            if layer.on_grid:
                continue
            low, high = layer.spec.limits
            integers = gptq_integers(
                layer.weight,
                layer_hessian(layer),
                layer.scale,
                low,
                high,
                damping=self.damping,
                by_activation=self.by_activation,
            )
            settle(integers, by="GPTQ")


def layer_hessian(layer: PlannedLayer) -> torch.Tensor:
    """Return ``2 sum x x^T`` over the rows that a layer reads, f64[groups, in, in]."""
    size = layer.weight.shape[-1]
    total = torch.zeros(layer.weight.shape[0], size, size, dtype=torch.float64)
    for x in layer.inputs:
        for rows in layer.layout.row_chunks(x):
            total += torch.bmm(rows.transpose(1, 2), rows)
    return total * 2


def gptq_integers(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    zero_point: torch.Tensor | None = None,
    damping: float = 0.01,
    by_activation: bool = True,
) -> torch.Tensor:
    """Return the integers of a weight that GPTQ chooses, as float32 numbers of its shape.

    Args:
        weight: f32[..., out, in].
        hessian: ``2 sum x x^T`` of its inputs, f64[..., in, in], positive semidefinite.
        scale: Units per step, not 0: f32[..., out], or f32[..., out, blocks] for blocks of ``in / blocks`` columns.
        qmin: Smallest integer.
        qmax: Largest integer.
        zero_point: The integers that stand for 0, shaped like ``scale``; 0 if None.
        damping: What is added to the diagonal, as a share of its mean.
        by_activation: Take the columns in the order of the diagonal, largest first, instead of as they lie.

    In each row of the weight the error ``e H e^T`` of the result is at most that of rounding to nearest. A column that
    only zeros are multiplied by is rounded to nearest.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    columns = weight.shape[-1]
    if hessian.shape != (*weight.shape[:-2], columns, columns):
        raise ValueError(f"a Hessian {tuple(hessian.shape)} does not fit a weight {tuple(weight.shape)}")
    step = _by_column(scale, weight).double()
    offset = torch.zeros_like(step) if zero_point is None else _by_column(zero_point, weight).double()
    floats = weight.double()
    nearest = (torch.round(floats / step) + offset).clamp(qmin, qmax)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True) if by_activation else _in_place(diagonal)

    def sorted_(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.gather(-1, order[..., None, :].expand_as(matrix))

    factor = _inverse_factor(sorted_(sorted_(hessian).transpose(-2, -1)), damping)
    chosen = _rounded(sorted_(floats), factor, sorted_(step), sorted_(offset), qmin, qmax)
    back = order.argsort(-1)[..., None, :].expand_as(chosen)
    chosen = chosen.gather(-1, back)
    better = _loss(chosen, floats, step, offset, hessian) < _loss(nearest, floats, step, offset, hessian)
    return torch.where(better[..., None], chosen, nearest).float()


def _by_column(parameter: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the scale or zero point of each element of the weight."""
    blocked = parameter[..., None] if parameter.ndim == weight.ndim - 1 else parameter
    blocks = blocked.shape[-1]
    if blocked.shape[:-1] != weight.shape[:-1] or blocks == 0 or weight.shape[-1] % blocks:
        raise ValueError(f"scales {tuple(parameter.shape)} do not fit a weight {tuple(weight.shape)}")
    return blocked.repeat_interleave(weight.shape[-1] // blocks, -1)


def _in_place(diagonal: torch.Tensor) -> torch.Tensor:
    return torch.arange(diagonal.shape[-1]).expand(diagonal.shape)


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian: row i serves for column i."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    added = (damping * diagonal.mean(-1, keepdim=True)).expand_as(diagonal)
    unread = diagonal == 0  # nothing depends on such a column, but the matrix needs an inverse
    damped = hessian + torch.diag_embed(torch.where(unread, 1.0, added))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _rounded(
    weight: torch.Tensor, factor: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    """Round column after column (algorithm 1 of the paper)."""
    left = weight.clone()
    chosen = torch.empty_like(weight)
    columns = weight.shape[-1]
    for start in range(0, columns, _LAZY):
        end = min(start + _LAZY, columns)
        errors = torch.empty_like(left[..., start:end])
        for i in range(start, end):
            integers = (torch.round(left[..., i] / step[..., i]) + offset[..., i]).clamp(qmin, qmax)
            chosen[..., i] = integers
            missing = left[..., i] - (integers - offset[..., i]) * step[..., i]
            error = missing / factor[..., i, i, None]
            errors[..., i - start] = error
            left[..., i:end] -= error[..., None] * factor[..., None, i, i:end]
        left[..., end:] -= errors @ factor[..., start:end, end:]
    return chosen


def _loss(
    integers: torch.Tensor, weight: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    error = (integers - offset) * step - weight
    return ((error @ hessian) * error).sum(-1)
