"""Calls that multiply by a constant matrix or look rows of it up, through however many transpositions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fxopt.args import arg, shape, tensor_arg

__all__ = ["INPUT", "LOOKUPS", "WEIGHT", "MatrixUse", "behind_transpositions", "is_transposition"]

Node = torch.fx.Node
aten = torch.ops.aten

LOOKUPS = (aten.embedding.default, aten.embedding_bag.padding_idx, aten.embedding_bag.default)
"""Operators that look rows of a matrix up."""
WEIGHT: dict[Any, str] = {
    aten.linear.default: "weight",
    **dict.fromkeys(LOOKUPS, "weight"),
    aten.matmul.default: "other",
    aten.mm.default: "mat2",
    aten.addmm.default: "mat2",
}
"""Operator: the argument that is the matrix."""
INPUT: dict[Any, str] = {
    aten.linear.default: "input",
    aten.matmul.default: "self",
    aten.mm.default: "self",
    aten.addmm.default: "mat1",
}
"""Operator: the argument that the matrix is multiplied by."""
_ROWS_ARE_OUTPUTS = (aten.linear.default, *LOOKUPS)


@dataclasses.dataclass(frozen=True)
class MatrixUse:
    """One call that multiplies by a constant matrix.

    Attributes:
        call: The call.
        read: The ``get_attr`` node of the matrix.
        operand: What the call itself reads: that node, or a transposition of it.
        by_rows: Whether the rows of the constant are the outputs.
    """

    call: Node
    read: Node
    operand: Node
    by_rows: bool

    @classmethod
    def of(cls, call: Node) -> MatrixUse | None:
        """Return how a call reads a constant matrix, or None if it reads none."""
        if call.op != "call_function" or call.target not in WEIGHT:
            return None
        operand = read = tensor_arg(call, WEIGHT[call.target])
        by_rows = call.target in _ROWS_ARE_OUTPUTS
        while is_transposition(read):
            read, by_rows = tensor_arg(read, "self"), not by_rows
        return cls(call, read, operand, by_rows) if read.op == "get_attr" else None

    @property
    def input(self) -> Node:
        """What the matrix is multiplied by. KeyError for a look-up."""
        return tensor_arg(self.call, INPUT[self.call.target])

    def as_read(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix of outputs in rows as the call reads it."""
        return matrix if self.call.target in _ROWS_ARE_OUTPUTS else matrix.t()


def is_transposition(node: Node, axes: int = 2) -> bool:
    """Return whether a call exchanges the two axes of a matrix, or the last two of a tensor of ``axes`` axes."""
    if node.op != "call_function" or node.target not in (aten.t.default, aten.transpose.int, aten.permute.default):
        return False
    if len(shape(tensor_arg(node, "self"))) != axes:
        return False
    if node.target is aten.permute.default:
        return [axis % axes for axis in arg(node, "dims")] == [*range(axes - 2), axes - 1, axes - 2]
    return node.target is aten.t.default or {arg(node, "dim0") % axes, arg(node, "dim1") % axes} == {axes - 2, axes - 1}


def behind_transpositions(node: Node, axes: int = 2) -> list[tuple[Node, bool]]:
    """Return a node, or what reads it through transpositions if it is one, and whether their number is odd."""
    if not is_transposition(node, axes):
        return [(node, False)]
    return [(reader, not turned) for user in node.users for reader, turned in behind_transpositions(user, axes)]
