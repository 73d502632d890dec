"""What a graph costs at each width of its families: multiply-accumulates, parameters, bytes, measured time.

A cost is a sum of terms. A term is a product of sizes, such as the rows and columns of a linear layer, or a table of
times over one or two coordinates. For a solver, a term falls into pieces: tables over the options of one or two
families, or over a size that several families add up to, in which the term is then linear from point to point.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from fxopt.args import arg
from fxopt.attributes import get_path, owner_of
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.layer_operators import CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS
from fxopt.passes.prune.widths import Choice, Size, Widths

__all__ = ["Grid", "Piece", "Product", "Term", "byte_terms", "is_heavy", "mac_terms", "parameter_terms", "total"]

aten = torch.ops.aten
Table = np.ndarray[Any, np.dtype[np.float64]]

_LINEAR = {aten.linear.default}
_MATMULS = {
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.addmm.default,
    aten.baddbmm.default,
}  # fmt: skip
_EINSUM, _ATTENTION = aten.einsum.default, aten.scaled_dot_product_attention.default
_HEAVY = {*_LINEAR, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *_MATMULS, *RECURRENT, _EINSUM, _ATTENTION}


@dataclasses.dataclass(frozen=True)
class Grid:
    """A size that several families add up to, and the points between which a term is linear in it."""

    size: Size
    points: tuple[int, ...]


Coordinate = int | Grid
"""The number of a family, whose points are its options; or a grid."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a term: its value at each point of at most two coordinates, one dimension each."""

    coordinates: tuple[Coordinate, ...]
    table: Table


