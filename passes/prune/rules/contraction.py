"""Sums of products: linear layers, convolutions, matrix products, einsum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._ops import OpOverload

from fxopt.args import arg, plain_number, shape, tensor_arg
from fxopt.layer_operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.cut import Cut
from fxopt.passes.prune.ends import SumEnd, TransposedEnd, WeightedEnd
from fxopt.passes.prune.rules.base import Rule, handles
from fxopt.passes.prune.structure import Structure

__all__: list[str] = []

aten = torch.ops.aten


class _Layer(Rule):
    """What linear layers and convolutions share: a constant that is cut goes into the bias."""

    channels = -1  # which axis of the result holds them

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Rows whose input is constant wherever the weight is not 0 yield a constant."""
        end = _end_at(node, constants.structure)
        tensor = constants.known.get(tensor_arg(node, "weight"))
        out = constants.structure.axis(node, self.channels)
        if end is None or tensor is None or out is None:
            return
        values = constants.values[end.indices]
        usable = (values == 0) | (np.isfinite(values) if end.absorbs else False)
        steady = ~(end.by_group(tensor != 0) & ~usable[:, None, :]).any(axis=2)
        found = np.zeros(steady.shape)
        if (usable & (values != 0)).any():
            found = (end.by_group(tensor.double()) * np.where(usable, values, 0.0)[:, None, :]).sum(axis=2)
        found = found + constants.vector(arg(node, "bias"), found.size, 0.0).reshape(found.shape)
        constants.values[out] = np.where(steady, found, np.nan).ravel()

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Add to the bias what the channels that go have added so far."""
        end = _end_at(node, cut.structure)
        tensor = cut.constants.known.get(tensor_arg(node, "weight"))
        if end is None or not end.absorbs or tensor is None:
            return
        values = cut.constants.values[end.indices]
        gone = cut.removal.removed(end.indices) & np.isfinite(values) & (values != 0)
        if not gone.any():
            return
        added = (end.by_group(tensor.double()) * np.where(gone, values, 0.0)[:, None, :]).sum(axis=2)
        stays = ~cut.removal.removed(end.rows)
        if added[stays].any():
            cut.add_to_bias(node, torch.from_numpy(added[stays]).to(tensor))


def _end_at(node: torch.fx.Node, structure: Structure) -> WeightedEnd | None:
    """Return where the input channels of a layer end."""
    return next((end for end in structure.ends_at(node) if isinstance(end, WeightedEnd)), None)


@handles(aten.linear.default)
class _Linear(_Layer):
    """Sums over the last axis of its input."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, weight, bias = tensor_arg(node, "input"), tensor_arg(node, "weight"), arg(node, "bias")
        rank = structure.rank(source)
        if structure.rank(weight) != 2:
            structure.pin_all(node, "its weight is one row")
            return
        for dim in range(rank - 1):
            structure.same(structure.axis(source, dim), structure.axis(node, dim))
        channels, columns = structure.axis(source, rank - 1), structure.axis(weight, 1)
        structure.same(channels, columns)
        out, rows = structure.axis(node, rank - 1), structure.axis(weight, 0)
        structure.same(out, rows)
        if bias is not None:
            structure.same(out, structure.axis(bias, 0))
        if channels is None or columns is None:
            return
        if rows is None:
            rows = structure.fresh(1)
            structure.pin(rows, "it is the only row")
        structure.end(WeightedEnd(node, channels[None], rows[None], weight, absorbs=True))


