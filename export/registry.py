"""The table of translations: which function turns an operator into ONNX nodes.

A translation takes the :class:`~fxopt.export.emitter.Emitter` and the operator's arguments in the order of its schema
(keyword-only ones too), and returns one value for each tensor that the operator returns:

    @translates(torch.ops.my_library.scaled_relu.default)
    def scaled_relu(emit: Emitter, x: Value, scale: float) -> Value:
        return emit("Mul", emit("Relu", x), scale)

Tensors arrive as ONNX values, sizes as integers or sympy expressions, everything else as PyTorch has it. A tensor
argument for which the graph holds a number arrives as that number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = ["TRANSLATIONS", "NotTranslated", "Refused", "Translation", "translates"]

Translation = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])
Target = OpOverload | HigherOrderOperator | Callable[..., Any]


class NotTranslated(Exception):  # noqa: N818  (it steers the search, and never reaches the user)
    """A translation does not cover these arguments; the next way to translate the operator is tried."""


class Refused(Exception):  # noqa: N818  (it reaches the user as ExportError)
    """No translation of these arguments would be right; the export ends here."""


TRANSLATIONS: dict[Any, Translation] = {}
"""Operator: the function that translates it."""


def translates(*targets: Target | OpOverloadPacket, replace: bool = False) -> Callable[[F], F]:
    """Register the decorated function as the translation of operators.

    Args:
        targets: Operators, such as ``torch.ops.aten.relu.default``; a packet such as ``torch.ops.aten.relu`` stands
            for all its overloads that have no ``out`` argument.
        replace: Allow to replace a translation that exists.

    Raises:
        TypeError: the function cannot take the arguments that the operator has.
        ValueError: the operator has a translation already, and ``replace`` is not set.
    """

    def register(function: F) -> F:
        for target in _overloads(targets):
            if target in TRANSLATIONS and not replace:
                raise ValueError(
                    f"{target} is translated by {TRANSLATIONS[target].__qualname__} already; "
                    "pass replace=True to replace it"
                )
            _check_signature(target, function)
            TRANSLATIONS[target] = function
        return function

    return register


def _overloads(targets: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = []
    for target in targets:
        if not isinstance(target, OpOverloadPacket):
            found.append(target)
            continue
        overloads = [getattr(target, name) for name in target.overloads()]
        found += [
            overload
            for overload in overloads
            if not any(
                argument.is_out or (argument.alias_info and argument.alias_info.is_write)
                for argument in overload._schema.arguments
            )
            and "Dimname" not in str(overload._schema)
        ]
    return found


def _check_signature(target: Any, function: Translation) -> None:
    """Raise TypeError unless ``function(emit, *arguments of target's schema)`` is a legal call."""
    if not isinstance(target, OpOverload):
        return
    signature = inspect.signature(function)
    try:
        signature.bind(None, *target._schema.arguments)
    except TypeError as error:
        raise TypeError(
            f"{function.__qualname__}{signature} cannot translate {target._schema}: {error}; "
            "it is called with the emitter and every argument of the schema, in order"
        ) from None
