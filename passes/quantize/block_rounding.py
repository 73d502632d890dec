"""Round matrices that are stored in blocks by GPTQ, on what they are multiplied by in the calibration inputs.

Scales and zero points are those of the blocks as they are; GPTQ chooses the integers. A matrix is settled on inputs
that come through all matrices before it as these are stored.

Source: Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, Accurate Post-Training Quantization for Generative Pre-trained
Transformers, ICLR 2023; groups of columns with scales of their own: section 4, "grouping".
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.blocks import BlockWeight
from fxopt.passes.quantize.gptq import gptq_integers
from fxopt.passes.quantize.graph_walk import Walk, items_within
from fxopt.passes.quantize.matrix_uses import INPUT, MatrixUse
from fxopt.weight_only_ops import pack_bits, unpack_bits

__all__ = ["gptq_blocks", "rounded_by_gptq"]


def rounded_by_gptq(
    gm: CapturedModule,
    uses: Sequence[tuple[MatrixUse, BlockWeight]],
    data: Any,
    *,
    damping: float,
    megabytes: int,
) -> Mapping[MatrixUse, BlockWeight]:
    """Return the blocks of matrices with the integers that GPTQ chooses.

    Args:
        gm: The graph, in which nothing is stored in blocks yet.
        uses: Calls of the graph itself, in its order, each with the blocks of its matrix, rounded to nearest. A matrix
            that several calls read, or that rows are looked up of, keeps these.
        data: Calibration inputs; see :func:`fxopt.calibration_data.calibration_samples`.
        damping: See :func:`gptq_integers`.
        megabytes: Memory for the activations of the calibration inputs; it takes in as many inputs as fit.

    Raises:
        CalibrationError: the data are empty or do not fit the graph.
    """
    readers = Counter(id(held) for _, held in uses)  # by what is stored: a matrix may have several names
    walk = Walk(gm, items_within(gm, data, megabytes), [])
    found: dict[MatrixUse, BlockWeight] = {}
    with torch.no_grad():
        for use, held in uses:
            walk.advance(use.call, past=False)
            matrix = walk.values(use.operand)[0]
            settled = held
            if use.call.target in INPUT and readers[id(held)] == 1:
                hessian = _hessian(walk.values(use.input))
                settled = gptq_blocks(use.as_read(matrix), held, hessian, damping=damping)
                found[use] = settled
            walk.set_constant(use.operand, use.as_read(settled.floats()))
    return found


def gptq_blocks(weight: torch.Tensor, held: BlockWeight, hessian: torch.Tensor, *, damping: float = 0.1) -> BlockWeight:
    """Return ``held`` with other integers: in each row the error at the output is at most that of rounding to nearest.

    Args:
        weight: f32[out, in], that ``held`` stands for.
        held: It in blocks.
        hessian: ``2 sum x x^T`` of what it is multiplied by, f64[in, in].
        damping: See :func:`gptq_integers`.
    """
    blocks = held.scales.shape[1]
    missing = blocks * held.block_size - held.features_in
    if held.zero_points is None:
        zero_points = torch.full_like(held.scales, 2 ** (held.bits - 1))
    else:
        zero_points = unpack_bits(held.zero_points, held.bits, blocks).float()
    integers = gptq_integers(
        F.pad(weight, (0, missing)),
        F.pad(hessian, (0, missing, 0, missing)),
        held.scales,
        0,
        2**held.bits - 1,
        zero_point=zero_points,
        damping=damping,
    )
    codes = integers.to(torch.uint8).unflatten(1, (blocks, held.block_size))
    return dataclasses.replace(held, packed=pack_bits(codes, held.bits))


def _hessian(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    size = inputs[0].shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64)
    for x in inputs:
        rows = x.reshape(-1, size).double()
        total.addmm_(rows.t(), rows, alpha=2)
    return total