class Term(Protocol):
    """A part of a cost, with the name of the layer or tensor that it is of."""

    @property
    def name(self) -> str:
        """What it is the cost of."""

    @property
    def families(self) -> frozenset[int]:
        """The numbers of the families that it depends on."""

    def value(self, choice: Choice) -> float:
        """Return the cost at these options."""

    def pieces(self, options: Sequence[int]) -> Iterator[Piece]:
        """Yield what adds up to the term; ``options`` are how many each family has."""


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of sizes and a constant.

    ``pieces`` are exact for all that depends on two families, or on two sizes. What depends on more counts at its
    full size there, so that a solver takes it for too large and never for too small.
    """

    name: str
    weight: float
    sizes: tuple[Size, ...]

    @property
    def families(self) -> frozenset[int]:
        """The numbers of the families that it depends on."""
        return frozenset(family for size in self.sizes for family in size.families)

    def value(self, choice: Choice) -> float:
        """Return the product at these options."""
        return self.weight * math.prod(size.at(choice) for size in self.sizes)

    def pieces(self, options: Sequence[int]) -> Iterator[Piece]:
        """Yield tables that add up to the product."""
        families = sorted(self.families)
        if len(families) <= 2:
            ranges = [range(options[family]) for family in families]
            values = [
                self.weight * math.prod(size.at(dict(zip(families, at, strict=True))) for size in self.sizes)
                for at in itertools.product(*ranges)
            ]
            yield Piece(tuple(families), np.array(values).reshape([len(each) for each in ranges]))
            return
        varying = sorted((size for size in self.sizes if size.parts), key=lambda size: -size.full / max(size.least, 1))
        weight = self.weight * math.prod(size.full for size in (*varying[2:], *(s for s in self.sizes if not s.parts)))
        if len(varying) == 1:
            yield from _sum_of(weight, varying[0])
            return
        large, small = sorted(varying[:2], key=lambda size: -len(size.parts))
        yield from _sum_of(weight * small.fixed, large)
        for family, counts in small.parts:
            points = (large.least, large.full)
            yield Piece((Grid(large, points), family), weight * np.outer(points, counts).astype(np.float64))


def _sum_of(weight: float, size: Size) -> Iterator[Piece]:
    yield Piece((), np.array(weight * size.fixed))
    for family, counts in size.parts:
        yield Piece((family,), weight * np.array(counts, np.float64))


def total(terms: Sequence[Term], choice: Choice) -> float:
    """Return the cost at these options."""
    return math.fsum(term.value(choice) for term in terms)


def is_heavy(node: torch.fx.Node) -> bool:
    """Return whether a node adds up products: a convolution, linear or recurrent layer, matrix product, attention."""
    return node.target in _HEAVY


# ---- multiply-accumulates


def mac_terms(widths: Widths, shapes: Mapping[Any, tuple[int, ...]]) -> list[Term]:
    """Return the multiply-accumulates of the layers of a graph, for one run on its first sample.

    A multiply-accumulate is one product that is added to a sum; biases and pointwise operators count nothing, nor does
    what stands in a branch or a loop.
    """
    found: list[Term] = []
    for node in widths.structure.module.graph.nodes:
        if is_heavy(node):
            for sizes in _mac_sizes(node, widths, shapes):
                found.append(Product(node.name, *_split(sizes)))
    return found


def _split(sizes: Sequence[Size]) -> tuple[float, tuple[Size, ...]]:
    """Return the constant factor, and the sizes that depend on a family."""
    return float(math.prod(s.fixed for s in sizes if not s.parts)), tuple(size for size in sizes if size.parts)


def _mac_sizes(
    node: torch.fx.Node, widths: Widths, shapes: Mapping[Any, tuple[int, ...]]
) -> Iterator[tuple[Size, ...]]:
    def shape(of: torch.fx.Node, slot: int | None = None) -> tuple[Size, ...]:
        return widths.shape(of, shapes, slot)

    if node.target in RECURRENT:
        steps = shape(arg(node, "input"))[:-1]
        yield from ((*steps, *each) for weight in arg(node, "params") if len(each := shape(weight)) == 2)
        return
    if node.target is _EINSUM:
        equation, operands = str(arg(node, "equation")).replace(" ", ""), arg(node, "tensors")
        letters: dict[str, Size] = {}
        for term, operand in zip(equation.partition("->")[0].split(","), operands, strict=True):
            letters |= _lettered(term, shape(operand))
        yield tuple(letters.values())
        return
    if node.target is _ATTENTION:
        query, key, value = (shape(arg(node, name)) for name in ("query", "key", "value"))
        yield (*query, key[-2])
        yield (*query[:-1], key[-2], value[-1])
        return
    out = shape(node)
    if node.target in _LINEAR:
        yield (*out, shape(arg(node, "weight"))[1])
    elif node.target in CONVOLUTIONS:
        yield (*out, *shape(arg(node, "weight"))[1:])
    elif node.target in TRANSPOSED_CONVOLUTIONS:
        yield (*shape(arg(node, "input")), *shape(arg(node, "weight"))[1:])
    else:
        left = [source for source in node.args if isinstance(source, torch.fx.Node)][-2]
        yield (*out, shape(left)[-1])


def _lettered(term: str, sizes: tuple[Size, ...]) -> dict[str, Size]:
    """Return the sizes by letter; those that an ellipsis stands for, by their place from the right."""
    before, dots, behind = term.partition("...")
    wide = len(sizes) - len(before) - len(behind)
    return dict(zip([*before, *(f"{dots}{at}" for at in range(wide, 0, -1)), *behind], sizes, strict=True))


# ---- tensors


def parameter_terms(gm: CapturedModule, widths: Widths) -> list[Term]:
    """Return the number of parameters."""
    return _tensor_terms(gm, widths, lambda tensor: 1.0 if isinstance(tensor, torch.nn.Parameter) else 0.0)


def byte_terms(gm: CapturedModule, widths: Widths) -> list[Term]:
    """Return the bytes of all tensors that the graph reads, in their own element types: what a file mostly holds."""
    return _tensor_terms(gm, widths, lambda tensor: float(tensor.element_size()))


def _tensor_terms(gm: CapturedModule, widths: Widths, weight: Any) -> list[Term]:
    found: list[Term] = []
    seen: set[int] = set()
    own = widths.structure.module.graph
    for module in (gm, *(each for each in graph_modules(gm) if each is not gm)):
        for node in module.graph.nodes:
            if node.op != "get_attr":
                continue
            tensor = get_path(owner_of(node), str(node.target))
            if not isinstance(tensor, torch.Tensor) or id(tensor) in seen or not (each := weight(tensor)):
                continue
            seen.add(id(tensor))
            known = {node: tuple(tensor.shape)}
            sizes = widths.shape(node, known) if module.graph is own else tuple(Size(size) for size in tensor.shape)
            factor, varying = _split(sizes)
            found.append(Product(str(node.target), each * factor, varying))
    return found
