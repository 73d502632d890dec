"""Which calls may be dropped, moved or merged: the effects of operators, read from their schemas and flags."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.args import arg, argument_positions
from fxopt.attributes import get_path
from fxopt.ops import GUARD, UPDATE_BUFFER

__all__ = ["has_effect", "is_in_place", "is_pure", "is_random", "trains"]

aten = torch.ops.aten
_ASSERTIONS = {
    aten._assert_async.msg,
    aten._assert_async.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_DROPOUT_PROBABILITY = {
    aten.scaled_dot_product_attention.default: "dropout_p",
    aten.dropout.default: "p",
    aten.feature_dropout.default: "p",
    aten.alpha_dropout.default: "p",
    aten.lstm.input: "dropout",
    aten.gru.input: "dropout",
    aten.rnn_tanh.input: "dropout",
    aten.rnn_relu.input: "dropout",
}


def trains(node: torch.fx.Node) -> bool | None:
    """Return the node's training flag as it is set, in whichever mode; None if the operator has none.

    A flag that differs between the modes counts as set: a node that is random in one mode only is still random.
    """
    if not isinstance(node.target, OpOverload):
        return None
    for name in ("train", "training"):
        if name in argument_positions(node.target):
            return bool(arg(node, name)) or any(node.meta.get("modes", {}).get(name, ()))
    return None


def is_random(node: torch.fx.Node) -> bool:
    """Return whether the node draws random numbers in some mode."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, HigherOrderOperator):
        return any(is_random(inner) for inner in _regions(node))
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    # Layers that drop values out draw nothing where the probability is 0.
    probability = _DROPOUT_PROBABILITY.get(node.target)
    if probability is not None:
        never = not arg(node, probability) and not any(node.meta.get("modes", {}).get(probability, ()))
        return not never and trains(node) is not False
    return trains(node) is not False


def has_effect(node: torch.fx.Node) -> bool:
    """Return whether running the node changes something beside its result: state, or an assertion that may fail."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if node.target in (UPDATE_BUFFER, GUARD) or node.target in _ASSERTIONS:
        return True
    if isinstance(node.target, HigherOrderOperator):
        return any(has_effect(inner) for inner in _regions(node) if inner.op not in ("placeholder", "output"))
    if isinstance(node.target, OpOverload):
        # Batch norm writes its running statistics while training, if it has any, which its schema does not tell.
        keeps_statistics = "running_mean" in argument_positions(node.target) and arg(node, "running_mean") is not None
        writes_statistics = keeps_statistics and bool(trains(node))
        return node.target._schema.is_mutable or writes_statistics
    return (
        getattr(node.target, "__module__", "") not in ("_operator", "math", "torch", "builtins")
        and node.target is not operator.getitem
    )


def is_in_place(target: object) -> bool:
    """Return whether calling ``target`` writes into one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable and target is not UPDATE_BUFFER


def is_pure(node: torch.fx.Node) -> bool:
    """Return whether the node always gives the same result for the same arguments and does nothing else."""
    return not has_effect(node) and not is_random(node)


def _regions(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the nodes of the graphs that a call of a higher-order operator runs."""
    for branch in node.all_input_nodes:
        if branch.op == "get_attr" and isinstance(body := _body(branch), torch.fx.GraphModule):
            yield from body.graph.nodes


def _body(branch: torch.fx.Node) -> object:
    owner = branch.graph.owning_module
    return get_path(owner, str(branch.target)) if owner is not None else None
