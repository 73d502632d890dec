"""Compute complex numbers as pairs of real ones, for runtimes that have no complex types.

    before:  z = view_as_complex(x);  w = mul(z, turn);  y = view_as_real(w)
    after:   re = x[..., 0] * turn[..., 0] - x[..., 1] * turn[..., 1];  im = ...;  y = stack([re, im], -1)

What moves elements moves pairs; sums are sums of pairs; products and quotients are spelled out. The same function of
real numbers.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from fxopt.args import arg
from fxopt.complex_pairs import WHY, Pairs, is_complex, rank_of, refusal, rule
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.rewriter import Rewriter

__all__ = ["has_complex", "without_complex"]

_aten = torch.ops.aten


def has_complex(gm: CapturedModule) -> bool:
    """Return whether a graph computes any complex tensor."""
    return any(is_complex(node) for module in graph_modules(gm) for node in module.graph.nodes)


def without_complex(gm: CapturedModule) -> CapturedModule:
    """Return a copy of a graph that computes pairs in place of complex numbers.

    Raises:
        ExportError: the graph takes or returns complex tensors, or an operator has no form for pairs.
    """
    rw = Rewriter(gm.clone(), "complex-pairs")
    for module in graph_modules(rw.gm):
        Pairs(rw, module).run()
    rw.finish()
    return rw.gm


# -- from real numbers to pairs, and back ----------------------------------------------------------------------------


@rule(_aten.view_as_complex.default)
def _from_real_view(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    pair: torch.fx.Node = node.args[0]  # type: ignore[assignment]  # a tensor
    return pair


@rule(_aten.complex.default)
def _from_parts(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    both = run.call(node, _aten.broadcast_tensors.default, list(node.args))
    return run.stacked(node, *(run.call(node, operator.getitem, both, which) for which in (0, 1)))


@rule(_aten.polar.default)
def _from_polar(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    length, angle = node.args
    cos, sin = (run.call(node, part, angle) for part in (_aten.cos.default, _aten.sin.default))
    return run.stacked(node, *(run.call(node, _aten.mul.Tensor, length, part) for part in (cos, sin)))


@rule(_aten.to.dtype, _aten.to.dtype_layout, _aten._to_copy.default)
def _cast(run: Pairs, node: torch.fx.Node) -> torch.fx.Node | None:
    value, held = node.args[0], node.meta["val"]
    if not held.is_complex():
        re = run.call(node, _aten.select.int, run.pair(node, value), -1, 0)
        run.rw.replace_call(node, _aten.to.dtype, (re, held.dtype), why=WHY)
        return None
    return run.call(node, _aten.to.dtype, run.pair(node, value), held.dtype.to_real())


@rule(_aten.view_as_real.default)
def _as_real_view(run: Pairs, node: torch.fx.Node) -> None:
    run.rw.replace_value(node, run.pair(node, node.args[0]), why=WHY)


@rule(_aten.real.default, _aten.imag.default)
def _part(run: Pairs, node: torch.fx.Node) -> None:
    which = 0 if node.target is _aten.real.default else 1
    run.rw.replace_call(node, _aten.select.int, (run.pair(node, node.args[0]), -1, which), why=WHY)


@rule(_aten.abs.default)
def _length(run: Pairs, node: torch.fx.Node) -> None:
    run.rw.replace_call(node, _aten.linalg_vector_norm.default, (run.pair(node, node.args[0]), 2, [-1], False), why=WHY)


@rule(_aten.angle.default)
def _angle(run: Pairs, node: torch.fx.Node) -> None:
    re, im = run.parts(node, node.args[0])
    run.rw.replace_call(node, _aten.atan2.default, (im, re), why=WHY)


# -- arithmetic ------------------------------------------------------------------------------------------------------


@rule(_aten._conj.default, _aten.conj.default, _aten._conj_physical.default, _aten.conj_physical.default)
def _conjugate(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    re, im = run.parts(node, node.args[0])
    return run.stacked(node, re, run.call(node, _aten.neg.default, im))


@rule(_aten.neg.default)
def _negative(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    return run.call(node, node.target, run.pair(node, node.args[0]))


@rule(
    _aten.add.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub.Scalar, _aten.rsub.Tensor, _aten.rsub.Scalar,
)  # fmt: skip
def _sum(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    first, second = (run.pair(node, arg(node, name)) for name in ("self", "other"))
    if "rsub" in str(node.target):
        first, second = second, first
    if (factor := arg(node, "alpha")) != 1:
        second = run.call(node, _aten.mul.Tensor, second, factor)
    return run.call(node, _aten.sub.Tensor if "sub" in str(node.target) else _aten.add.Tensor, first, second)


@rule(_aten.mul.Tensor, _aten.mul.Scalar)
def _product(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    a, b = node.args
    if not (is_complex(a) and is_complex(b)):
        pair, factor = (a, b) if is_complex(a) else (b, a)
        return run.scaled(node, _aten.mul.Tensor, run.pair(node, pair), factor)
    return _multiplied(run, node, run.parts(node, a), run.parts(node, b), _aten.mul.Tensor)


@rule(_aten.mm.default, _aten.bmm.default, _aten.matmul.default)
def _matrix_product(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    a, b = node.args
    return _multiplied(run, node, run.parts(node, a), run.parts(node, b), node.target)


def _multiplied(run: Pairs, node: torch.fx.Node, a: tuple[Any, Any], b: tuple[Any, Any], product: Any) -> torch.fx.Node:
    (a_re, a_im), (b_re, b_im) = a, b
    rr, ii, ri, ir = (run.call(node, product, *two) for two in ((a_re, b_re), (a_im, b_im), (a_re, b_im), (a_im, b_re)))
    return run.stacked(node, run.call(node, _aten.sub.Tensor, rr, ii), run.call(node, _aten.add.Tensor, ri, ir))


@rule(_aten.div.Tensor, _aten.div.Scalar)
def _quotient(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    a, b = node.args
    if not is_complex(b):
        return run.scaled(node, _aten.div.Tensor, run.pair(node, a), b)
    b_re, b_im = run.parts(node, b)
    mirrored = b_re, run.call(node, _aten.neg.default, b_im)
    squares = [run.call(node, _aten.mul.Tensor, part, part) for part in (b_re, b_im)]
    length = run.call(node, _aten.add.Tensor, *squares)
    return run.scaled(
        node, _aten.div.Tensor, _multiplied(run, node, run.parts(node, a), mirrored, _aten.mul.Tensor), length
    )


@rule(_aten.exp.default)
def _exponential(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    re, im = run.parts(node, node.args[0])
    length = run.call(node, _aten.exp.default, re)
    turned = [run.call(node, part, im) for part in (_aten.cos.default, _aten.sin.default)]
    return run.stacked(node, *(run.call(node, _aten.mul.Tensor, length, part) for part in turned))


@rule(_aten.stft.default)
def _spectra(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    """Slide all waves of a length over the signal: a convolution, which every runtime is fast at."""
    signal, length, window = arg(node, "self"), arg(node, "n_fft"), arg(node, "window")
    if is_complex(signal) or arg(node, "align_to_window"):
        raise refusal(node)
    hop, dtype = arg(node, "hop_length") or length // 4, signal.meta["val"].dtype
    bins = length if arg(node, "onesided") is False else length // 2 + 1
    turns = torch.outer(torch.arange(bins), torch.arange(length)).remainder(length) * (2 * math.pi / length)
    waves = torch.stack([turns.double().cos(), -turns.double().sin()]).flatten(0, 1)
    if arg(node, "normalized"):
        waves = waves / math.sqrt(length)
    outside = length - (arg(node, "win_length") or length)
    left, right = outside // 2, outside - outside // 2
    waves[:, :left] = waves[:, length - right :] = 0
    kernel = run.rw.constant(f"{node.name}_waves", waves[:, None].to(dtype), near=node, why=WHY)
    if window is not None:
        if right:
            window = run.call(node, _aten.constant_pad_nd.default, window, [left, right])
        kernel = run.call(node, _aten.mul.Tensor, kernel, window)
    signals = run.call(node, _aten.unsqueeze.default, signal, -2)
    found = run.call(node, _aten.conv1d.default, signals, kernel, None, [hop])
    parts = run.call(node, _aten.unflatten.int, found, -2, [2, bins])
    rank = rank_of(signal)
    return run.call(node, _aten.permute.default, parts, [*range(rank - 1), rank, rank + 1, rank - 1])


# -- what moves elements, or adds them up ----------------------------------------------------------------------------


def _axes(axes: Any, rank: int) -> Any:
    """Return an axis, or several, counted from the front, where the axis of the pairs is not."""
    if isinstance(axes, list | tuple):
        return [_axes(axis, rank) for axis in axes]
    return axes % rank if axes < 0 else axes


@rule(
    _aten.clone.default, _aten.contiguous.default, _aten.detach.default, _aten.alias.default,
    _aten.lift_fresh_copy.default, _aten.resolve_conj.default, _aten.resolve_neg.default,
)  # fmt: skip
def _same(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    return run.pair(node, node.args[0])


@rule(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.expand.default)
def _reshaped(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    value, sizes = node.args[:2]
    target = _aten.expand.default if node.target is _aten.expand.default else _aten.reshape.default
    return run.call(node, target, run.pair(node, value), [*sizes, 2])  # type: ignore[misc]  # a list of sizes


@rule(_aten.repeat.default)
def _repeated(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    value, times = node.args
    return run.call(node, node.target, run.pair(node, value), [*times, 1])  # type: ignore[misc]  # a list of numbers


@rule(_aten.flatten.using_ints)
def _flattened(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    value = node.args[0]
    first, last = (_axes(arg(node, name), rank_of(value)) for name in ("start_dim", "end_dim"))
    return run.call(node, node.target, run.pair(node, value), first, last)


@rule(_aten.permute.default)
def _permuted(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    value, order = node.args
    rank = rank_of(value)
    return run.call(node, node.target, run.pair(node, value), [*_axes(order, rank), rank])


@rule(_aten.t.default)
def _transposed(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    pair = run.pair(node, node.args[0])
    return run.call(node, _aten.transpose.int, pair, 0, 1) if rank_of(node) == 2 else pair


@rule(_aten.unsqueeze.default)
def _unsqueezed(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    value, axis = node.args
    return run.call(node, node.target, run.pair(node, value), _axes(axis, rank_of(value) + 1))


@rule(
    _aten.transpose.int, _aten.squeeze.dim, _aten.squeeze.dims, _aten.slice.Tensor, _aten.select.int,
    _aten.flip.default, _aten.index_select.default, _aten.sum.dim_IntList, _aten.mean.dim, _aten.cumsum.default,
    _aten.unbind.int, _aten.unflatten.int, _aten.narrow.default,
)  # fmt: skip
def _along_axes(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    value, *rest = node.args
    rank = rank_of(value)
    count = 2 if node.target is _aten.transpose.int else 1
    axes = rest[:count] or [0]
    if axes[0] is None or axes[0] == []:  # all of them
        axes = [list(range(rank))]
    pair = _as_summed(run, node, value)
    return run.call(node, node.target, pair, *(_axes(axis, rank) for axis in axes), *rest[count:])


def _as_summed(run: Pairs, node: torch.fx.Node, value: Any) -> torch.fx.Node:
    """Return the pair of an operand, of the type that the call is asked to sum in, if it is asked for one."""
    asked, pair = node.kwargs.get("dtype"), run.pair(node, value)
    return run.call(node, _aten.to.dtype, pair, asked.to_real()) if isinstance(asked, torch.dtype) else pair


@rule(_aten.sum.default, _aten.mean.default)
def _over_all(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    target = _aten.sum.dim_IntList if node.target is _aten.sum.default else _aten.mean.dim
    return run.call(node, target, _as_summed(run, node, node.args[0]), list(range(rank_of(node.args[0]))))


@rule(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)
def _parted(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    value, sizes = node.args[:2]
    return run.call(node, node.target, run.pair(node, value), sizes, _axes(arg(node, "dim"), rank_of(value)))


@rule(operator.getitem)
def _taken(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    return run.call(node, operator.getitem, run.pairs[node.args[0]], node.args[1])  # type: ignore[index]  # a node


@rule(_aten.cat.default, _aten.stack.default)
def _joined(run: Pairs, node: torch.fx.Node) -> torch.fx.Node:
    values: Any = node.args[0]
    rank = rank_of(values[0]) + (node.target is _aten.stack.default)
    return run.call(node, node.target, [run.pair(node, value) for value in values], _axes(arg(node, "dim"), rank))
