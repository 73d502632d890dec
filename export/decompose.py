"""Fall back to PyTorch's own decomposition of one operator call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxopt.export.registry import NotTranslated

__all__ = ["decompose"]


def decompose(node: torch.fx.Node) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Return a graph of simpler operators that computes what ``node`` does, and the arguments of ``node`` it takes.

    Raises:
        NotTranslated: PyTorch has no decomposition of the operator, or it fails on these arguments.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        raise NotTranslated(f"{target} has no decomposition")
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    used = [leaf for leaf in leaves if isinstance(leaf, torch.fx.Node)]
    fakes = [leaf.meta["val"] for leaf in used]
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)

    def call(*values: Any) -> Any:
        remaining = iter(values)
        filled = [next(remaining) if isinstance(leaf, torch.fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return pytree.tree_leaves(target(*args, **kwargs))

    table = {target: found} if (found := _decompositions().get(target)) else {}
    fixed = _fixed_sizes(mode)
    try:
        # Without torch's Python kernels some operators, such as gru_cell, would tie a dynamic size to what it is now.
        with torch.no_grad(), _fake(mode), enable_python_dispatcher():
            inner = make_fx(call, decomposition_table=table, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
            if any(_mutates(made.target) for made in inner.graph.nodes):
                inner = make_fx(torch.func.functionalize(inner), tracing_mode="real", _allow_non_fake_inputs=True)(
                    *fakes
                )
    except Exception as error:  # whatever a decomposition raises means that it cannot do it
        raise NotTranslated(f"decomposition: {type(error).__name__}: {error}") from error
    if late := _fixed_sizes(mode) - fixed:
        raise NotTranslated(f"decomposition: it fixes the dynamic size {', '.join(sorted(late))}")
    if any(inner_node.target is target for inner_node in inner.graph.nodes):
        raise NotTranslated("PyTorch has no decomposition of it")
    for inner_node in inner.graph.nodes:
        inner_node.meta = {**node.meta, "val": inner_node.meta.get("val")}
    return inner, used


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return dict(torch._decomp.decomposition_table) | dict(torch._decomp.core_aten_decompositions())


def _fixed_sizes(mode: Any) -> set[str]:
    """Return the symbols of dynamic sizes that stand for one number."""
    found = getattr(mode, "shape_env", None)
    return {str(symbol) for symbol, value in found.replacements.items() if value.is_number} if found else set()


def _mutates(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _fake(mode: Any) -> Any:
    import contextlib

    return mode if mode is not None else contextlib.nullcontext()
