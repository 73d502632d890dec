"""Branches and loops: ``torch.cond`` becomes ``If``, ``while_loop`` becomes ``Loop``; wrappers are inlined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from fxopt.export.dtypes import onnx_dtype
from fxopt.export.emitter import Emitter, Value, dims
from fxopt.export.registry import Refused, translates
from fxopt.export.sizes import as_size
from fxopt.export.translations.scanned_rows import scanned_rows

higher_order = torch.ops.higher_order
Graph = torch.fx.GraphModule


@translates(higher_order.cond)
def cond(
    emit: Emitter, predicate: Any, when_true: Graph, when_false: Graph, operands: Sequence[Any] = ()
) -> Sequence[Value]:
    """Both branches read what they need from the graph around them."""
    if isinstance(predicate, bool):
        return emit.inline(when_true if predicate else when_false, operands)
    condition = emit.cast(emit.as_value(predicate), torch.bool)
    branches: dict[str, Any] = {
        name: emit.body(name, (), lambda graph=graph: emit.inline(graph, operands))  # type: ignore[misc]  # mypy infers no type of a default
        for name, graph in (("then_branch", when_true), ("else_branch", when_false))
    }
    return emit.many("If", condition, outputs=len(branches["then_branch"].outputs), **branches)


@translates(higher_order.while_loop)
def while_loop(
    emit: Emitter, condition: Graph, body: Graph, carried: Sequence[Any], constants: Sequence[Any] = ()
) -> Sequence[Value]:
    """The condition is computed once before the loop and again at the end of each turn; rows become scan outputs."""
    assert emit.node is not None
    call, name = emit.node, emit.node.name
    start = [emit.as_value(item) for item in carried]
    (first,) = emit.inline(condition, [*start, *constants])
    held = [node.meta["val"] for node in body.graph.nodes if node.op == "placeholder"][: len(start)]
    scanned = scanned_rows(call, condition, body, start)
    collected: Sequence[int] = () if scanned is None else scanned.places
    turn, running = (
        _variable(emit, f"{name}/turn", ir.DataType.INT64, ()),
        _variable(emit, f"{name}/running", ir.DataType.BOOL, ()),
    )
    variables = [
        value if place in collected else _carried(emit, f"{name}/carried", value, one)
        for place, (value, one) in enumerate(zip(start, held, strict=True))
    ]
    kept = [place for place in range(len(start)) if place not in collected]

    def run() -> list[Any]:
        after = emit.inline(body if scanned is None else scanned.body, [*variables, *constants])
        rows = [emit("Squeeze", row, [0]) for row in after[len(kept) :]]
        following = [*start]  # the test reads no rows
        for place, value in zip(kept, after, strict=False):
            following[place] = value
        (again,) = emit.inline(condition, [*following, *constants])
        return [again, *after[: len(kept)], *rows]

    loop = emit.body("body", [turn, running, *(variables[place] for place in kept)], run)
    first_values = [start[place] for place in kept]
    found = emit.many("Loop", None, emit.as_value(first), *first_values, outputs=len(start), body=loop)
    results = dict(zip([*kept, *collected], found, strict=True))
    for place in collected:
        # Of a loop without turns ORT knows no sizes of rows.
        results[place] = emit.reshape(results[place], dims(start[place]))
    return [results[place] for place in range(len(start))]


def _carried(emit: Emitter, name: str, value: Value, held: Any) -> Value:
    if isinstance(held, torch.Tensor):
        return _variable(emit, name, onnx_dtype(held.dtype), [as_size(size) for size in held.shape])
    return _variable(emit, name, value.dtype or ir.DataType.INT64, ())


def _variable(emit: Emitter, name: str, dtype: ir.DataType, shape: Sequence[Any]) -> Value:
    value = ir.Value(name=emit.unique(name), type=ir.TensorType(dtype))
    emit.set_dims(value, shape)
    return value


def _inlined(leading: int) -> Any:
    """Return a translation of a wrapper whose graph follows ``leading`` settings and comes before its operands."""

    def translate(emit: Emitter, *arguments: Any, **_: Any) -> Sequence[Value]:
        graph, operands = arguments[leading], arguments[leading + 1 :]
        return emit.inline(graph, operands)

    return translate


translates(higher_order.wrap_with_set_grad_enabled)(_inlined(1))
if hasattr(higher_order, "wrap_with_autocast"):
    translates(higher_order.wrap_with_autocast)(_inlined(4))
if hasattr(higher_order, "tag_activation_checkpoint"):
    translates(higher_order.tag_activation_checkpoint)(_inlined(0))


@translates(torch.ops.fxopt.guard.default)
def guard(emit: Emitter, holds: Value, message: str, values: Sequence[Value], names: Sequence[str]) -> None:
    """The condition becomes part of the output ``guards_hold``."""
    if emit.scope.parent is not None:
        raise Refused("a guard stands inside a branch or loop, where it cannot become an output")
    emit.guards.append(emit.cast(holds, torch.bool))


@translates(torch.ops.fxopt.update_buffer.default)
def update_buffer(emit: Emitter, buffer: Value, value: Value, active: bool) -> None:
    if active:
        raise Refused(
            "the graph writes to a buffer, and an ONNX file has no state; call eval(), or return the value as an output"
        )
