"""Layers as products of matrices.

A convolution is, at each output position, the product of a patch of its input with a matrix of weights. So it and a
linear layer alike become rows ``[groups, rows, in]`` times weights ``[groups, out, in]``; only a grouped convolution
has more groups than one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch.nn import functional

from fxopt.args import arg, spread
from fxopt.passes.quantize.observations import evenly_spread
from fxopt.passes.quantize.placement import Site

__all__ = ["LayerMatrix"]

_CHUNK = 64 * 2**20  # bytes of the patches that are laid out at a time


@dataclasses.dataclass(frozen=True)
class LayerMatrix:
    """A layer as a product of matrices.

    Attributes:
        node: The call: a convolution, or a product with a constant matrix.
        groups: How many products there are side by side.
        spatial: Number of axes that a convolution slides along; 0 for a product.
        transposed: Whether the weight lies as ``[in, out]``.
        weight_shape: Shape of the weight.
    """

    node: torch.fx.Node
    groups: int
    spatial: int
    transposed: bool
    weight_shape: tuple[int, ...]

    @classmethod
    def of(cls, site: Site, weight: torch.Tensor) -> LayerMatrix:
        """Return the matrices of a site whose kernel has a constant weight."""
        if not site.is_convolution:
            return cls(site.node, 1, 0, site.kernel.weight_axis == 1, tuple(weight.shape))
        return cls(site.node, site.groups, weight.ndim - 2, False, tuple(weight.shape))

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as ``[groups, out, in]``."""
        rows = weight.t() if self.transposed else weight.flatten(1)
        return rows.reshape(self.groups, rows.shape[0] // self.groups, rows.shape[1])

    def weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`matrix` makes ``matrix`` of."""
        rows = matrix.flatten(0, 1)
        return rows.t().contiguous() if self.transposed else rows.reshape(self.weight_shape)

    def rows(self, x: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows of an input, ``[groups, rows, in]``, all or those with the numbers ``chosen``."""
        if not self.spatial:
            flat = x.reshape(-1, x.shape[-1])
            return (flat if chosen is None else flat[chosen])[None]
        patches = self._patches(x)
        if chosen is None:
            return self._laid_out(patches)
        places = torch.unravel_index(chosen, patches.shape[: 1 + self.spatial])
        return patches[places].reshape(len(chosen), self.groups, -1).transpose(0, 1)

    def row_chunks(self, x: torch.Tensor, around: int = 0) -> Iterator[torch.Tensor]:
        """Yield all rows of an input, so many at a time that they take little memory; ``around`` pads it."""
        if not self.spatial:
            yield self.rows(x)
            return
        patches = self._patches(x, around)
        step = max(1, _CHUNK // max(1, patches[:1].numel() * patches.element_size()))
        for part in patches.split(step):
            yield self._laid_out(part)

    def some_rows(self, x: torch.Tensor, each: int) -> torch.Tensor:
        """Return the rows of an input at ``each`` or a few more places of each of its images, evenly spread."""
        if not self.spatial:
            lines = x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1])
            return evenly_spread(lines, [1], each).reshape(1, -1, x.shape[-1])
        return self._laid_out(evenly_spread(self._patches(x), range(1, 1 + self.spatial), each))

    def places(self, x: torch.Tensor) -> torch.Size:
        """Return how the rows of an input lie: the number of images, and of positions along each axis."""
        return self._patches(x).shape[: 1 + self.spatial] if self.spatial else x.shape[:-1]

    def count(self, x: torch.Tensor) -> int:
        """Return the number of rows of an input."""
        return self.places(x).numel()

    def outcomes(self, y: torch.Tensor) -> int:
        """Return the number of rows of an output."""
        channels = y.shape[y.ndim - 1 - self.spatial] if self.spatial else y.shape[-1]
        return y.numel() // channels

    def results(self, y: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return an output of the layer as ``[groups, rows, out]``, the rows with the numbers ``chosen``."""
        if self.spatial:
            y = (y if y.ndim == 2 + self.spatial else y[None]).movedim(1, -1)
        rows = y.reshape(-1, y.shape[-1])[chosen]
        return rows.reshape(len(chosen), self.groups, -1).transpose(0, 1)

    def _laid_out(self, patches: torch.Tensor) -> torch.Tensor:
        rows = patches.shape[: 1 + self.spatial].numel()
        return patches.reshape(rows, self.groups, -1).transpose(0, 1)

    def _patches(self, x: torch.Tensor, around: int = 0) -> torch.Tensor:
        """Return a view ``[batch, *positions, channels, *kernel]`` of what each output position reads."""
        kernel = self.weight_shape[2:]
        x = x if x.ndim == 2 + self.spatial else x[None]
        stride, dilation = self._sizes("stride"), self._sizes("dilation")
        padding = arg(self.node, "padding")
        if padding == "same":
            total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            before = [(size // 2, size - size // 2) for size in total]
        else:
            before = [(0, 0)] * self.spatial if padding == "valid" else [(p, p) for p in self._sizes("padding")]
        x = functional.pad(x, list(itertools.chain(*reversed(before))), value=around)
        for axis in range(self.spatial):
            extent = dilation[axis] * (kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, extent, stride[axis])[..., :: dilation[axis]]
        return x.movedim(1, 1 + self.spatial)

    def _sizes(self, name: str) -> list[int]:
        return spread(arg(self.node, name), self.spatial)
