"""Operators that a file holds as a chain of smaller ones, computed step by step with each step rounded.

The chains are those that fxopt's exporter writes (export/translations). ``logsumexp`` and the vector norms are one
operator in ONNX, but the specification defines them by their formula, without a maximum taken out, and there are
runtimes that compute just this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxopt.grouped_ops import group_bounds

__all__ = ["CHAINS", "Chain", "Rounder"]

_BLOCK = 64
"""Terms that are added in float32 before the running sum is rounded, where sums are kept in half precision."""

Tensor = torch.Tensor


class Rounder:
    """Computes in float32 and rounds each result to half precision.

    Args:
        dtype: float16 or bfloat16.
        sums_in_half: Whether sums, means and matrix products round their running sum after each block of terms.
    """

    def __init__(self, dtype: torch.dtype, *, sums_in_half: bool = False) -> None:
        self.dtype, self.sums_in_half = dtype, sums_in_half

    def __call__(self, value: Tensor) -> Tensor:
        """Return float32 numbers that half precision holds: the nearest ones, ties to even."""
        return value.to(self.dtype).to(torch.float32)

    def sum(self, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        """Return the sum over some axes, all if there is none given."""
        axes = _axes(x, dim)
        if not self.sums_in_half or not axes:
            return self(x.sum(axes, keepdim) if axes else x)
        moved = x.movedim(axes, tuple(range(x.ndim - len(axes), x.ndim))).flatten(x.ndim - len(axes))
        total = torch.zeros_like(moved[..., :1]).squeeze(-1)
        for block in moved.split(_BLOCK, -1):
            total = self(total + self(block.sum(-1)))
        for axis in sorted(axes) if keepdim else ():
            total = total.unsqueeze(axis)
        return total

    def mean(self, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        """Return the mean over some axes, all if there is none given."""
        if not self.sums_in_half:
            return self(x.mean(_axes(x, dim), keepdim))
        count = math.prod(x.shape[axis] for axis in _axes(x, dim))
        return self(self.sum(x, dim, keepdim) / count)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the matrix product."""
        if not self.sums_in_half or a.shape[-1] <= _BLOCK:
            return self(torch.matmul(a, b))
        total: Tensor | None = None
        along = -2 if b.ndim > 1 else -1
        for left, right in zip(a.split(_BLOCK, -1), b.split(_BLOCK, along), strict=True):
            part = self(torch.matmul(left, right))
            total = part if total is None else self(total + part)
        assert total is not None
        return total


Chain = Callable[[Rounder, Mapping[str, Any]], Any]
"""Takes the arguments of a call by their name in the schema, floats in float32, and returns its result in float32."""


def _axes(x: Tensor, dim: Any) -> tuple[int, ...]:
    listed = range(x.ndim) if dim is None or (isinstance(dim, Sequence) and not dim) else dim
    return tuple(axis % x.ndim for axis in ([listed] if isinstance(listed, int) else listed)) if x.ndim else ()


