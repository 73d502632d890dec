"""What is to be measured of a graph: regions of it that a runtime runs as one kernel or as few, at several widths.

A region is a layer that adds up products with what is fused into it: padding, batch norm, activation, residual. What
is left over of pointwise operators, norms, poolings and concatenations are regions of their own. Operators with sizes
among their arguments, such as views, are none: most of them cost nothing.

A region is plain data, names and shapes: whoever measures it needs to know nothing about families.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxopt.args import arg
from fxopt.attributes import made_of_attributes
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.passes.prune.costs import Coordinate, Grid, Piece, Term, is_heavy
from fxopt.passes.prune.widths import Choice, Size, Widths

__all__ = ["RUN", "Measure", "Measured", "Region", "Times", "latency_terms", "regions_of"]

aten = torch.ops.aten
Point = tuple[int, ...]
Shape = tuple[int, ...]
Times = Mapping[str, Mapping[Point, float]]
"""Time of each region at each of its points, in any one unit, by the region's name."""

RUN = "(run)"
"""The name of the region without nodes: what a run takes beside its kernels."""

_FOLLOWERS = {
    aten.batch_norm.default, aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.gelu.default,
    aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default, aten.leaky_relu.default, aten.elu.default,
    aten.sigmoid.default, aten.tanh.default, aten.mish.default, aten.prelu.default, aten.clamp.default,
    aten.clamp_min.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
}  # fmt: skip
_ALONE = {
    aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.softmax.int,
    aten.log_softmax.int, aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default,
    aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim,
    aten.cat.default, aten.permute.default, aten.transpose.int,
}  # fmt: skip
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_POINTS = 5  # of each of two coordinates
_VECTOR = 8  # channels that a kernel takes at once


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes to be measured together.

    Attributes:
        name: What its times are found by: that of the layer, or of the only node.
        nodes: Their names, in the order of the graph.
        shapes: Shape of each value that a node of the region reads or yields as a tensor, by its name, at each point.
        coordinates: What the points are made of: widths of families, or a size that families add up to.
    """

    name: str
    nodes: tuple[str, ...]
    shapes: Mapping[Point, Mapping[str, Shape]] = dataclasses.field(repr=False)
    coordinates: tuple[Coordinate, ...] = ()


Measure = Callable[[CapturedModule, Sequence[Region]], Times]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times of a region: at each option of a family, and at the points of a grid, linear between these."""

    name: str
    coordinates: tuple[Coordinate, ...]
    table: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def families(self) -> frozenset[int]:
        """The numbers of the families that it depends on."""
        return frozenset(
            f for each in self.coordinates for f in ([each] if isinstance(each, int) else each.size.families)
        )

    def value(self, choice: Choice) -> float:
        """Return the time at these options."""
        found = self.table
        for coordinate in self.coordinates:
            if isinstance(coordinate, int):
                found = found[choice[coordinate]]
            else:
                at = float(np.interp(coordinate.size.at(choice), coordinate.points, np.arange(len(coordinate.points))))
                low = min(int(at), len(coordinate.points) - 2)
                found = found[low] * (low + 1 - at) + found[low + 1] * (at - low)
        return float(found)

    def pieces(self, options: Sequence[int]) -> Iterator[Piece]:
        """Yield the table."""
        yield Piece(self.coordinates, self.table)


# ---- what is measured


def regions_of(widths: Widths, shapes: Mapping[Any, Shape]) -> list[Region]:
    """Return the regions of a graph, and the one of the run itself.

    Args:
        widths: What the families of the graph can be.
        shapes: Of its values on a sample.
    """
    graph = widths.structure.module.graph
    constant = made_of_attributes(graph)  # no kernel is run for these
    taken: set[torch.fx.Node] = set()
    found = [Region(RUN, (), {(): {}})]
    chains = [_chain(node, taken, constant) for node in graph.nodes if is_heavy(node) and node not in constant]
    for node in graph.nodes:
        if node.target in _FOLLOWERS | _ALONE and node not in taken and node not in constant:
            chains.append([node])
    for chain in chains:
        if all(_is_float(node) for node in chain):
            found.append(_region(chain, widths, shapes))
    return found


def _is_float(node: torch.fx.Node) -> bool:
    held = node.meta.get("val")
    first = held[0] if isinstance(held, tuple | list) else held
    return isinstance(first, torch.Tensor) and first.is_floating_point()


def _chain(node: torch.fx.Node, taken: set[torch.fx.Node], constant: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Return a layer, the padding before it, and what follows that a runtime may fuse: nothing else reads between."""
    chain = [*_padding(node), node]
    while len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if user.target not in _FOLLOWERS or user in taken or not _same_shape(chain[-1], user):
            break
        chain.append(user)
    taken.update(chain)
    return chain


def _padding(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the padding that a runtime takes for a convolution's own; how much there is makes kernels slower."""
    source = node.args[0] if node.args else None
    if not isinstance(source, torch.fx.Node) or source.target not in _PADS or len(source.users) > 1:
        return []
    held = node.meta["val"]
    fits = isinstance(held, torch.Tensor) and len(arg(source, "pad")) // 2 <= held.ndim - 2
    return [source] if fits and len(source.all_input_nodes) == 1 else []


def _same_shape(first: torch.fx.Node, second: torch.fx.Node) -> bool:
    a, b = first.meta.get("val"), second.meta.get("val")
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and list(map(str, a.shape)) == list(map(str, b.shape))
    )


