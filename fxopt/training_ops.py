"""fxopt's operators of graphs that are trained with quantizers in them.

``fxopt::learned_scale(scale, growth, gradient)``
    Yields ``scale * exp(growth)``: a learned step size (Esser et al., LSQ, ICLR 2020) that is above 0 whatever an
    optimizer does to ``growth``, and that weight decay draws to where it began. The gradient of ``growth`` is that of
    the result times ``gradient / result``, so that a step of gradient descent changes the result by the share of itself
    that the paper's rule does, with ``gradient`` for its gradient scale (section 2.2). It is cut off at -1 and 1: one
    step changes no scale by a larger share than the learning rate, where the paper asks for a lower one at 8 bits.
    Where several processes train, it is cut off in each, before the mean is taken. ``growth`` has a number for each of
    ``scale``, and one axis: FSDP splits parameters along it.
``fxopt::fake_quantize_bias(bias, input_scale, weight_scale)``
    Yields the bias as integer kernels add it: a multiple of ``input_scale * weight_scale`` that fits 32 bits.
``fxopt::norm_bias(bias, gamma, beta, mean, var, eps, input_scale, weight_scale)``
    Yields the ``beta`` with which a batch norm behind a layer with this ``bias`` gives what the integer kernel gives
    that took the batch norm in: its bias, ``beta + (bias - mean) s`` with ``s = gamma / sqrt(var + eps)``, is a
    multiple of ``input_scale * weight_scale * |s|``. What None stands for is that of batch norm.

The last two are straight-through for the bias or ``beta``, and give no gradient to anything else. ``input_scale`` has
no axes, ``weight_scale`` none or one, that of the channels.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["FAKE_QUANTIZE_BIAS", "LEARNED_SCALE", "NORM_BIAS"]

_LARGEST_GROWTH = 16.0  # e**16 is more than nine million: where training diverged, scales are still numbers
_LARGEST_BIAS = 0.999 * (2**31 - 1)

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define("learned_scale(Tensor scale, Tensor growth, float gradient) -> Tensor")
_LIBRARY.define("fake_quantize_bias(Tensor bias, Tensor input_scale, Tensor weight_scale) -> Tensor")
_LIBRARY.define(
    "norm_bias(Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps, "
    "Tensor input_scale, Tensor weight_scale) -> Tensor"
)


def _learned_scale(scale: torch.Tensor, growth: torch.Tensor, gradient: float) -> torch.Tensor:
    return scale * growth.reshape(scale.shape).clamp(-_LARGEST_GROWTH, _LARGEST_GROWTH).exp()


def _keep_scale(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.shape, ctx.gradient = inputs[1].shape, inputs[2]


def _growth_gradient(ctx: Any, outer: torch.Tensor) -> tuple[None, torch.Tensor, None]:
    (found,) = ctx.saved_tensors
    return None, (outer * (ctx.gradient / found)).clamp(-1, 1).reshape(ctx.shape), None


def _rounded(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Return the bias in multiples of the step, or of the smallest larger one that 32 bits are enough for."""
    precise = bias.double()
    step = torch.maximum(step.double(), precise.abs() / _LARGEST_BIAS)
    # Where the bias is 0, the step may be 0 too.
    return torch.where(step > 0, torch.round(precise / step) * step, precise)


def _fake_quantize_bias(bias: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    held = bias.detach()
    rounded = _rounded(held, (input_scale * weight_scale).detach()).to(bias.dtype)
    return rounded + (bias - held)


def _norm_bias(
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    input_scale: torch.Tensor,
    weight_scale: torch.Tensor,
) -> torch.Tensor:
    shift = torch.zeros_like(mean) if beta is None else beta
    with torch.no_grad():
        factor = (var.double() + eps).rsqrt()
        if gamma is not None:
            factor = factor * gamma.double()
        offset = mean.double() if bias is None else mean.double() - bias.double()
        folded = shift.double() - offset * factor
        change = _rounded(folded, input_scale.double() * weight_scale.double() * factor.abs()) - folded
    return shift + change.to(shift.dtype)


_LIBRARY.impl("learned_scale", _learned_scale, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::learned_scale", lambda scale, growth, gradient: torch.empty_like(scale))
torch.library.register_autograd("fxopt::learned_scale", _growth_gradient, setup_context=_keep_scale)
# Composite over differentiable ops: autograd derives the gradients.
_LIBRARY.impl("fake_quantize_bias", _fake_quantize_bias, "CompositeImplicitAutograd")
_LIBRARY.impl("norm_bias", _norm_bias, "CompositeImplicitAutograd")

LEARNED_SCALE = torch.ops.fxopt.learned_scale.default
FAKE_QUANTIZE_BIAS = torch.ops.fxopt.fake_quantize_bias.default
NORM_BIAS = torch.ops.fxopt.norm_bias.default
