"""Compute in half precision as a device does, on a CPU that does not.

ONNX Runtime on a CPU computes a float16 file in float32, and torch's own kernels keep sums inside one operator in
float32. A device does neither everywhere. Here each operator reads operands in half precision, computes in float32, and
rounds its result to half precision: too large is infinite, too small is subnormal or 0 (IEEE 754, ties to even).

An operator that ONNX has no operator for is a chain of them in the file, emulated step by step, see
:mod:`fxopt.passes.half.chains`. One kernel with float32 inside are convolution, matrix product, softmax, layer norm
(ONNX: ``stash_type``), batch norm and pooling. Matrix products, sums and means add up in float32, or, as the most
pessimistic device, in half precision from block to block (``accumulate="half"``).

A number in the code is a constant of the file in the type of the tensor beside it: it is rounded too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.eager_control_flow import EagerInterpreter, eager_call
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.moves import is_move, name_of
from fxopt.passes.half.apply import CAST
from fxopt.passes.half.chains import CHAINS, Rounder
from fxopt.passes.half.operators import takes_numbers
from fxopt.passes.half.plan import HALF_TYPES
from fxopt.regions import COND, WHILE_LOOP

__all__ = ["ACCUMULATE", "Accumulate", "Emulated", "half_call"]

Accumulate = Literal["float32", "half"]
ACCUMULATE: tuple[str, ...] = get_args(Accumulate)
"""How the emulation may add up."""

_HALVES = frozenset(HALF_TYPES.values())
_CONVERTED = ("Tensor", "Optional[Tensor]", "number", "Optional[number]")
_COMPOSITE = "CompositeImplicitAutograd"
# Composite in torch, but one operator of ONNX.
_KERNELS = {
    "adaptive_avg_pool1d", "adaptive_max_pool1d", "avg_pool1d", "batch_norm", "celu", "clamp", "conv1d", "conv2d",
    "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "dropout", "einsum", "embedding",
    "group_norm", "gru", "instance_norm", "layer_norm", "log_softmax", "lstm", "masked_group_norm",
    "masked_layer_norm", "max_pool1d", "max_pool2d", "max_pool3d", "pad", "prelu", "relu6", "rnn_relu", "rnn_tanh",
    "rrelu", "selu", "softmax", "upsample_bilinear2d", "upsample_nearest2d", "where", "outer", "square", "true_divide",
}  # fmt: skip


def half_call(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype, accumulate: Accumulate = "float32"
) -> Any:
    """Return what a call yields in half precision, tensors of ``dtype`` in place of every float.

    Args:
        target: The operator.
        args: Its arguments; tensors of ``dtype`` are what it reads in half precision, float32 is read as it is.
        kwargs: Its keyword arguments.
        dtype: float16 or bfloat16.
        accumulate: In which precision products, sums and means add up.
    """
    if not isinstance(target, OpOverload):
        return eager_call(target)(*args, **kwargs)
    r = Rounder(dtype, sums_in_half=accumulate == "half")
    args, kwargs = _widened(target, args, kwargs, r)
    name = name_of(target)
    if name in CHAINS:
        names = [argument.name for argument in target._schema.arguments]
        result = CHAINS[name](r, {**dict(zip(names, args, strict=False)), **kwargs})
    elif name not in _KERNELS and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE):
        with _RoundEach(r):
            result = target(*args, **kwargs)
    else:
        result = target(*args, **kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.dtype is torch.float32 else t, result)


def _widened(target: OpOverload, args: Any, kwargs: Any, r: Rounder) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with halves in float32, and whatever becomes half beside them rounded."""
    positional, named = [*args], dict(kwargs)
    converts = takes_numbers(target)
    for position, argument in enumerate(target._schema.arguments):
        rounds = converts and argument.name != "alpha" and str(argument.type) in _CONVERTED

        def widen(leaf: Any, rounds: bool = rounds) -> Any:
            return _wide(leaf, r, rounds)

        if argument.name in named:
            named[argument.name] = pytree.tree_map(widen, named[argument.name])
        elif position < len(positional):
            positional[position] = pytree.tree_map(widen, positional[position])
    return tuple(positional), named


def _wide(leaf: Any, r: Rounder, rounds: bool) -> Any:
    """Return a part of an argument for a call in float32; ``rounds`` if it becomes half beside a tensor of halves."""
    if isinstance(leaf, torch.Tensor) and leaf.dtype is r.dtype:
        return leaf.to(torch.float32)
    if isinstance(leaf, torch.dtype):
        return torch.float32 if leaf is r.dtype else leaf
    if not rounds or isinstance(leaf, bool):
        return leaf
    if isinstance(leaf, torch.Tensor) and not leaf.is_floating_point() and leaf.dtype is not torch.bool:
        return r(leaf.to(torch.float32))
    return r(torch.tensor(float(leaf))).item() if isinstance(leaf, float | int) else leaf


class _RoundEach(TorchDispatchMode):
    """While active, every operator rounds its float results."""

    def __init__(self, r: Rounder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch declares no types
        self.r = r

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return pytree.tree_map_only(torch.Tensor, lambda t: self.r(t) if t.dtype is torch.float32 else t, result)


class _Interpreter(EagerInterpreter):
    """Runs a graph that holds halves, each call of them by :func:`half_call`."""

    def __init__(self, gm: torch.fx.GraphModule, accumulate: Accumulate) -> None:
        super().__init__(gm)
        self.accumulate: Accumulate = accumulate

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node."""
        if n.op != "call_function" or is_move(n) or n.target is CAST:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is COND:
            side = args[1] if bool(args[0]) else args[2]
            return self._region(side, args[3])
        if n.target is WHILE_LOOP:
            return self._loop(*args)
        dtype = _half_of((n.meta.get("val"), args))
        return super().run_node(n) if dtype is None else half_call(n.target, args, kwargs, dtype, self.accumulate)

    def _region(self, body: torch.fx.GraphModule, operands: Sequence[Any]) -> Any:
        return _Interpreter(body, self.accumulate).run(*operands, enable_io_processing=False)

    def _loop(self, asks: Any, body: Any, carried: Any, constants: Any = ()) -> Any:
        while bool(pytree.tree_leaves(self._region(asks, (*carried, *constants)))[0]):
            carried = self._region(body, (*carried, *constants))
        return tuple(carried)


def _half_of(values: Any) -> torch.dtype | None:
    """Return the type of half precision among tensors, or None."""
    return next(
        (t.dtype for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor) and t.dtype in _HALVES), None
    )


class Emulated:
    """A graph that holds halves, to be called as the graph is, and computing as a device would."""

    def __init__(self, gm: CapturedModule, accumulate: Accumulate = "float32") -> None:
        """Args: gm: the graph, in evaluation. accumulate: see :func:`half_call`."""
        self.gm, self.accumulate = gm, accumulate

    def flat_outputs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run the graph and return the leaves of its outputs."""
        return self.run(self.gm.flatten_inputs(*args, **kwargs))

    def run(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Run the graph on the leaves of its inputs and return the leaves of its outputs."""
        with isolated(self.gm):
            return tuple(_Interpreter(self.gm, self.accumulate).run(*leaves, enable_io_processing=False))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph and return what it returns."""
        return self.gm.graph.process_outputs(self.flat_outputs(*args, **kwargs))