def _variance(r: Rounder, a: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    x, dim, keepdim = a["self"], a.get("dim"), bool(a.get("keepdim"))
    given = a["correction"] if "correction" in a else int(a.get("unbiased", True))
    correction = 1 if given is None else given
    mean = r.mean(x, dim, True)
    centred = r(x - mean)
    squares = r(centred * centred)
    middle = mean if keepdim else r.mean(x, dim, False)
    if correction == 0:
        return r.mean(squares, dim, keepdim), middle
    count = math.prod(x.shape[axis] for axis in _axes(x, dim))
    return r(r.sum(squares, dim, keepdim) / max(count - correction, 0)), middle


def _deviation(r: Rounder, a: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    variance, mean = _variance(r, a)
    return r(variance.sqrt()), mean


def _norm(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    x, dim, keepdim = a["self"], a.get("dim"), bool(a.get("keepdim"))
    order = a.get("ord", a.get("p", 2))
    order = 2 if order is None else order
    if order == 1:
        return r.sum(x.abs(), dim, keepdim)
    if order == 2:
        return r(r.sum(r(x * x), dim, keepdim).sqrt())
    if order == 0 or math.isinf(order):
        return r(torch.linalg.vector_norm(x, order, dim, keepdim))
    return r(r.sum(r(x.abs() ** order), dim, keepdim) ** (1 / order))


def _logsumexp(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    return r(r.sum(r(a["self"].exp()), a["dim"], bool(a.get("keepdim"))).log())


def _rms_norm(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    x, weight = a["input"], a.get("weight")
    eps = torch.finfo(r.dtype).eps if a.get("eps") is None else a["eps"]
    axes = tuple(range(x.ndim - len(a["normalized_shape"]), x.ndim))
    root = r(r(r.mean(r(x * x), axes, True) + r(torch.tensor(eps))).sqrt())
    scaled = r(x / root)
    return scaled if weight is None else r(scaled * weight)


def _attention(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    query, key, value, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    scale = 1 / math.sqrt(query.shape[-1]) if a.get("scale") is None else a["scale"]
    if a.get("enable_gqa"):
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = r.matmul(r(query * scale), key.transpose(-2, -1))
    if a.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else r(scores + mask)
    return r.matmul(r(torch.softmax(scores, -1)), value)


def _heads(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    heads = a["heads"]
    parts = {n: a[n].unflatten(-1, (heads, a[n].shape[-1] // heads)).transpose(1, 2) for n in ("query", "key", "value")}
    return _attention(r, {**a, **parts, "attn_mask": a["mask"]}).transpose(1, 2).flatten(2)


def _log1p(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    x = a["self"]
    u = r(x + 1)
    logarithm = r(u.log())
    corrected = r(logarithm * r(x / r(u - 1)))
    return torch.where(u == 1, x, torch.where(x.abs() < 0.5, corrected, logarithm))


def _expm1(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    x = a["self"]
    return r(r(r(x.exp()) + 1) * r(torch.tanh(r(x * 0.5))))


def _silu(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    return r(a["self"] * r(torch.sigmoid(a["self"])))


def _mish(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    return r(a["self"] * r(torch.tanh(r(torch.nn.functional.softplus(a["self"])))))


def _cosine_similarity(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    x, y, dim, eps = a["x1"], a["x2"], a.get("dim", 1), r(torch.tensor(a.get("eps", 1e-8)))
    norms = [torch.maximum(_norm(r, {"self": part, "dim": dim, "keepdim": True}), eps) for part in (x, y)]
    return r.sum(r(r(x / norms[0]) * r(y / norms[1])), dim)


def _grouped(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    product: Tensor = a["x"].new_zeros(a["x"].shape[0], a["weight"].shape[2])
    for group, (start, end) in enumerate(group_bounds(a["offsets"])):
        product[start:end] = r.matmul(a["x"][start:end], a["weight"][group])
    return product


def _linear(r: Rounder, a: Mapping[str, Any]) -> Tensor:
    if not r.sums_in_half:
        return r(torch.nn.functional.linear(a["input"], a["weight"], a.get("bias")))
    product = r.matmul(a["input"], a["weight"].transpose(-2, -1) if a["weight"].ndim > 1 else a["weight"])
    return product if a.get("bias") is None else r(product + a["bias"])


def _first_of(chain: Callable[[Rounder, Mapping[str, Any]], tuple[Tensor, Tensor]]) -> Chain:
    return lambda r, a: chain(r, a)[0]


CHAINS: dict[str, Chain] = {
    "var": _first_of(_variance),
    "std": _first_of(_deviation),
    "var_mean": _variance,
    "std_mean": _deviation,
    "linalg_vector_norm": _norm,
    "norm": _norm,
    "logsumexp": _logsumexp,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention": _heads,
    "log1p": _log1p,
    "expm1": _expm1,
    "silu": _silu,
    "mish": _mish,
    "cosine_similarity": _cosine_similarity,
    "linear": _linear,
    "matmul": lambda r, a: r.matmul(a["self"], a["other"]),
    "mm": lambda r, a: r.matmul(a["self"], a["mat2"]),
    "bmm": lambda r, a: r.matmul(a["self"], a["mat2"]),
    "grouped_mm": _grouped,
    "sum": lambda r, a: r.sum(a["self"], a.get("dim"), bool(a.get("keepdim"))),
    "mean": lambda r, a: r.mean(a["self"], a.get("dim"), bool(a.get("keepdim"))),
}
"""By the name of the operator, without namespace and overload."""
