"""Find what can be pruned: groups of indices that go together, and families of groups that are alike.

A group is a channel with all that belongs to it: a row of one weight, the entries of batch norms, a column of the next
weight, the same channel of every layer that is added to it. A family is the channels of a layer, or of all layers that
are added to each other: its groups touch the same axes of the same parameters.

Where an axis has several factors that could be pruned, such as the heads of attention and the places inside a head, one
of them is: the longest, or the heads if heads are asked for. The others stay whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch

from fxopt.passes.prune.ends import MaskedGroupsEnd
from fxopt.passes.prune.removal import classes_of
from fxopt.passes.prune.structure import Indices, Product, Structure, spread

__all__ = ["Family", "Group", "Part", "families_of"]

Prefer = Literal["longest", "heads"]


@dataclasses.dataclass(frozen=True)
class Part:
    """The indices of one axis of one parameter or buffer that belong to a group."""

    name: str
    dim: int
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Indices that can only go together."""

    parts: tuple[Part, ...]
    indices: Indices = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Family:
    """Groups that touch the same axes of the same parameters.

    Attributes:
        name: Of the parameter that makes its values, such as ``"layer1.0.conv1.weight"``; with ``"#2"`` behind it, and
            so on, if rows of that parameter are in several families.
        groups: The groups, in the order of their first places.
        is_heads: Whether each group is a head of attention.
    """

    name: str
    groups: tuple[Group, ...]
    is_heads: bool = False

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """The axes that its groups touch, by name of the parameter and number."""
        return tuple((part.name, part.dim) for part in self.groups[0].parts)


def families_of(structure: Structure, *, prefer: Prefer = "longest") -> list[Family]:
    """Return the families of a graph, in the order of its parameters.

    Args:
        structure: Its index maps.
        prefer: Which factor of an axis is pruned where several could be; for ``"heads"``, only heads are returned.
    """
    products = [*structure.products, *_masked_groups(structure)]  # before anything counts the numbers
    heads = _heads(structure, products)
    classes, pinned = _resolved(structure, products, heads if prefer == "heads" else None)
    parts = _parts(structure, classes, pinned)
    is_head = set(classes[heads].tolist())
    if prefer == "heads":
        parts = {number: found for number, found in parts.items() if number in is_head}
    members = _members(classes, parts)
    alike: dict[tuple[tuple[str, int, int], ...], list[tuple[int, Group]]] = {}
    for number, found in parts.items():
        group = Group(tuple(found), members[number])
        alike.setdefault(tuple((part.name, part.dim, len(part.places)) for part in found), []).append((number, group))
    names = _unique([key[0][0] for key in alike])
    return [
        Family(name, tuple(group for _, group in groups), any(number in is_head for number, _ in groups))
        for name, groups in zip(names, alike.values(), strict=True)
    ]


def _unique(names: Sequence[str]) -> list[str]:
    """Number names that come again: the rows of one weight may belong to several families."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def _heads(structure: Structure, products: Sequence[Product]) -> np.ndarray:
    """Return which indices are heads, bool[count]: also a key's head that several queries share, and their number."""
    classes = classes_of(structure.count, structure.equal)
    found = np.zeros(structure.count, bool)
    for axis in structure.heads:
        found[classes[axis]] = True
    changed = True
    while changed:
        changed = False
        for product in products:
            if found[classes[product.flat]].all():
                factors = classes[np.concatenate(product.factors)]
                changed |= not found[factors].all()
                found[factors] = True
    of_index: np.ndarray = found[classes]
    return of_index


def _parts(structure: Structure, classes: np.ndarray, pinned: np.ndarray) -> dict[int, list[Part]]:
    """Return what belongs to each class that may go, by number of the class."""
    found: dict[int, list[Part]] = {}
    seen: set[int] = set()
    for node in structure.module.graph.nodes:
        if node.op != "get_attr" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        for dim, axis in enumerate(structure.axes(node)):
            if axis is None or int(axis[0]) in seen:
                continue
            seen.add(int(axis[0]))
            places: dict[int, list[int]] = {}
            for place, number in enumerate(classes[axis].tolist()):
                if not pinned[number]:
                    places.setdefault(number, []).append(place)
            for number, which in places.items():
                found.setdefault(number, []).append(Part(str(node.target), dim, tuple(which)))
    return found


