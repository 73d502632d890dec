"""Measure how often channels are active: above 0 behind their activation function."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fxopt.calibration_data import calibration_samples
from fxopt.eager_control_flow import EagerInterpreter
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.prune.groups import Family
from fxopt.passes.prune.structure import Structure

__all__ = ["activation_frequencies"]

aten = torch.ops.aten
_ACTIVATIONS = {
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.gelu.default, aten.silu.default,
    aten.hardswish.default, aten.leaky_relu.default, aten.elu.default, aten.sigmoid.default, aten.tanh.default,
    aten.mish.default, aten.prelu.default, aten.clamp.default, aten.clamp_min.default,
}  # fmt: skip


def activation_frequencies(
    gm: CapturedModule, structure: Structure, families: Sequence[Family], data: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """Return the share of the values of each group that are above 0, f32[groups], by name of the family.

    Measured behind the activation functions that a family's channels go through; a family that goes through none is
    left out. ``structure`` is the one that the families were found in. The data are gone through once.

    Raises:
        CalibrationError: the data are empty or do not fit.
    """
    places = {family.name: _places(structure, family) for family in families}
    counted: dict[tuple[torch.fx.Node, int], tuple[torch.Tensor, int]] = {}
    axes: dict[torch.fx.Node, set[int]] = {}
    for node, dim, _ in itertools.chain.from_iterable(places.values()):
        axes.setdefault(node, set()).add(dim)

    class Counting(EagerInterpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            for dim in axes.get(n, ()):
                above = (value > 0).movedim(dim, 0).flatten(1)
                before, total = counted.get((n, dim), (torch.zeros(len(above), dtype=torch.long), 0))
                counted[n, dim] = before + above.sum(dim=1).cpu(), total + above.shape[1]
            return value

    with isolated(gm):
        for sample in calibration_samples(gm, data):
            Counting(gm).run(*gm.flatten_inputs(*sample.args, **sample.kwargs), enable_io_processing=False)
    return {name: _shares(found, counted) for name, found in places.items() if found}


def _places(structure: Structure, family: Family) -> list[tuple[torch.fx.Node, int, list[np.ndarray]]]:
    """Return the activation functions, with the axis, and the places on it of each group."""
    found = []
    numbers = np.full(structure.count, -1)
    for at, group in enumerate(family.groups):
        numbers[group.indices] = at
    for node in structure.module.graph.nodes:
        if node.target not in _ACTIVATIONS:
            continue
        for dim, axis in enumerate(structure.axes(node)):
            if axis is not None and (owner := numbers[axis]).max() >= 0:
                where = [np.flatnonzero(owner == at) for at in range(len(family.groups))]
                if all(len(each) for each in where):
                    found.append((node, dim, where))
    return found


def _shares(
    places: list[tuple[torch.fx.Node, int, list[np.ndarray]]],
    counted: dict[tuple[torch.fx.Node, int], tuple[torch.Tensor, int]],
) -> torch.Tensor:
    rows = []
    for node, dim, where in places:
        above, total = counted[node, dim]
        rows.append(torch.stack([above[torch.from_numpy(each)].float().mean() / max(total, 1) for each in where]))
    return torch.stack(rows).mean(dim=0)
