"""Scales of weights of few terms, chosen by what rounding leaves of the result.

    before:  s = max |w| / 127
    after:   s = argmin (q s - w)^T C (q s - w)      q = round(w / s), C the covariance of what is multiplied by w

The error of a channel is a sum over its terms. Over the nine of a depthwise convolution it is a matter of
chance, and of some dozens of steps one leaves a fraction of it: best where neighbours are alike, of which errors of one
sign take away what those of the other add. The mean of an error is left to the bias
(:mod:`fxopt.passes.quantize.correct_bias`), but not all of it, for a bias may stay as it is.

Sources: Nahshan et al., Loss Aware Post-Training Quantization, 2019 (steps by their loss rather than by the range);
Frantar et al., GPTQ, ICLR 2023, equation 1 (that loss of a layer).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fxopt.graph_module import CapturedModule
from fxopt.passes.quantize.layer_matrix import LayerMatrix
from fxopt.passes.quantize.layout import input_of
from fxopt.passes.quantize.placement import Site, integer_sites
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.weights import constant_of

__all__ = ["Moments", "WindowMoments", "searched_scales"]

_MOST_TERMS = 64
_POSITIONS = 8  # of a row, or a few more: a covariance of few terms needs no more
_FACTORS = torch.linspace(1.0, 1.3, 61, dtype=torch.float64)  # of the step for the largest weight
_TOGETHER = 2**20  # terms of a weight, times steps, that are tried at once
_OF_MEAN = 0.1  # of the error of the mean that counts


@dataclasses.dataclass(frozen=True)
class Moments:
    """What the weight of a layer is multiplied by.

    Attributes:
        layout: The layer as a product of matrices.
        mean: f64[groups, in].
        covariance: f64[groups, in, in].
    """

    layout: LayerMatrix
    mean: torch.Tensor
    covariance: torch.Tensor

    def losses(self, errors: torch.Tensor) -> torch.Tensor:
        """Return the squared error of the result for errors of the weight, f64[groups, ..., in]."""
        flat = errors.flatten(1, -2)
        spread = (torch.bmm(flat, self.covariance) * flat).sum(-1)
        shifted = torch.bmm(flat, self.mean[..., None]).squeeze(-1)
        return (spread + _OF_MEAN * shifted.square()).reshape(errors.shape[:-1])


class WindowMoments:
    """The moments of what layers of few terms read, gathered value by value."""

    def __init__(self, gm: CapturedModule, target: Target) -> None:
        self._layouts: dict[str, list[LayerMatrix]] = {}
        self._known: dict[str, tuple[int, Moments]] = {}
        for site in integer_sites(gm.graph, target, {}):
            if site.weight is not None and site.is_layer:
                weight = constant_of(site.weight)
                if _has_few_terms(site, weight):
                    self._layouts.setdefault(input_of(site).name, []).append(LayerMatrix.of(site, weight))

    def add(self, node: torch.fx.Node, value: Any) -> None:
        """Take in what a node of the graph, or of a copy, yields for one input."""
        for layout in self._layouts.get(node.name, []):
            rows = layout.some_rows(value, _POSITIONS).float()
            if count := rows.shape[1]:
                mean = rows.mean(1, keepdim=True)
                apart = rows - mean
                spread = torch.bmm(apart.transpose(1, 2), apart).double() / count
                found = Moments(layout, mean.squeeze(1).double(), spread)
                self._known[layout.node.name] = _together(self._known.get(layout.node.name), (count, found))

    def found(self) -> dict[str, Moments]:
        """Return the moments by the names of the layers."""
        return {name: moments for name, (_, moments) in self._known.items()}


def _together(some: tuple[int, Moments] | None, others: tuple[int, Moments]) -> tuple[int, Moments]:
    """Return the moments of some rows and others, each with their number."""
    if some is None:
        return others
    (count, first), (more, second) = some, others
    share = more / (count + more)
    apart = second.mean - first.mean
    between = share * (1 - share) * apart[:, :, None] * apart[:, None, :]
    covariance = (1 - share) * first.covariance + share * second.covariance + between
    return count + more, Moments(first.layout, first.mean + share * apart, covariance)


def _has_few_terms(site: Site, weight: torch.Tensor) -> bool:
    is_matrix = site.is_convolution or weight.ndim == 2
    return is_matrix and weight.numel() <= _MOST_TERMS * weight.shape[site.kernel.weight_axis]


def searched_scales(
    weight: torch.Tensor, spec: QuantSpec, scale: tuple[float, ...], moments: Moments
) -> tuple[float, ...]:
    """Return the step of each channel, of some larger than those given and these, that leaves the smallest error.

    A larger step makes no integer larger, so that sums that did not saturate do not.

    Args:
        weight: f32, as the layer holds it.
        spec: How it is quantized, a scale a channel.
        scale: The steps from which the search goes out.
        moments: Of what it is multiplied by.
    """
    matrix = moments.layout.matrix(weight).double()
    first = torch.tensor(scale, dtype=torch.float64).reshape(matrix.shape[:2])
    losses = [
        moments.losses(_errors(matrix, first[..., None] * factors, spec))
        for factors in _FACTORS.split(max(1, _TOGETHER // max(matrix.numel(), 1)))
    ]
    best = torch.cat(losses, -1).argmin(-1)
    return tuple((first * _FACTORS[best]).flatten().float().tolist())


def _errors(matrix: torch.Tensor, steps: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return what rounding f64[groups, out, in] adds to it, f64[groups, out, steps, in] for f64[groups, out, steps]."""
    floats, step = matrix[:, :, None], steps[..., None]
    return (floats / step).round_().clamp_(*spec.limits).mul_(step).sub_(floats)
