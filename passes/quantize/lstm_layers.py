"""Let the layers of an LSTM compute in 8-bit integers, all of them or some.

before:  y, h, c = lstm(x, [h0, c0], [w, r, b, b'])
after:   y, h, c = dynamic_lstm(x, [h0, c0], [w as i8, scales, r as i8, scales, b, b'])

before:  y, h, c = lstm(x, [h0, c0], [parameters of 3 layers])
after:   u, h1, c1 = lstm(x, [h0[:1], c0[:1]], [parameters of layer 0])
         y, h2, c2 = dynamic_lstm(u, [h0[1:], c0[1:]], [integer parameters of layers 1 and 2])
         h, c = cat([h1, h2]), cat([c1, c2])

Each layer of a stack is a site of its own, so that one that loses too much leaves the others alone. It is the first one
most often: what it reads comes from outside, and may have a few values that are far larger than the others, while the
others read hidden states, which lie between -1 and 1.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxopt.args import arg, dtype, tensor_arg
from fxopt.dynamic_ops import DYNAMIC_LSTM
from fxopt.passes.quantize.recurrent_weights import (
    Int8Rows,
    is_written,
    matrices_refusal,
    store,
)
from fxopt.passes.quantize.stored_weights import matrices_of, named_by, parameters_of_layer
from fxopt.rewriter import Rewriter

__all__ = ["quantize_lstm"]

Node = torch.fx.Node
aten = torch.ops.aten
_WHY = "integers, with ranges that are found when the graph runs"


def quantize_lstm(rw: Rewriter, call: Node, rows: Int8Rows, weights_only: Sequence[str] = ()) -> int:
    """Let the layers of an LSTM compute in integers, or record why not.

    Args:
        rw: Of the pass, at the site of the call.
        call: A call of ``aten.lstm.input``.
        rows: What is stored.
        weights_only: Patterns of names of weights or nodes whose layers compute in floats from stored integers.

    Returns:
        How many layers compute so.
    """
    if (reason := _stack_refusal(call)) is not None:
        rw.skip(call, reason)
        return 0
    layers = range(int(arg(call, "num_layers")))
    integers: dict[int, list[Node]] = {}
    refusals: dict[int, str] = {}
    stored = 0
    for layer in layers:
        with _layer_site(rw, layers, layer) as chosen:
            if not chosen:
                continue
            matrices = matrices_of(call, layer)
            floats = rows.dequantized.issuperset(matrices) or named_by(weights_only, call, _reads(rows, matrices))
            stays = is_written if floats else _is_no_lstm
            if not rows.dequantized.issuperset(matrices):
                reason = matrices_refusal(rw, call, matrices, rows, stays)
            if reason is not None:
                refusals[layer] = reason
            elif floats:
                store(rw, matrices, rows)
                stored += 1
            else:
                integers[layer] = _integer_parameters(call, layer, rows)
    if len(set(refusals.values())) == 1 and len(refusals) == len(layers):
        rw.skip(call, refusals[0])
    else:
        for layer, why in refusals.items():
            rw.skip(call, f"layer {layer}: {why}")
    if integers:
        with _layer_site(rw, layers, min(integers)):
            _compute_in_integers(rw, call, integers)
    return stored


def _layer_site(rw: Rewriter, layers: range, layer: int) -> contextlib.AbstractContextManager[bool]:
    return rw.part(layer) if len(layers) > 1 else contextlib.nullcontext(True)


def _reads(rows: Int8Rows, matrices: Sequence[Node]) -> list[Node]:
    return [read for matrix in matrices if matrix.op == "get_attr" for read in rows.reads(matrix)]


def _is_no_lstm(user: Node) -> bool:
    return user.target is not aten.lstm.input


def _stack_refusal(call: Node) -> str | None:
    """Return why no layer can compute in integers."""
    directions, each = 2 if arg(call, "bidirectional") else 1, 4 if arg(call, "has_biases") else 2
    if len(arg(call, "params")) != arg(call, "num_layers") * directions * each:
        return "it has projections (proj_size), which the integer kernel lacks"
    if _drops_out(call):
        return "dropout between its layers is active in evaluation"
    for operand in (tensor_arg(call, "input"), *arg(call, "hx")):
        if dtype(operand) is not torch.float32:
            return f"its input is {dtype(operand)}"
    return None


def _drops_out(call: Node) -> bool:
    """Return whether an LSTM drops values between its layers while it evaluates."""
    modes = call.meta.get("modes", {})
    train, share = (modes[name][1] if name in modes else arg(call, name) for name in ("train", "dropout"))
    return bool(train) and share > 0 and arg(call, "num_layers") > 1


def _integer_parameters(call: Node, layer: int, rows: Int8Rows) -> list[Node]:
    each = 4 if arg(call, "has_biases") else 2
    found: list[Node] = []
    for place, parameter in enumerate(parameters_of_layer(call, layer)):
        found += rows.nodes(parameter, near=call) if place % each < 2 else [parameter]
    return found


def _compute_in_integers(rw: Rewriter, call: Node, integers: Mapping[int, Sequence[Node]]) -> None:
    """Replace a stack by one call for each run of neighbours that compute alike.

    Args:
        rw: Of the pass.
        call: The stack.
        integers: The parameters of each layer that is to compute in integers.
    """
    layers = range(int(arg(call, "num_layers")))
    runs = [list(run) for _, run in itertools.groupby(layers, integers.__contains__)]
    if len(runs) == 1:
        rw.replace_call(call, *_run(call, layers, tensor_arg(call, "input"), arg(call, "hx"), integers), why=_WHY)
        return
    readers = [(int(user.args[1]), user) for user in call.users if user.target is operator.getitem]  # type: ignore[arg-type]  # an index
    wanted = {index for index, _ in readers}
    results: list[list[Node]] = [[], [], []]
    sequence = tensor_arg(call, "input")
    for run in runs:
        states = [_states(rw, call, state, run) for state in arg(call, "hx")]
        target, args = _run(call, run, sequence, states, integers)
        if target is DYNAMIC_LSTM:
            made = rw.insert_call(target, args, before=call, why=_WHY)
        else:
            made = rw.copy_call(call, args, {}, before=call, why="layers that stay floats")
        for index, held in enumerate(results):
            if index in wanted or (index == 0 and run is not runs[-1]):
                held.append(rw.insert_call(operator.getitem, (made, index), before=call, why="what some layers yield"))
        sequence = results[0][-1] if results[0] else sequence
    for index, reader in readers:
        new = results[0][-1] if index == 0 else rw.insert_call(
            aten.cat.default, (results[index], 0), before=call, why="the states of all layers"
        )  # fmt: skip
        rw.replace_value(reader, new, why=_WHY)


def _states(rw: Rewriter, call: Node, states: Node, run: Sequence[int]) -> Node:
    directions = 2 if arg(call, "bidirectional") else 1
    bounds = (0, run[0] * directions, (run[-1] + 1) * directions)
    return rw.insert_call(aten.slice.Tensor, (states, *bounds), before=call, why="the states of some layers")


def _run(
    call: Node, run: Sequence[int], sequence: Node, states: Sequence[Node], integers: Mapping[int, Sequence[Node]]
) -> tuple[Any, tuple[Any, ...]]:
    """Return the operator, and its arguments, that computes neighbouring layers of a stack."""
    inside = run[0] in integers
    parameters = [node for layer in run for node in (integers[layer] if inside else parameters_of_layer(call, layer))]
    has_biases, *options = (arg(call, name) for name in ("has_biases", "bidirectional", "batch_first"))
    first = (sequence, list(states), parameters, has_biases, len(run))
    if inside:
        return DYNAMIC_LSTM, (*first, *options)
    return aten.lstm.input, (*first, arg(call, "dropout"), arg(call, "train"), *options)
