"""Fold batch normalization into the linear operator before or behind it.

    before:  y = conv2d(x, w, b);  z = batch_norm(y, gamma, beta, mean, var, eps)
    after:   z = conv2d(x, w', b')       w' = w s,  b' = (b - mean) s + beta,  s = gamma / sqrt(var + eps)

    before:  y = batch_norm(x, ...);  z = conv2d(y, w, b)      without padding
    after:   z = conv2d(x, w', b')       w' = w s (along the inputs),  b' = b + sum(w t),  t = beta - mean s

In evaluation both sides are the same function of real numbers; w' and b' are computed in float64 and rounded once. With
padding the second form would pad with zeros where the first pads with t, so it is taken only where t is zero.
A graph that can still be switched to training keeps the statistics it had: its batch norm is frozen.
Source: Jacob et al. 2018, Quantization and Training of Neural Networks, section 3.2.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.args import arg
from fxopt.contracts import Contract
from fxopt.ops import UPDATE_BUFFER
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

__all__ = ["FoldBatchNorm", "fold_after", "fold_before", "scale_and_shift"]

aten = torch.ops.aten
_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
}  # fmt: skip
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_LINEAR = {aten.linear.default}
_FOLDABLE = _CONVOLUTIONS | _TRANSPOSED | _LINEAR


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norms of evaluation into convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "fold-batch-norm"
    contract: ClassVar[Contract] = Contract.ROUNDING
    evaluation_only: ClassVar[bool] = True

    def run(self, rw: Rewriter) -> None:
        """Run on one graph and the graphs inside it."""
        folded: set[str] = set()
        for norm in rw.calls(aten.batch_norm.default):
            reason = _not_ready(norm)
            if reason:
                rw.skip(norm, reason)
                continue
            statistics = str(arg(norm, "running_mean").target).rpartition(".")[0]
            source = arg(norm, "input")
            behind = next(iter(norm.users)) if len(norm.users) == 1 else None
            why_not = _refuses_after(rw, source, norm)
            if why_not is None:
                _fold_after(rw, source, norm)
            elif behind is not None and behind.target in _CONVOLUTIONS | _LINEAR and arg(behind, "input") is norm:
                why_not = _refuses_before(rw, norm, behind)
                if why_not is None:
                    _fold_before(rw, norm, behind)
            if why_not is None:
                folded.add(f"{statistics}.num_batches_tracked" if statistics else "num_batches_tracked")
            else:
                rw.skip(norm, why_not)
        for update in rw.calls(UPDATE_BUFFER):
            buffer = arg(update, "buffer")
            if str(buffer.target) in folded and not update.users:
                rw.discard(update, why="counts the batches of a folded batch norm")


def _not_ready(norm: torch.fx.Node) -> str | None:
    if arg(norm, "training"):
        return "batch norm is training"
    names = ("weight", "bias", "running_mean", "running_var")
    if any(arg(norm, name) is None for name in names[2:]):
        return "it keeps no running statistics, so that it normalizes by the batch"
    if any(isinstance(arg(norm, name), torch.fx.Node) and arg(norm, name).op != "get_attr" for name in names):
        return "its statistics or weights are computed by the graph"
    return None


def _refuses_after(rw: Rewriter, source: torch.fx.Node, norm: torch.fx.Node) -> str | None:
    """Return why the batch norm cannot go into the operator before it, or None."""
    if source.op != "call_function" or source.target not in _FOLDABLE:
        return f"{source.name} before it is not a convolution or linear layer"
    if len(source.users) > 1:
        return f"{source.name} has {len(source.users)} users"
    if source.target in _LINEAR and rw.value(source).ndim != 2:
        return f"it normalizes axis 1 of {source.name}, whose features are the last axis"
    if arg(source, "weight").op != "get_attr":
        return f"the weight of {source.name} is computed by the graph"
    if isinstance(arg(source, "bias"), torch.fx.Node) and arg(source, "bias").op != "get_attr":
        return f"the bias of {source.name} is computed by the graph"
    return None


def _refuses_before(rw: Rewriter, norm: torch.fx.Node, layer: torch.fx.Node) -> str | None:
    """Return why the batch norm cannot go into the operator behind it, or None."""
    if arg(layer, "weight").op != "get_attr":
        return f"the weight of {layer.name} is computed by the graph"
    if isinstance(arg(layer, "bias"), torch.fx.Node) and arg(layer, "bias").op != "get_attr":
        return f"the bias of {layer.name} is computed by the graph"
    if layer.target in _LINEAR and rw.value(layer).ndim != 2:
        return f"it normalizes axis 1 of the input of {layer.name}, whose features are the last axis"
    _, shift = _affine(rw, norm)
    if layer.target in _CONVOLUTIONS and _pads(layer) and bool(shift.any()):
        return f"{layer.name} pads with zeros, which the shift of the batch norm would change"
    return None


def _pads(layer: torch.fx.Node) -> bool:
    padding = arg(layer, "padding")
    if isinstance(padding, str):
        return padding != "valid" and any(size != 1 for size in arg(layer, "weight").meta["val"].shape[2:])
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def _fold_after(rw: Rewriter, layer: torch.fx.Node, norm: torch.fx.Node) -> None:
    scale, shift = _affine(rw, norm)
    weight, bias = _weights(rw, layer)
    transposed = layer.target in _TRANSPOSED
    groups = arg(layer, "groups") if layer.target not in _LINEAR else 1
    new_weight, new_bias = fold_after(weight, bias, scale, shift, transposed=transposed, groups=groups)
    _install(rw, layer, new_weight, new_bias, at=norm, why=f"took in {norm.name}")
    _take_out(rw, norm, layer, layer)


def _fold_before(rw: Rewriter, norm: torch.fx.Node, layer: torch.fx.Node) -> None:
    scale, shift = _affine(rw, norm)
    weight, bias = _weights(rw, layer)
    groups = arg(layer, "groups") if layer.target not in _LINEAR else 1
    new_weight, new_bias = fold_before(weight, bias, scale, shift, groups=groups)
    _install(rw, layer, new_weight, new_bias, at=layer, why=f"took in {norm.name}")
    _take_out(rw, norm, arg(norm, "input"), layer)


def _take_out(rw: Rewriter, norm: torch.fx.Node, value: torch.fx.Node, layer: torch.fx.Node) -> None:
    note = "; train() will keep its present statistics" if "modes" in norm.meta else ""
    rw.replace_value(norm, value, why=f"folded into {layer.name}{note}")
    if not norm._erased:
        # It could be switched to training, where it writes its statistics; folded, it no longer can.
        rw.discard(norm, why=f"folded into {layer.name}")


def _affine(rw: Rewriter, norm: torch.fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    def read(name: str) -> torch.Tensor | None:
        source = arg(norm, name)
        return None if source is None else rw.tensor(source).detach().double()

    mean, var = read("running_mean"), read("running_var")
    assert mean is not None
    assert var is not None
    return scale_and_shift(read("weight"), read("bias"), mean, var, arg(norm, "eps"))


def _weights(rw: Rewriter, layer: torch.fx.Node) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = arg(layer, "bias")
    return rw.tensor(arg(layer, "weight")), None if bias is None else rw.tensor(bias)


def _install(
    rw: Rewriter, layer: torch.fx.Node, weight: torch.Tensor, bias: torch.Tensor, *, at: torch.fx.Node, why: str
) -> None:
    """Give the layer its new weight and bias, under their old names where nobody else reads these."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        source = arg(layer, name)
        if source is not None and len(source.users) == 1 and _sole_reader(rw, source):
            rw.set_tensor(source, tensor, why=why)
            continue
        wanted = str(arg(layer, "weight").target).rpartition(".")[0]
        path = f"{wanted}.{name}" if wanted else name
        rw.set_arg(layer, name, rw.constant(path, tensor, near=layer, trainable=True, why=why), why=why)