def _members(classes: np.ndarray, wanted: Iterable[int]) -> dict[int, Indices]:
    order = np.argsort(classes, kind="stable")
    bounds = np.searchsorted(classes[order], [[number, number + 1] for number in wanted])
    return {number: order[start:end] for number, (start, end) in zip(wanted, bounds, strict=True)}


def _resolved(
    structure: Structure, products: Sequence[Product], heads: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of each index, and whether each class must stay, when every product has one factor to prune."""
    equal = [*structure.equal, *_same_factors(products, classes_of(structure.count, structure.equal))]
    pinned = np.zeros(structure.count, bool)
    for pin in structure.pins:
        pinned[pin.indices] = True
    pending = list(products)
    while True:
        classes = classes_of(structure.count, equal)
        stays = np.zeros(int(classes.max(initial=-1)) + 1, bool)
        stays[classes[pinned]] = True
        _pin_through_all(products, classes, stays)
        ambiguous = []
        for product in pending:
            open_factors = [factor for factor in product.factors if not stays[classes[factor]].all()]
            if len(open_factors) > 1:
                ambiguous.append(product)
            elif open_factors:
                place = next(at for at, factor in enumerate(product.factors) if factor is open_factors[0])
                wide = np.broadcast_to(spread(open_factors[0], place, product.flat.ndim), product.flat.shape)
                equal.append((product.flat.ravel(), wide.ravel()))
        if len(ambiguous) == len(pending):
            if not pending:
                return classes, stays
            for product in ambiguous:  # one by one: what is chosen here decides for others that share a factor
                chosen = _chosen(product, classes, stays, heads)
                for place, factor in enumerate(product.factors):
                    if place != chosen:
                        pinned[factor] = True
                        stays[classes[factor]] = True
                _pin_through_all(products, classes, stays)
        pending = ambiguous


def _same_factors(products: Sequence[Product], classes: np.ndarray) -> list[tuple[Indices, Indices]]:
    """Return which factors are equal, being those of one flat axis, such as the shared heads of keys and values."""
    first: dict[tuple[bytes, tuple[int, ...]], Product] = {}
    found = []
    for product in products:
        known = first.setdefault((classes[product.flat].tobytes(), product.flat.shape), product)
        found += list(zip(known.factors, product.factors, strict=True)) if known is not product else []
    return found


def _masked_groups(structure: Structure) -> list[Product]:
    """Return the channels of masked group norms as groups and places, so that they go as those of the plain norm do.

    The mask would let every channel go for itself, but then the groups are left with unequal numbers.
    """
    return [
        Product(end.indices, (structure.fresh(end.indices.shape[0]), structure.fresh(end.indices.shape[1])))
        for end in structure.ends
        if isinstance(end, MaskedGroupsEnd) and min(end.indices.shape) > 1
    ]


def _chosen(product: Product, classes: np.ndarray, stays: np.ndarray, heads: np.ndarray | None) -> int:
    """Return which factor of a product is pruned."""
    ranks = []
    for place, factor in enumerate(product.factors):
        is_open = not stays[classes[factor]].all()
        is_head = heads is not None and bool(np.isin(classes[factor], classes[heads]).any())
        ranks.append((is_open, is_head, len(factor), place))
    return max(ranks)[-1]


def _pin_through_all(products: Sequence[Product], classes: np.ndarray, stays: np.ndarray) -> None:
    """Carry on through all products, until nothing changes, what has to stay."""
    while sum(_pin_through(product, classes, stays) for product in products) > 0:
        pass


def _pin_through(product: Product, classes: np.ndarray, stays: np.ndarray) -> bool:
    """Let factors stay whose flat indices do, and flat indices whose factors do; return whether any was new."""
    flat = classes[product.flat]
    changed = False
    all_stay = np.ones(flat.shape, bool)
    for place, factor in enumerate(product.factors):
        numbers = classes[factor]
        wanted = np.moveaxis(stays[flat], place, 0).reshape(len(factor), -1).any(axis=1)
        changed |= bool((wanted & ~stays[numbers]).any())
        stays[numbers[wanted]] = True
        all_stay &= spread(stays[numbers], place, flat.ndim)
    changed |= bool((all_stay & ~stays[flat]).any())
    stays[flat[all_stay]] = True
    return changed
