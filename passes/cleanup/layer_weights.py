"""Weights and biases of linear operators: where they stand in a call, and how a pass gives a layer other ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.args import arg
from fxopt.layer_operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.passes.cleanup.batch_norm_algebra import fold_after
from fxopt.passes.cleanup.same_uses import Fold, uses
from fxopt.rewriter import Rewriter

__all__ = ["LAYER_ARGUMENTS", "fold_behind", "groups_of", "install", "sibling", "weights_of", "weights_refusal"]

aten = torch.ops.aten

LAYER_ARGUMENTS: dict[Any, tuple[str, str, str]] = {
    **dict.fromkeys(
        [*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, aten.linear.default, aten.batch_norm.default],
        ("input", "weight", "bias"),
    ),
    aten.addmm.default: ("mat1", "mat2", "self"),
}
"""What it reads, its weight and its bias, by the names of the arguments of each layer."""


def sibling(path: str, name: str) -> str:
    """Return the path of another tensor of the same module."""
    prefix = path.rpartition(".")[0]
    return f"{prefix}.{name}" if prefix else name


def weights_refusal(rw: Rewriter, layer: torch.fx.Node) -> str | None:
    """Return why a layer cannot get other weights, or None if it can."""
    for name in LAYER_ARGUMENTS[layer.target][1:]:
        source = arg(layer, name)
        if isinstance(source, torch.fx.Node) and source.op != "get_attr":
            return f"the {'bias' if name in ('bias', 'self') else 'weight'} of {layer.name} is computed by the graph"
    if layer.target is aten.addmm.default and (
        (arg(layer, "alpha"), arg(layer, "beta")) != (1, 1) or rw.value(arg(layer, "self")).ndim != 1
    ):
        return f"{layer.name} scales its terms, or adds more than a bias"
    return None


def groups_of(layer: torch.fx.Node) -> int:
    """Return the groups of a layer; 1 for one that has none."""
    return int(arg(layer, "groups")) if layer.target in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS) else 1


def weights_of(rw: Rewriter, layer: torch.fx.Node) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of a layer."""
    _, weight, bias = (arg(layer, name) for name in LAYER_ARGUMENTS[layer.target])
    return rw.tensor(weight), None if bias is None else rw.tensor(bias)


def fold_behind(rw: Rewriter, folds: Sequence[Fold], scale: torch.Tensor, shift: torch.Tensor | None) -> str | None:
    """Let a layer compute ``scale * layer + shift``, which goes; return why that is impossible, or None.

    Args:
        rw: Of the pass.
        folds: Uses of one layer whose weights can be changed, all alike.
        scale: float64[channels].
        shift: float64[channels]; None for none, so that a layer without bias gets none.
    """
    layer = folds[0].call
    weight, bias = weights_of(rw, layer)
    moved = torch.zeros_like(scale) if shift is None else shift
    if layer.target is aten.addmm.default:
        new_weight, new_bias = fold_after(weight.t(), bias, scale, moved)
        new_weight = new_weight.t()
    else:
        transposed = layer.target in TRANSPOSED_CONVOLUTIONS
        new_weight, new_bias = fold_after(weight, bias, scale, moved, transposed=transposed, groups=groups_of(layer))
    kept = None if bias is None and shift is None else new_bias
    return install(rw, folds, new_weight, kept)


def install(rw: Rewriter, folds: Sequence[Fold], weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Give a layer its new tensors, under their old names where nobody else reads these, and take out what goes.

    Returns:
        Why that is impossible, or None.
    """
    layer = folds[0].call
    if not all(bool(tensor.isfinite().all()) for tensor in (weight, bias) if tensor is not None):
        return f"the folded weights of {layer.name} are not finite in {weight.dtype}"
    why = f"took in {', '.join(fold.goes.name for fold in folds)}"
    _, weight_name, bias_name = LAYER_ARGUMENTS[layer.target]
    home = arg(layer, weight_name) or arg(layer, "running_mean")
    trainable = rw.tensor(home).requires_grad
    near = layer if len(folds) == 1 else home  # which stands before all uses of it
    for name, plain_name, tensor in ((weight_name, "weight", weight), (bias_name, "bias", bias)):
        source = arg(layer, name)
        if tensor is None:
            continue
        if source is not None and uses(rw, source) == len(folds):
            rw.set_tensor(source, tensor, why=why)
        else:
            path = str(source.target) if source is not None else sibling(str(home.target), plain_name)
            held = rw.constant(path, tensor, near=near, trainable=trainable, why=why)
            near = layer if len(folds) == 1 else held
            for fold in folds:
                rw.set_arg(fold.call, name, held, why=why)
    for fold in folds:
        _take_out(rw, fold.goes, fold.stays, f"folded into {fold.call.name}")
    return None


def _take_out(rw: Rewriter, node: torch.fx.Node, value: torch.fx.Node, why: str) -> None:
    note = "; train() will keep its present statistics" if "modes" in node.meta else ""
    rw.replace_value(node, value, why=why + note)
    if not node._erased:
        # A batch norm that could be switched to training, where it writes its statistics; folded, it no longer can.
        rw.discard(node, why=why)
