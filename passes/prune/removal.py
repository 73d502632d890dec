"""Find the most that can be removed from a graph without a change of what it computes.

Every index is a candidate at first. Then those are taken off the list that must stay, those whose values are needed
where they end, flat indices none of whose factors go, and factors with a flat index that stays; until nothing changes.
What is left is the largest set that is consistent: nothing was chosen on the way.
"""

from __future__ import annotations

import numpy as np
import scipy  # loads its parts when they are first used
import torch

from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.structure import Indices, Structure, spread

__all__ = ["Removal", "classes_of"]

_LAST = "all of its axis could go, and one has to stay"


def classes_of(count: int, equal: list[tuple[Indices, Indices]]) -> np.ndarray:
    """Return the number of the class of each index, i64[count]: those of a class are kept together."""
    if not equal:
        return np.arange(count)
    first, second = (np.concatenate(side) for side in zip(*equal, strict=True))
    edges = scipy.sparse.coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    return scipy.sparse.csgraph.connected_components(edges, directed=False)[1].astype(np.int64)  # type: ignore[no-any-return]  # scipy has no types


class Removal:
    """What can go.

    Attributes:
        structure: The index maps of the graph.
        constants: Its constants.
        kept_for: The reason for which an index stays, by number of its class, with the node that it is about.
    """

    def __init__(self, structure: Structure, constants: Constants) -> None:
        self.structure, self.constants = structure, constants
        self._class = classes_of(structure.count, structure.equal)
        classes = int(self._class.max(initial=-1)) + 1
        self._goes = np.ones(classes, bool)
        self.kept_for: dict[int, tuple[torch.fx.Node, str]] = {}
        for pin in structure.pins:
            self._keep(pin.indices, pin.node, pin.reason)
        self._settle()
        while self._keep_one_of_each_axis():
            self._settle()

    def removed(self, indices: Indices) -> np.ndarray:
        """Return which indices go, bool in the shape of ``indices``."""
        found: np.ndarray = self._goes[self._class[indices]]
        return found

    def reasons(self, indices: Indices) -> list[tuple[torch.fx.Node, str]]:
        """Return why those of the indices that stay do, each reason once; none for what stays for another's sake."""
        classes = dict.fromkeys(self._class[indices].tolist())
        return list(dict.fromkeys(self.kept_for[number] for number in classes if number in self.kept_for))

    def _keep(self, indices: Indices, node: torch.fx.Node | None = None, reason: str = "") -> bool:
        """Take indices off the list; return whether any was on it."""
        classes = self._class[indices.ravel()]
        fresh = classes[self._goes[classes]]
        if node is not None:
            for number in dict.fromkeys(fresh.tolist()):
                self.kept_for.setdefault(number, (node, reason))
        self._goes[fresh] = False
        return len(fresh) > 0

    def _settle(self) -> None:
        changed = True
        while changed:
            changed = False
            # What a layer needs is known once it is known what needs the layer.
            for end in reversed(self.structure.ends):
                wanted = end.indices[self.removed(end.indices) & ~end.allows(self)]
                changed |= len(wanted) > 0 and self._keep(wanted, end.node, end.reason())
            for product in self.structure.products:
                changed |= self._settle_product(product.flat, product.factors)

    def _settle_product(self, flat: Indices, factors: tuple[Indices, ...]) -> bool:
        """Keep a flat index none of whose factors goes, and a factor one of whose flat indices stays."""
        changed = False
        by_factor = np.zeros(flat.shape, bool)
        for place, factor in enumerate(factors):
            stays = ~np.moveaxis(self.removed(flat), place, 0).reshape(len(factor), -1).all(axis=1)
            changed |= self._keep(factor[stays])
            by_factor |= spread(self.removed(factor), place, flat.ndim)
        return self._keep(flat[~by_factor]) or changed

    def _keep_one_of_each_axis(self) -> bool:
        """Keep the first index of an axis that would lose all; return whether there was such an axis.

        Short axes come first: a part of an axis keeps an index of the whole as well.
        """
        factors = (factor for product in self.structure.products for factor in product.factors)
        for axis in sorted([*self.structure.numbered(), *factors], key=len):
            if len(axis) and self.removed(axis).all():
                self._keep(axis[:1], self.structure.module.graph.output_node(), _LAST)
                return True
        return False