@handles(*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
class _Convolution(_Layer):
    """Sums over the channels of each group; the places stay whole."""

    channels = 1

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        source, weight, bias = tensor_arg(node, "input"), tensor_arg(node, "weight"), arg(node, "bias")
        groups = arg(node, "groups")
        if structure.rank(source) != structure.rank(weight):
            structure.pin_all(node, "it has no batch")
            return
        structure.same(structure.axis(source, 0), structure.axis(node, 0))
        for dim in range(2, structure.rank(node)):
            for value in (source, weight, node):
                structure.pin(structure.axis(value, dim), "a convolution moves along it")
        transposed = node.target in TRANSPOSED_CONVOLUTIONS
        ins = self._grouped(structure, source, weight, 0 if transposed else 1, groups, flat_weight=transposed)
        outs = self._grouped(structure, node, weight, 1 if transposed else 0, groups, flat_weight=not transposed)
        if groups > 1:
            group = structure.notes[node, "groups"] = structure.fresh(groups)
            for flat, inside in (ins, outs):
                structure.product(flat, [group] if inside is None else [group, inside])
        elif ins[1] is not None and outs[1] is not None:
            structure.same(*ins)
            structure.same(*outs)
        if isinstance(bias, torch.fx.Node) and structure.axis(bias, 0) is not None:
            structure.same(structure.axis(bias, 0), outs[0])
        end = TransposedEnd if transposed else WeightedEnd
        absorbs = not transposed and not self._pads(node)  # a transposed one adds more in the middle than at the edge
        structure.end(end(node, ins[0].reshape(groups, -1), outs[0].reshape(groups, -1), weight, absorbs=absorbs))

    @staticmethod
    def _grouped(
        structure: Structure, value: torch.fx.Node, weight: torch.fx.Node, axis: int, groups: int, *, flat_weight: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the numbers of the channels of a value, and of those inside one group (None if there is only one)."""
        flat = structure.axis(value, 1)
        if flat is None:  # one channel
            flat = structure.fresh(1)
            structure.pin(flat, "it is the only channel")
        inside = structure.axis(weight, axis)
        if flat_weight:
            if inside is not None:
                structure.same(inside, flat)
            inside = structure.fresh(len(flat) // groups) if len(flat) > groups else None
        if inside is None and groups == 1:
            inside = flat
        return flat, inside

    @staticmethod
    def _pads(node: torch.fx.Node) -> bool:
        """Return whether zeros are put beside the input."""
        padding = arg(node, "padding")
        if padding == "same":
            return any(size != 1 for size in shape(tensor_arg(node, "weight"))[2:])
        return padding != "valid" and any(amount != 0 for amount in padding)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Bring the number of groups up to date."""
        if arg(node, "groups") > 1:
            cut.set_arg(node, "groups", cut.count(cut.structure.notes[node, "groups"]))
        super().cut(node, cut)


@handles(
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.addmm.default,
    aten.baddbmm.default,
)  # fmt: skip
class _Matmul(Rule):
    """Sums over the columns of the left operand and the rows of the right one."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        added, left, right = _operands(node)
        ranks = structure.rank(left), structure.rank(right)
        summed = structure.axis(left, -1), structure.axis(right, -2 if ranks[1] > 1 else -1)
        structure.same(*summed)
        if summed[0] is not None and summed[1] is not None:
            structure.end(SumEnd(node, summed[0], summed[1]))
        out = structure.rank(node)
        if ranks[0] > 1:
            structure.same(structure.axis(left, -2), structure.axis(node, out - 1 - (ranks[1] > 1)))
        if ranks[1] > 1:
            structure.same(structure.axis(right, -1), structure.axis(node, out - 1))
        matrix = (ranks[0] > 1) + (ranks[1] > 1)
        for operand, rank in zip((left, right), ranks, strict=True):
            _broadcast(operand, max(rank - 2, 0), node, out - matrix, structure)
        if added is not None:
            _broadcast(added, structure.rank(added), node, out, structure)

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """A row, a column or a matrix of zeros yields zeros, or what is added."""
        structure, (added, left, right) = constants.structure, _operands(node)
        rank = structure.rank(node)
        matrix = [(operand, dim) for operand, dim in ((left, -2), (right, -1)) if structure.rank(operand) > 1]
        batches = rank - len(matrix)
        for dim, axis in enumerate(structure.axes(node)):
            if axis is None:
                continue
            behind = dim - batches - 2
            sources = [(left, behind), (right, behind)] if dim < batches else [matrix[dim - batches]]
            zero = np.logical_or.reduce([constants.along(source, at, len(axis)) == 0 for source, at in sources])
            beside = np.zeros(len(axis))
            if added is not None:
                held, beta = constants.along(added, dim - rank, len(axis)), plain_number(arg(node, "beta"))
                beside = np.where(held == 0, 0.0, np.nan) if beta is None else held * beta
            constants.values[axis[zero]] = beside[zero]


def _operands(node: torch.fx.Node) -> tuple[torch.fx.Node | None, torch.fx.Node, torch.fx.Node]:
    """Return what is added to a matrix product, if anything, and its two operands."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments if str(argument.type) == "Tensor"]
    left, right = (tensor_arg(node, name) for name in names[-2:])
    return (tensor_arg(node, names[0]) if len(names) > 2 else None), left, right


def _broadcast(operand: torch.fx.Node, count: int, node: torch.fx.Node, until: int, structure: Structure) -> None:
    """Say that the first ``count`` axes of an operand are broadcast to those of the result in front of ``until``."""
    for dim in range(count):
        if not structure.is_one(operand, dim):
            structure.same(structure.axis(operand, dim), structure.axis(node, until - count + dim))


@handles(aten.einsum.default)
class _Einsum(Rule):
    """Sums over the letters that the result does not have."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        equation, operands = str(arg(node, "equation")).replace(" ", ""), arg(node, "tensors")
        left, _, right = equation.partition("->")
        terms = left.split(",")
        if "->" not in equation or "..." in equation or any(len(set(term)) < len(term) for term in terms):
            structure.pin_all(node, "its equation has an ellipsis, a diagonal or no result")
            return
        axes: dict[str, list[Any]] = {}
        for term, operand in zip([*terms, right], [*operands, node], strict=True):
            for dim, letter in enumerate(term):
                axes.setdefault(letter, []).append(structure.axis(operand, dim))
        for letter, found in axes.items():
            for axis in found[1:]:
                structure.same(found[0], axis)
            if letter not in right and all(axis is not None for axis in found):
                structure.end(SumEnd(node, *found))

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """A letter that an operand has zeros for yields zeros."""
        structure = constants.structure
        left, _, right = str(arg(node, "equation")).replace(" ", "").partition("->")
        if not right or "..." in left:
            return
        for term, operand in zip(left.split(","), arg(node, "tensors"), strict=True):
            for dim, letter in enumerate(term):
                axis = structure.axis(operand, dim)
                to = structure.axis(node, right.index(letter)) if letter in right else None
                if axis is not None and to is not None:
                    constants.values[to[constants.values[axis] == 0]] = 0.0
