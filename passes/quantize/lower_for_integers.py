"""Write with other operators what the target then computes in integers.

    before:  y = silu(x)                              after:  y = mul(x, sigmoid(x))
    before:  y = hardswish(x)                         after:  y = mul(x, hardsigmoid(x))
    before:  y, z = chunk(x, 2, 1)                    after:  y = slice(x, 1, 0, 8); z = slice(x, 1, 8, 16)
    before:  y = mean(x, [2, 3])                      after:  y = flatten(adaptive_avg_pool2d(x, [1, 1]), 1)
    before:  y = mean(x, [2, 3], keepdim=True)        after:  y = adaptive_avg_pool2d(x, [1, 1])
    before:  y = mean(mean(x, [3]), [2])              after:  as for [2, 3]
    before:  y = relu(max_pool2d(conv2d(x, ...), 2))  after:  y = max_pool2d(relu(conv2d(x, ...)), 2)
    before:  y = grouped_mm(x, w, offsets)            after:  p, q = split_groups(x, offsets)
                                                              y = join_groups([linear(p, w0), linear(q, w1)], rows)

The same functions of real numbers, rounded in another order.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from fxopt.args import arg, shape, tensor_arg
from fxopt.contracts import Contract
from fxopt.layer_operators import CONVOLUTIONS, MAX_POOLS
from fxopt.limits import LIMITS, limits_of
from fxopt.pass_base import Pass
from fxopt.passes.quantize.grouped_blocks import separate_groups
from fxopt.passes.quantize.placement import is_float, move_source
from fxopt.passes.quantize.target import ORT_CPU
from fxopt.rewriter import Rewriter

__all__ = ["LowerForIntegers"]

aten = torch.ops.aten

_GATES: dict[Any, tuple[Any, str]] = {
    aten.silu.default: (aten.sigmoid.default, "silu(x) = x sigmoid(x)"),
    aten.hardswish.default: (aten.hardsigmoid.default, "hardswish(x) = x hardsigmoid(x)"),
}
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default)


@dataclasses.dataclass(frozen=True)
class LowerForIntegers(Pass):
    """Replace operators without integer kernels by such as have one."""

    name: ClassVar[str] = "lower-for-integers"
    contract: ClassVar[Contract] = Contract.ROUNDING

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        for node in rw.calls(*_GATES, aten.mean.dim):
            if not is_float(node):
                rw.skip(node, f"{rw.dtype(node)} is not float32")
            elif node.target is aten.mean.dim:
                _mean_as_pool(rw, node)
            else:
                gate, why = _GATES[node.target]
                x = tensor_arg(node, "self")
                factor = rw.insert_call(gate, (x,), before=node, why=why)
                rw.replace_call(node, aten.mul.Tensor, (x, factor), why=why)
        for node in rw.calls(*_SPLITS):
            _split_as_slices(rw, node)
        for node in rw.calls(*LIMITS):
            _limit_before_pools(rw, node)
        separate_groups(rw)


def _limit_before_pools(rw: Rewriter, node: torch.fx.Node) -> None:
    """Cut the result of a convolution off before its largest values are taken, where a kernel does both in one."""
    x = node.args[0]
    pools: list[torch.fx.Node] = []
    while isinstance(x, torch.fx.Node) and x.target in MAX_POOLS and len(x.users) == 1:
        pools.append(x)
        x = tensor_arg(x, "self")
    if not pools or not isinstance(x, torch.fx.Node) or x.target not in CONVOLUTIONS or len(x.users) > 1:
        return
    if limits_of(node) is None:
        return
    why = "the largest of what is cut off is the largest, cut off"
    limited = rw.insert_call(node.target, (x, *node.args[1:]), node.kwargs, before=pools[-1], why=why)
    rw.replace_argument(pools[-1], x, limited, why=why)
    rw.replace_value(node, pools[0], why=why)


def _mean_as_pool(rw: Rewriter, node: torch.fx.Node) -> None:
    x, axes = tensor_arg(node, "self"), _axes(node)
    kept = arg(node, "keepdim")
    inner = x if x.target is aten.mean.dim and len(x.users) == 1 and _axes(x) is not None else None
    if inner is not None and not kept and len(axes or ()) == 1 and arg(inner, "keepdim") is False:
        x = tensor_arg(inner, "self")
        left = [axis for axis in range(len(shape(x))) if axis not in (_axes(inner) or ())]
        axes = {left[axis] for axis in axes or ()} | (_axes(inner) or set())
    if axes != {2, 3} or len(shape(x)) != 4:
        return  # the mean over other axes is no pool, and nothing to report
    why = "the mean over both image axes is a pool"
    pool = aten.adaptive_avg_pool2d.default
    if kept:
        rw.replace_call(node, pool, (x, [1, 1]), why=why)
        return
    pooled = rw.insert_call(pool, (x, [1, 1]), before=node, why=why)
    rw.replace_call(node, aten.flatten.using_ints, (pooled, 1), why=why)


def _split_as_slices(rw: Rewriter, node: torch.fx.Node) -> None:
    """Write the parts of a tensor as slices, through which integers can be moved one by one.

    Those of a linear layer, whose result stays a float, are left alone.
    """
    x = source = tensor_arg(node, "self")
    while (moved := move_source(source, ORT_CPU)) is not None:
        source = moved
    if not is_float(x) or source.target in _PRODUCTS:
        return
    axis = arg(node, "dim") % len(shape(x))
    start, ends = 0, []
    for part in node.meta["val"]:
        if not isinstance(part.shape[axis], int):
            return  # of a length that is known when the graph runs, and there is no integer kernel to gain
        ends.append((start, start := start + part.shape[axis]))
    for part in list(node.users):
        begin, end = ends[int(part.args[1])]  # type: ignore[arg-type]  # operator.getitem, whose index is a number
        rw.replace_call(part, aten.slice.Tensor, (x, axis, begin, end), why="part of a tensor, as a slice")


def _axes(mean: torch.fx.Node) -> set[int] | None:
    """Return the axes of a mean counted from the front; None if it is over all, or in another type."""
    axes, rank = arg(mean, "dim"), len(shape(tensor_arg(mean, "self")))
    if axes is None or arg(mean, "dtype") is not None:
        return None
    return {axis % rank for axis in axes}