def _region(chain: Sequence[torch.fx.Node], widths: Widths, shapes: Mapping[Any, Shape]) -> Region:
    values = dict.fromkeys(value for node in chain for value in (*node.all_input_nodes, node))
    sizes = {v.name: widths.shape(v, shapes) for v in values if isinstance(v.meta.get("val"), torch.Tensor)}
    coordinates = _coordinates({size for each in sizes.values() for size in each if size.parts})
    measured = {
        tuple(place[0] for place in places): {
            name: tuple(_at(size, coordinates, [place[1] for place in places]) for size in each)
            for name, each in sizes.items()
        }
        for places in itertools.product(*(_places(each, widths, len(coordinates)) for each in coordinates))
    }
    name = next((node.name for node in chain if is_heavy(node)), chain[0].name)
    return Region(name, tuple(node.name for node in chain), measured, coordinates)


def _coordinates(sizes: set[Size]) -> tuple[Coordinate, ...]:
    """Return at most two: two families, or two different sizes, or else the largest size, which all others follow."""
    families = sorted({family for size in sizes for family in size.families})
    if len(families) <= 2:
        return tuple(families)
    alone = sorted({size.families[0] for size in sizes if len(size.parts) == 1})
    joined = sorted({size for size in sizes if len(size.parts) > 1}, key=lambda size: (size.full, size.parts))
    if len(alone) + len(joined) > 2:
        alone, joined = [], [max(joined or sizes, key=lambda size: size.full)]
    return (*(Grid(size, _grid(size)) for size in joined), *alone)


def _grid(size: Size) -> tuple[int, ...]:
    inner = (round(at / _VECTOR) * _VECTOR for at in np.linspace(size.least, size.full, _POINTS)[1:-1])
    return tuple(sorted({size.least, size.full, *(at for at in inner if size.least < at < size.full)}))


def _places(coordinate: Coordinate, widths: Widths, of: int) -> list[tuple[int, int]]:
    """Return what is measured of a coordinate: name of the point, and its option or size."""
    if isinstance(coordinate, Grid):
        return [(point, point) for point in coordinate.points]
    options = widths.options[coordinate]
    count = len(options) if of == 1 else min(_POINTS, len(options))
    return [(options[at], at) for at in sorted({round(at) for at in np.linspace(0, len(options) - 1, count).tolist()})]


def _at(size: Size, coordinates: Sequence[Coordinate], places: Sequence[int]) -> int:
    """Return a size at a point; one that no coordinate tells changes in proportion to the first one that is a grid."""
    chosen = {each: place for each, place in zip(coordinates, places, strict=True) if isinstance(each, int)}
    if all(family in chosen for family in size.families):
        return size.at(chosen)
    grids = [(each, place) for each, place in zip(coordinates, places, strict=True) if isinstance(each, Grid)]
    for grid, place in grids:
        if grid.size == size:
            return place
    grid, place = grids[0]
    share = (place - grid.size.least) / max(grid.size.full - grid.size.least, 1)
    return round(size.least + share * (size.full - size.least))


# ---- what was measured


def latency_terms(regions: Sequence[Region], times: Times, widths: Widths) -> list[Term]:
    """Return the time of each region.

    Raises:
        PassError: a region or a point is missing, or a time is no finite number of at least 0.
    """
    missing = [region.name for region in regions if region.name not in times]
    if missing:
        raise PassError(
            describe(
                f"costs has no time of {', '.join(missing[:4])}",
                got=", ".join(list(times)[:8]) or "nothing",
                try_="costs=fxopt.export.width_costs, which measures the graph that the pass gets",
            )
        )
    return [Measured(region.name, region.coordinates, _table(region, times[region.name], widths)) for region in regions]


def _table(region: Region, times: Mapping[Point, float], widths: Widths) -> np.ndarray[Any, np.dtype[np.float64]]:
    for point in region.shapes:
        if not (isinstance(time := times.get(point), int | float) and math.isfinite(time) and time >= 0):
            raise PassError(f"the cost of {region.name} at {point} is {time!r}; wanted a finite number of at least 0")
    axes = [sorted({point[at] for point in region.shapes}) for at in range(len(region.coordinates))]
    table = np.array([float(times[point]) for point in itertools.product(*axes)]).reshape([len(axis) for axis in axes])
    for at, coordinate in enumerate(region.coordinates):
        if isinstance(coordinate, int):
            lines = np.moveaxis(table, at, -1)
            wide = [np.interp(widths.options[coordinate], axes[at], line) for line in lines.reshape(-1, len(axes[at]))]
            table = np.moveaxis(np.array(wide).reshape(*lines.shape[:-1], -1), -1, at)
    return table
