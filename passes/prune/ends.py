"""Where indices end, and what must hold for one to go: it adds nothing there, or always the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fxopt.passes.prune.structure import End, Indices, where

if TYPE_CHECKING:
    from fxopt.passes.prune.removal import Removal

__all__ = ["MaskedEnd", "MaskedGroupsEnd", "NormalizedEnd", "SumEnd", "TransposedEnd", "WeightedEnd"]


class SumEnd(End):
    """A sum over products of the values of several operands, index by index: one factor of 0 is enough.

    Args:
        node: What adds up.
        operands: Numbers of the summed axis of each operand.
    """

    def __init__(self, node: torch.fx.Node, *operands: Indices) -> None:
        super().__init__(node, operands[0])
        self.operands = operands

    def allows(self, removal: Removal) -> np.ndarray:
        """Return where an operand is 0 throughout."""
        zero = [removal.constants.values[operand] == 0 for operand in self.operands]
        found: np.ndarray = np.logical_or.reduce(zero)
        return found

    def reason(self) -> str:
        """Return why an index has to stay."""
        return f"{where(self.node)} sums over it, and it is not 0"


class NormalizedEnd(SumEnd):
    """Statistics over an axis: a value of 0 adds nothing to the sum, but the number of values counts as well."""

    normalizes = True

    def allows(self, removal: Removal) -> np.ndarray:
        """Return that none may go."""
        return np.zeros(self.indices.shape, bool)

    def reason(self) -> str:
        """Return why an index has to stay."""
        return f"{where(self.node)} normalizes over it: its mean and variance would be those of fewer values"


class MaskedEnd(End):
    """Statistics over the channels that a mask keeps: one that it leaves out may go, whatever its values are.

    Args:
        node: What normalizes.
        indices: Numbers of its channels.
        mask: Numbers of the mask's only axis.
    """

    def __init__(self, node: torch.fx.Node, indices: Indices, mask: Indices) -> None:
        super().__init__(node, indices)
        self.mask = mask

    def allows(self, removal: Removal) -> np.ndarray:
        """Return where the mask is false."""
        masked: np.ndarray = removal.constants.values[self.mask] == 0
        return masked

    def reason(self) -> str:
        """Return why an index has to stay."""
        return f"{where(self.node)} normalizes over it, and its mask does not leave it out"


class MaskedGroupsEnd(MaskedEnd):
    """As :class:`MaskedEnd`, by group: groups go as a whole, or the others lose equally many channels each.

    Args:
        node: What normalizes.
        indices: Numbers of its channels, by group.
        mask: Numbers of the mask, by group.
    """

    def allows(self, removal: Removal) -> np.ndarray:
        """Return what may go: whole groups, and as many masked channels of each other group as all of them can lose."""
        goes = removal.removed(self.indices)
        whole = np.asarray(goes.all(axis=1))
        able = goes & super().allows(removal)
        fewest = able[~whole].sum(axis=1).min(initial=able.shape[1])
        allowed: np.ndarray = whole[:, None] | (able & (np.cumsum(able, axis=1) <= fewest))
        return allowed

    def reason(self) -> str:
        """Return why an index has to stay."""
        return f"{super().reason()}, or its groups would be left with unequal numbers of channels"


class WeightedEnd(End):
    """The input channels of a convolution or linear layer, each with its column of the weight.

    A channel may go if it is 0, if every row that stays has a 0 for it, or if it is a constant that the bias can hold.

    Args:
        node: The layer.
        indices: Numbers of its input channels, by group.
        rows: Numbers of its output channels, by group.
        weight: The node of its weight.
        absorbs: Whether a constant adds the same everywhere: no padding with zeros beside it.
    """

    def __init__(
        self, node: torch.fx.Node, indices: Indices, rows: Indices, weight: torch.fx.Node, *, absorbs: bool
    ) -> None:
        super().__init__(node, indices)
        self.rows, self.weight, self.absorbs = rows, weight, absorbs
        self._filled: np.ndarray | None = None

    def allows(self, removal: Removal) -> np.ndarray:
        """Return where a channel adds nothing to a row that stays, or always the same."""
        values = removal.constants.values[self.indices]
        zero: np.ndarray = values == 0
        if self.absorbs and self.weight in removal.constants.known:
            zero |= np.isfinite(values)
        filled = self.filled(removal)
        if filled is not None:
            stays = ~removal.removed(self.rows)
            zero |= ~(filled & stays[:, :, None]).any(axis=1)
        return zero

    def filled(self, removal: Removal) -> np.ndarray | None:
        """Return where the weight is not 0, bool[groups, rows, channels], or None if it is not known."""
        tensor = removal.constants.known.get(self.weight)
        if tensor is not None and self._filled is None:
            self._filled = self.by_group(tensor != 0)
        return self._filled

    def by_group(self, weight: torch.Tensor) -> np.ndarray:
        """Return a weight summed over its places, in the shape [groups, rows, channels]; of bools, whether any is true.

        Args:
            weight: In the shape of the layer's weight.
        """
        places = tuple(range(2, weight.ndim))
        if places:
            weight = weight.any(dim=places) if weight.dtype == torch.bool else weight.sum(dim=places)
        return self._arranged(weight).numpy()

    def _arranged(self, weight: torch.Tensor) -> torch.Tensor:
        (groups, channels), rows = self.indices.shape, self.rows.shape[1]
        return weight.reshape(groups, rows, channels)

    def reason(self) -> str:
        """Return why an index has to stay."""
        return f"{where(self.node)} reads it with a weight that is not 0, and it is not 0" + (
            "" if self.absorbs else "; a constant cannot go into the bias, since zeros are padded beside it"
        )


class TransposedEnd(WeightedEnd):
    """As :class:`WeightedEnd`, with a weight that lists its input channels first."""

    def _arranged(self, weight: torch.Tensor) -> torch.Tensor:
        (groups, channels), rows = self.indices.shape, self.rows.shape[1]
        return weight.reshape(groups, channels, rows).transpose(1, 2)
