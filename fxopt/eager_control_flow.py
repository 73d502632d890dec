"""Run ``cond`` and ``while_loop`` of a captured graph in eager mode: as the Python branch that they were.

torch runs them there by tracing both sides, and a backward graph, at every call. The side that is taken is run
directly instead: autograd records it as it records any Python code, dropout draws once, batch norm updates its
statistics only where it runs, and a branch costs no more than an ``if``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt.regions import COND, WHILE_LOOP

__all__ = ["EagerInterpreter", "eager_call", "holds_traced", "observing", "run_branches_eagerly"]

_OBSERVERS: list[Callable[[Any, bool], None]] = []


def run_branches_eagerly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``forward`` with its branches run directly, unless it is being traced or compiled."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            return forward(*args, **kwargs)
        if holds_traced((args, kwargs)):
            return forward(*args, **kwargs)
        with _EagerControlFlow():
            return forward(*args, **kwargs)

    return run


def eager_call(target: Any) -> Any:
    """Return what to call for a node's target: its branches are run directly if it has some."""
    return run_branches_eagerly(target) if target in (COND, WHILE_LOOP) else target


class EagerInterpreter(torch.fx.Interpreter):
    """Runs a graph node by node, its branches and loops as the graph itself does."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the target."""
        return eager_call(target)(*args, **kwargs)


def holds_traced(arguments: Any) -> bool:
    """Return whether something among the arguments stands for a tensor while a graph is traced."""
    return any(
        isinstance(leaf, torch.fx.Proxy | torch._subclasses.FakeTensor) for leaf in pytree.tree_leaves(arguments)
    )


@contextlib.contextmanager
def observing(observer: Callable[[Any, bool], None]) -> Iterator[None]:
    """Call ``observer`` with the graph of the true side, and whether it is taken, at every branch that runs."""
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.remove(observer)


class _EagerControlFlow(TorchFunctionMode):
    """While active, ``cond`` calls the side that its predicate picks, and ``while_loop`` turns in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is COND:
            with self:
                return _cond(*args, **(kwargs or {}))
        if func is WHILE_LOOP:
            with self:
                return _while_loop(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cond(
    predicate: Any, when_true: Callable[..., Any], when_false: Callable[..., Any], operands: tuple[Any, ...] = ()
) -> Any:
    taken = bool(predicate)
    for observer in _OBSERVERS:
        observer(when_true, taken)
    return (when_true if taken else when_false)(*operands)


def _while_loop(
    asks: Callable[..., Any], body: Callable[..., Any], carried: tuple[Any, ...], constants: tuple[Any, ...] = ()
) -> Any:
    while _single(asks(*carried, *constants)):
        carried = body(*carried, *constants)
    return tuple(carried)


def _single(answer: Any) -> bool:
    return bool(answer[0] if isinstance(answer, tuple | list) else answer)
