"""What a rule is, and which one an operator has."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload

import fxopt.passes.prune.rules as package

if TYPE_CHECKING:
    from fxopt.passes.prune.constants import Constants
    from fxopt.passes.prune.cut import Cut
    from fxopt.passes.prune.structure import Structure

__all__ = ["Rule", "axis_order", "handles", "rule_for"]

_RULES: dict[Any, Rule] = {}


class Rule:
    """What pruning has to know of an operator. Without a rule of its own, an operator keeps all of its indices."""

    def relate(self, node: torch.fx.Node, structure: Structure) -> None:
        """Say how the indices of inputs and outputs hang together."""
        structure.pin_all(node, f"there is no rule for {node.target}")

    def constants(self, node: torch.fx.Node, constants: Constants) -> None:
        """Say which indices of the outputs are one and the same number throughout, whatever the inputs of the model."""
        constants.hand_on(node)

    def cut(self, node: torch.fx.Node, cut: Cut) -> None:
        """Rewrite the arguments that hold sizes. The tensors themselves are cut already."""


def handles(*targets: Any) -> Callable[[type[Rule]], type[Rule]]:
    """Register a rule for operators."""

    def register(rule: type[Rule]) -> type[Rule]:
        made = rule()
        for target in targets:
            assert target not in _RULES, f"{target} has two rules"
            _RULES[target] = made
        return rule

    return register


def axis_order(node: torch.fx.Node, rank: int) -> list[int]:
    """Return which axis of its input each axis of a permutation is, found by permuting axes of sizes 2, 3, 4 and so on.

    Args:
        node: The call; copies that permute nothing will do as well.
        rank: How many axes its input has.
    """
    probe = torch.empty([2 + dim for dim in range(rank)], device="meta")
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda _: probe)
    return [size - 2 for size in node.target(*args, **kwargs).shape]  # type: ignore[operator]  # an operator


def rule_for(node: torch.fx.Node) -> Rule:
    """Return the rule for what a node does."""
    if "placeholder" not in _RULES:
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{found.name}")
    if node.op != "call_function":
        return _RULES.get(node.op, _UNKNOWN)
    rule = _RULES.get(node.target)
    if rule is None and isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = _RULES["pointwise"]
    return rule or _UNKNOWN


_UNKNOWN = Rule()
