"""Give the sides of a branch the constants that they take from around it.

    before:  y = cond(p, then, otherwise, (x, w))          then(x, w): conv2d(x, w)
    after:   y = cond(p, then, otherwise, (x, w))          then(x, w): conv2d(x, <w>)     <w> is read inside

A pass that works on weights finds them where they are read. The tensor is shared, not copied; the operand stays, and is
read by nobody. Only evaluation is meant: a gradient would reach the tensor on two ways.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.contracts import Contract
from fxopt.pass_base import Pass
from fxopt.regions import COND, body_of
from fxopt.rewriter import Rewriter

__all__ = ["SinkConstants"]


@dataclasses.dataclass(frozen=True)
class SinkConstants(Pass):
    """Read the constants that a branch takes as operands inside its sides."""

    name: ClassVar[str] = "sink-constants"
    contract: ClassVar[Contract] = Contract.EXACT
    evaluation_only: ClassVar[bool] = True

    def run(self, rw: Rewriter) -> None:
        """Run on every branch; outer ones come first, so that what they hand on reaches inner ones."""
        for node in rw.calls(COND):
            operands = list(node.args[3])  # type: ignore[arg-type]  # cond(predicate, then, otherwise, operands)
            for side in (body_of(node.args[1]), body_of(node.args[2])):  # type: ignore[arg-type]  # both are nodes
                placeholders = [inner for inner in side.graph.nodes if inner.op == "placeholder"]
                for operand, inner in zip(operands, placeholders, strict=True):
                    if isinstance(operand, torch.fx.Node) and operand.op == "get_attr" and inner.users:
                        _sink(rw, operand, inner)


def _sink(rw: Rewriter, operand: torch.fx.Node, inner: torch.fx.Node) -> None:
    first = next(node for node in inner.graph.nodes if node.op != "placeholder")
    held = rw.tensor(operand)
    read = rw.constant(str(operand.target), held, near=first, trainable=held.requires_grad)
    for user in list(inner.users):
        rw.replace_argument(user, inner, read, why=f"reads {operand.target} itself")
