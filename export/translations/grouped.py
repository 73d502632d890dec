"""Products of groups of rows with a matrix each: the rows are split, and every group is multiplied by itself.

    sizes = [offsets, rows] - [0, offsets]
    x1, ..., xn, rest = Split(x, sizes);  y = Concat(x1 w1, ..., xn wn, 0)

No row is multiplied by the matrix of another group, and a group without rows costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from fxopt.export.emitter import Emitter, Number, Value, dims, dtype_of, tensor_of
from fxopt.export.registry import Refused, translates
from fxopt.export.translations.weight_only import product_with_blocks
from fxopt.grouped_ops import GROUPED_MM, JOIN_GROUPS, SPLIT_GROUPS
from fxopt.weight_only_ops import GROUPED_MATMUL_NBITS


@translates(GROUPED_MM)
def grouped_mm(emit: Emitter, x: Value, weight: Value, offsets: Value) -> Value:
    groups, _, columns = dims(weight)
    if not isinstance(groups, int):
        raise Refused("the number of groups is dynamic")
    matrices = _matrices(emit, weight, groups)
    return _products_of_groups(emit, x, offsets, columns, lambda rows, group: emit("MatMul", rows, matrices[group]))


@translates(GROUPED_MATMUL_NBITS)
def grouped_matmul_nbits(
    emit: Emitter,
    x: Value,
    packed: Value,
    scales: Value,
    zero_points: Value | None,
    offsets: Value,
    bits: int,
    block_size: int,
    features_in: int,
    accuracy_level: int,
) -> Value:
    groups, columns = dims(packed)[:2]
    integers, factors = _parts(emit, packed, groups), _parts(emit, scales, groups)
    middles = [None] * len(integers) if zero_points is None else _parts(emit, zero_points, groups)
    blocks = list(zip(integers, factors, middles, strict=True))
    form = (bits, block_size, features_in, accuracy_level)

    def multiplied(rows: Value, group: int) -> Value:
        return product_with_blocks(emit, rows, blocks[group], None, *form, None)

    return _products_of_groups(emit, x, offsets, columns, multiplied)


def _products_of_groups(
    emit: Emitter, x: Value, offsets: Value, columns: object, multiplied: Callable[[Value, int], Value]
) -> Value:
    """Return the products of all groups, and zeros for the rows behind the last one.

    Args:
        emit: What the nodes are emitted to.
        x: [rows, k].
        offsets: int[groups]: where each group ends.
        columns: Columns of each product.
        multiplied: Emits the product of the rows of a group.
    """
    parts = split_groups(emit, x, offsets)
    products = [multiplied(part, group) for group, part in enumerate(parts)]
    return _joined(emit, products, dims(x)[0], columns)


@translates(SPLIT_GROUPS)
def split_groups(emit: Emitter, x: Value, offsets: Value) -> list[Value]:
    rows, groups = dims(x)[0], int(dims(offsets)[0])
    ends = emit.cast(offsets, torch.int64)
    last = emit("Concat", ends, emit.sizes.vector([rows]), axis=0, dims=(groups + 1,))
    first = emit("Concat", [0], ends, axis=0, dims=(groups + 1,))
    sizes = emit("Sub", last, first, dims=(groups + 1,))
    *parts, _ = emit.many("Split", x, sizes, outputs=groups + 1, axis=0)
    return list(parts)


@translates(JOIN_GROUPS)
def join_groups(emit: Emitter, parts: Sequence[Value], rows: Number) -> Value:
    return _joined(emit, parts, rows, dims(parts[0])[1])


def _joined(emit: Emitter, parts: Sequence[Value], rows: Any, columns: Any) -> Value:
    """Return the parts one after the other, and zeros up to the number of rows."""
    whole = emit("Concat", *parts, axis=0)
    held = emit("Shape", whole, start=0, end=1, dims=(1,))
    left = emit("Sub", emit.sizes.vector([rows]), held, dims=(1,))
    shape = emit("Concat", left, emit.sizes.vector([columns]), axis=0, dims=(2,))
    rest = emit("Expand", emit.number(0, dtype_of(parts[0])), shape)
    return emit("Concat", whole, rest, axis=0, dims=(rows, columns))


def _parts(emit: Emitter, value: Value, groups: object) -> list[Value]:
    """Return what a constant holds for each group, as a constant of its own."""
    held = tensor_of(value)
    if held is None or not isinstance(groups, int):
        raise Refused("blocks of weights are computed when the graph runs")
    return [emit.initializer(f"{value.name}_{group}", held[group]) for group in range(groups)]


def _matrices(emit: Emitter, weight: Value, groups: int) -> list[Value]:
    """Return the matrix of each group: a constant of its own where the weight is one, transposed or not."""
    producer = weight.producer()
    turned = producer is not None and producer.op_type == "Transpose"
    stored = producer.inputs[0] if producer is not None and turned else weight
    if stored is None or (held := tensor_of(stored)) is None or (turned and _order(producer) != [0, 2, 1]):
        numbers = [emit.number(group, torch.int64) for group in range(groups)]
        return [emit("Gather", weight, number, axis=0, dims=dims(weight)[1:]) for number in numbers]
    each = [emit.initializer(f"{stored.name}_{group}", held[group]) for group in range(groups)]
    return [emit.transpose(matrix, [1, 0]) for matrix in each] if turned else each


def _order(transpose: ir.Node | None) -> list[int]:
    return [] if transpose is None else list(transpose.attributes["perm"].as_ints())
