"""The matrices of groups of rows, which the experts of a mixture are: by whom they are read, and each as a layer."""

from __future__ import annotations

import operator

import torch

from fxopt.args import dtype, shape, tensor_arg
from fxopt.grouped_ops import GROUPED_MM, JOIN_GROUPS, SPLIT_GROUPS
from fxopt.passes.quantize.matrix_uses import behind_transpositions
from fxopt.passes.quantize.stored_weights import LayerWeight, StoredWeights
from fxopt.rewriter import Rewriter

__all__ = ["calls_of", "grouped_refusal", "outputs_in_rows", "separate_groups"]

Node = torch.fx.Node
aten = torch.ops.aten


def calls_of(weight: LayerWeight) -> list[tuple[Node, bool]]:
    """Return the calls that read the matrices of all groups, and whether each finds its outputs in their rows."""
    readers = [user for read in weight.reads for user in read.users]
    return [found for reader in readers for found in behind_transpositions(reader, axes=3)]


def grouped_refusal(weight: LayerWeight) -> str | None:
    """Return why the matrices stay floats, or None if all that reads them are products of groups of rows."""
    by_rows = {turned for _, turned in calls_of(weight)}
    for call, _ in calls_of(weight):
        if call.target is not GROUPED_MM:
            return f"its weight is also read by {call.name} ({call.target})"
        if dtype(tensor_arg(call, "x")) is not torch.float32:
            return f"its input is {dtype(tensor_arg(call, 'x'))}"
    return "its weight is read transposed by some and as it is by others" if len(by_rows) > 1 else None


def outputs_in_rows(weight: LayerWeight) -> torch.Tensor:
    """Return f32[groups, out, in] of the matrices that are read as f32[groups, in, out]."""
    (turned,) = {turned for _, turned in calls_of(weight)}
    held = weight.tensor.detach()
    return held if turned else held.transpose(1, 2)


def separate_groups(rw: Rewriter) -> None:
    """Give each group a linear layer of its own, which can be quantized by itself, where the matrices are constants."""
    for weight in StoredWeights(rw).weights(rw, [GROUPED_MM], skip=(), min_elements=0):
        if (reason := grouped_refusal(weight)) is not None:
            rw.skip(weight.layer, reason)
            continue
        matrices, why = outputs_in_rows(weight), "a layer for each group"
        for call, _ in calls_of(weight):
            _separate(rw, call, weight, matrices, why)


def _separate(rw: Rewriter, call: Node, weight: LayerWeight, matrices: torch.Tensor, why: str) -> None:
    trainable = weight.tensor.requires_grad
    x, offsets = tensor_arg(call, "x"), tensor_arg(call, "offsets")
    parts = rw.insert_call(SPLIT_GROUPS, (x, offsets), before=call, why=why)
    products = []
    for group, matrix in enumerate(matrices):
        part = rw.insert_call(operator.getitem, (parts, group), before=call, why=why)
        held = rw.constant(f"{weight.path}_{group}", matrix.clone(), near=call, trainable=trainable)
        products.append(rw.insert_call(aten.linear.default, (part, held), before=call, why=why))
    rows = shape(x)[0]
    if not isinstance(rows, int):
        rows = rw.insert_call(aten.sym_size.int, (x, 0), before=call, why=why)
    rw.replace_call(call, JOIN_GROUPS, (products, rows), why=why)