def _sole_reader(rw: Rewriter, source: torch.fx.Node) -> bool:
    return rw.readers(str(source.target), source.graph) == 1


def scale_and_shift(
    gamma: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return s and t with ``batch_norm(x) = s x + t`` in each channel; float64[channels] each."""
    scale = (var + eps).rsqrt() if gamma is None else gamma * (var + eps).rsqrt()
    shift = -mean * scale if beta is None else beta - mean * scale
    return scale, shift


def fold_after(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    transposed: bool,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the layer that equals ``scale * layer(x) + shift``.

    Args:
        weight: [out, in / groups, ...]; of a transposed convolution [in, out / groups, ...].
        bias: [out], or None.
        scale: float64[out].
        shift: float64[out].
        transposed: Whether the weight is that of a transposed convolution.
        groups: Number of groups; output channels are numbered group by group.
    """
    precise = weight.detach().double()
    if transposed:
        per_group = precise.unflatten(0, (groups, -1))
        factors = scale.reshape(groups, 1, -1, *([1] * (weight.ndim - 2)))
        folded = (per_group * factors).flatten(0, 1)
    else:
        folded = precise * scale.reshape(-1, *([1] * (weight.ndim - 1)))
    moved = shift if bias is None else bias.detach().double() * scale + shift
    return folded.to(weight.dtype), moved.to(weight.dtype)


def fold_before(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor, *, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the layer that equals ``layer(scale * x + shift)``, no padding taken into account.

    Args:
        weight: [out, in / groups, ...].
        bias: [out], or None.
        scale: float64[in].
        shift: float64[in].
        groups: Number of groups.
    """
    precise = weight.detach().double().unflatten(0, (groups, -1))
    kernel = [1] * (weight.ndim - 2)
    factors, offsets = (item.reshape(groups, 1, -1, *kernel) for item in (scale, shift))
    folded = (precise * factors).flatten(0, 1)
    added = (precise * offsets).flatten(0, 1).flatten(1).sum(1)
    moved = added if bias is None else bias.detach().double() + added
    return folded.to(weight.dtype), moved.to(weight.dtype)
