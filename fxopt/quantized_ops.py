"""fxopt's operators of quantized graphs, as ONNX defines them.

``fxopt::quantize(x, scale, zero_point, axis, qmin, qmax)``
    ``saturate(round(x / scale) + zero_point)`` as integers of the type of ``zero_point``, halves rounded to even.
``fxopt::dequantize(q, scale, zero_point, axis)``
    ``(q - zero_point) * scale`` in the type of ``scale``.
``fxopt::fake_quantize(x, scale, zero_point, axis, qmin, qmax)``
    Both in a row, bit for bit, and differentiable: the straight-through estimator for ``x`` (Bengio et al., 2013) and
    the learned-step-size gradient for ``scale`` (Esser et al., LSQ, ICLR 2020).

``scale`` and ``zero_point`` have no axes, or one, which then lies along ``axis`` of ``x``.

Source: ONNX operator specification, QuantizeLinear-13 and DequantizeLinear-13.
"""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ["DEQUANTIZE", "FAKE_QUANTIZE", "QUANTIZE", "along", "quantizer_in", "rounded"]

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define("quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int qmin, int qmax) -> Tensor")
_LIBRARY.define("dequantize(Tensor q, Tensor scale, Tensor zero_point, int axis) -> Tensor")
_LIBRARY.define("fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int qmin, int qmax) -> Tensor")


def along(parameter: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a parameter without axes as it is, and one with one axis shaped to lie along ``axis`` of ``like``."""
    if parameter.ndim == 0:
        return parameter
    shape = [1] * like.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def rounded(x: torch.Tensor, scale: float | torch.Tensor, zero_point: int, qmin: int, qmax: int) -> torch.Tensor:
    """Return what dequantizes from ``x`` quantized, without its gradient, bit for bit and in one buffer.

    ``torch.fake_quantize_per_tensor_affine`` also makes the mask of a backward pass, and takes seven times as long.
    """
    return (x / scale).round_().clamp_(qmin - zero_point, qmax - zero_point).mul_(scale)


def _quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, qmin: int, qmax: int
) -> torch.Tensor:
    steps = (x / along(scale, x, axis)).round_().add_(along(zero_point, x, axis).to(scale.dtype))
    return steps.clamp_(qmin, qmax).to(zero_point.dtype)


def _dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    if q.dtype in (torch.int32, torch.int64):  # float32 holds no integers above 2**24, and their difference may be one
        offset = q.double() - along(zero_point, q, axis).double()
        return (offset.to(scale.dtype) * along(scale, q, axis)).to(scale.dtype)
    return q.to(scale.dtype).sub_(along(zero_point, q, axis).to(scale.dtype)).mul_(along(scale, q, axis))


def _fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, qmin: int, qmax: int
) -> torch.Tensor:
    step, offset = along(scale, x, axis), along(zero_point, x, axis).to(scale.dtype)
    exact = x / step
    rounded = torch.round(exact)
    low, high = qmin - offset, qmax - offset
    # What rounds to an end is inside: the largest weight of a channel, which its scale is made of, among it.
    steps = torch.where(rounded < low, low, torch.where(rounded > high, high, exact))
    return (steps + (torch.clamp(rounded, low, high) - steps).detach()) * step


def _integers_like(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, qmin: int, qmax: int
) -> torch.Tensor:
    return _empty_like(x, zero_point.dtype)


def _floats_like(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int) -> torch.Tensor:
    return _empty_like(q, scale.dtype)


def _empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what ``torch.empty_like`` does, which for sizes that are symbols takes four times as long to find it."""
    expected: int | torch.SymInt = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not statically_known_true(stride == expected):
            return torch.empty_like(x, dtype=dtype)
        expected = expected * size
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)


_LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::quantize", _integers_like)
torch.library.register_fake("fxopt::dequantize", _floats_like)
# Composite over differentiable ops: autograd derives both gradients.
_LIBRARY.impl("fake_quantize", _fake_quantize, "CompositeImplicitAutograd")

QUANTIZE = torch.ops.fxopt.quantize.default
DEQUANTIZE = torch.ops.fxopt.dequantize.default
FAKE_QUANTIZE = torch.ops.fxopt.fake_quantize.default


def quantizer_in(gm: torch.fx.GraphModule) -> torch.fx.Node | None:
    """Return the first call of a graph, or of a graph inside it, that quantizes, dequantizes or stands for both."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, torch.fx.GraphModule)]
    quantizers = (QUANTIZE, DEQUANTIZE, FAKE_QUANTIZE)
    return next((node for graph in graphs for node in graph.nodes if node.target in quantizers), None)
