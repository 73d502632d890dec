"""Operators that read rows by their number: embeddings and indexing."""

from __future__ import annotations

import numpy as np
import torch

from fxopt.args import arg, tensor_arg
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten


@handles(aten.embedding.default)
class _Embedding(Rule):
    """Rows stay, since any may be asked for; columns are channels."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        weight, indices = tensor_arg(node, "weight"), tensor_arg(node, "indices")
        structure.pin(structure.axis(weight, 0), "its rows are read by number")
        for dim in range(structure.rank(indices)):
            structure.same(structure.axis(indices, dim), structure.axis(node, dim))
        structure.move(structure.axis(weight, 1), structure.axis(node, -1))


@handles(aten.embedding_bag.default, aten._embedding_bag.default, aten.embedding_bag.padding_idx)
class _EmbeddingBag(Rule):
    """Columns are channels, each summed over the rows of a bag."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        weight = tensor_arg(node, "weight")
        structure.pin(structure.axis(weight, 0), "its rows are read by number")
        for source in node.all_input_nodes:
            if source is not weight:
                structure.pin_value(source, "it counts the rows of a bag")
        for slot, value in enumerate(structure.value(node)):
            for dim in range(value.ndim):
                if slot > 0 or dim != 1:
                    structure.pin(structure.axis(node, dim, slot), "it counts the bags")
        if structure.rank(node, 3) > 1:  # the largest row of each bag and column: these are returned as well
            structure.pin_all(node, "it tells which row of a bag is the largest")
        structure.same(structure.axis(weight, 1), structure.axis(node, 1, 0))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Bags of zeros are zero; those of another number depend on how many rows they have."""
        axis = constants.structure.axis(tensor_arg(node, "weight"), 1)
        if axis is not None:
            to = constants.structure.axis(node, 1, 0)
            constants.values[to] = np.where(constants.values[axis] == 0, 0.0, np.nan)


@handles(aten.index_select.default)
class _IndexSelect(Rule):
    """The axis that is indexed stays whole."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, dim = tensor_arg(node, "self"), arg(node, "dim")
        structure.pin_value(tensor_arg(node, "index"), "it holds the numbers of indices")
        for other in range(structure.rank(node)):
            if other == dim % structure.rank(node):
                structure.pin(structure.axis(source, other), "its indices are read by number")
                structure.pin(structure.axis(node, other), "its indices are read by number")
            else:
                structure.move_axis(source, other, node, other)


@handles(aten.index.Tensor)
class _Index(Rule):
    """Axes that are indexed stay whole; others are handed through if the indexed ones are neighbours."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, indices = tensor_arg(node, "self"), arg(node, "indices")
        indexed = [dim for dim, index in enumerate(indices) if index is not None]
        tensors = [indices[dim] for dim in indexed]
        is_mask = any(structure.value(index).dtype in (torch.bool, torch.uint8) for index in tensors)
        neighbours = not indexed or indexed[-1] - indexed[0] + 1 == len(indexed)
        if is_mask or not neighbours:
            structure.pin_all(node, "it is indexed by a mask, or by indices that are not neighbours")
            return
        for index in tensors:
            structure.pin_value(index, "it holds the numbers of indices")
        width = max((structure.rank(index) for index in tensors), default=0)
        for dim in indexed:
            structure.pin(structure.axis(source, dim), "its indices are read by number")
        for dim in range(structure.rank(source)):
            if dim not in indexed:
                to = dim if not indexed or dim < indexed[0] else dim - len(indexed) + width
                structure.move_axis(source, dim, node, to)
        for dim in range(indexed[0] if indexed else 0, indexed[0] + width if indexed else 0):
            structure.pin(structure.axis(node, dim), "its indices are read by number")
