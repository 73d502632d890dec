"""How large everything becomes when families are narrower: sizes of axes as functions of the widths of families.

A family has a few widths to choose from. Which of its groups stay at a width is known beforehand, since the least
important go first. So the size that an axis has afterwards is a fixed part and one number for each family that it has
channels of: one family's after a convolution, several families' after a concatenation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxopt.calibration_data import calibration_samples
from fxopt.eager_control_flow import EagerInterpreter
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.prune.groups import Family, Group
from fxopt.passes.prune.structure import Indices, Structure

__all__ = ["Choice", "Size", "Widths", "sample_shapes", "width_options"]

Choice = Sequence[int]
"""For each family the number of its width among its options."""

_OPTIONS = 9  # eighths: a half and a quarter are among them
_VECTOR = 8  # channels that a kernel takes at once
_WIDE = 32  # groups from which on a family has no other widths than multiples of that


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of an axis.

    Attributes:
        fixed: How many of its indices are of no family.
        parts: How many are of a family at each of its options, by number of the family.
    """

    fixed: int
    parts: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def at(self, choice: Choice | Mapping[int, int]) -> int:
        """Return the size at these options of the families."""
        return self.fixed + sum(counts[choice[family]] for family, counts in self.parts)

    @property
    def families(self) -> tuple[int, ...]:
        """The numbers of the families that it depends on."""
        return tuple(family for family, _ in self.parts)

    @property
    def least(self) -> int:
        """The size at the narrowest options."""
        return self.fixed + sum(min(counts) for _, counts in self.parts)

    @property
    def full(self) -> int:
        """The size if nothing goes."""
        return self.fixed + sum(counts[-1] for _, counts in self.parts)


def width_options(total: int, *, min_kept: int, multiple: int) -> tuple[int, ...]:
    """Return the widths to choose from, rising, the full one last.

    Args:
        total: How many groups a family has.
        min_kept: How many stay at least.
        multiple: What their number is a multiple of, but for the full one. Of a family of at least 32, it also is one
            of 8, which is what vectors of kernels hold.
    """
    unit = math.lcm(multiple, _VECTOR if total >= _WIDE else 1)
    shares = [total * part / (_OPTIONS - 1) for part in range(1, _OPTIONS - 1)]
    rounded = {math.ceil(max(share, min_kept, 1) / unit) * unit for share in (0, *shares)}
    return (*sorted(width for width in rounded if width < total), total)


class Widths:
    """The widths that the families of a graph can have.

    Args:
        structure: The index maps that the families were found in.
        families: The families.
        scores: f32[groups] by name of each family.
        min_kept, multiple: See :func:`width_options`.

    Attributes:
        options: Numbers of groups to choose from, rising, by number of the family.
    """

    def __init__(
        self,
        structure: Structure,
        families: Sequence[Family],
        scores: Mapping[str, torch.Tensor],
        *,
        min_kept: int,
        multiple: int,
    ) -> None:
        self.structure, self.families = structure, tuple(families)
        self.options = tuple(
            width_options(len(family.groups), min_kept=min_kept, multiple=multiple) for family in self.families
        )
        self._order = [torch.argsort(scores[family.name], stable=True).tolist() for family in self.families]
        self._owner = np.full(structure.count, -1)
        self._rank = np.zeros(structure.count, np.int64)
        for number, family in enumerate(self.families):
            for rank, at in enumerate(self._order[number]):
                self._owner[family.groups[at].indices] = number
                self._rank[family.groups[at].indices] = rank

    @property
    def full(self) -> tuple[int, ...]:
        """The choice by which nothing goes."""
        return tuple(len(options) - 1 for options in self.options)

    def gone(self, choice: Choice) -> list[Group]:
        """Return the groups that go by a choice."""
        found: list[Group] = []
        for family, order, options, option in zip(self.families, self._order, self.options, choice, strict=True):
            found += [family.groups[at] for at in sorted(order[: len(family.groups) - options[option]])]
        return found

    def axis(self, indices: Indices) -> Size:
        """Return the size of an axis."""
        owners, ranks = self._owner[indices.ravel()], self._rank[indices.ravel()]
        fixed, parts = int((owners < 0).sum()), []
        for number in np.unique(owners[owners >= 0]).tolist():
            own = ranks[owners == number]
            total = len(self.families[number].groups)
            counts = tuple(int((own >= total - width).sum()) for width in self.options[number])
            if len(set(counts)) > 1:
                parts.append((number, counts))
            else:
                fixed += counts[-1]
        return Size(fixed, tuple(parts))

    def shape(
        self, node: torch.fx.Node, shapes: Mapping[Any, tuple[int, ...]], slot: int | None = None
    ) -> tuple[Size, ...]:
        """Return the size of each axis of a value; ``shapes`` as :func:`sample_shapes` returns them."""
        axes = self.structure.axes(node, slot)
        known = shapes.get(node if slot is None else (node, slot), (1,) * len(axes))
        return tuple(Size(known[dim]) if axis is None else self.axis(axis) for dim, axis in enumerate(axes))


def sample_shapes(gm: CapturedModule) -> dict[Any, tuple[int, ...]]:
    """Return the shape of each value on the first sample, by node, or by node and place if it yields several.

    Raises:
        CalibrationError: the samples of the graph are empty or do not fit.
    """
    found: dict[Any, tuple[int, ...]] = {}

    class Watching(EagerInterpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            found.update(_shapes_of(n, value))
            return value

    sample = next(iter(calibration_samples(gm, gm.samples)))
    with isolated(gm):
        Watching(gm).run(*gm.flatten_inputs(*sample.args, **sample.kwargs), enable_io_processing=False)
    return found


def _shapes_of(node: torch.fx.Node, value: Any) -> Iterable[tuple[Any, tuple[int, ...]]]:
    if isinstance(value, torch.Tensor):
        yield node, tuple(value.shape)
    elif isinstance(value, tuple | list):
        yield from (((node, at), tuple(v.shape)) for at, v in enumerate(value) if isinstance(v, torch.Tensor))
