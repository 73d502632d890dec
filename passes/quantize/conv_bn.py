"""A layer and the batch norm behind it: two nodes in training, one integer kernel in evaluation.

    training:    z = batch_norm(conv2d(x, fake_quantize(w, s)), gamma, beta', mean, var, training)
    evaluation:  z = conv2d(x, w', b')      w' = fake_quantize(w, s) f,  f = gamma / sqrt(var + eps)

One scale for each output channel commutes with the factor f of that channel:

    fake_quantize(w f, s |f|) = f fake_quantize(w, s)

since the integers of weights lie even around zero and halves are rounded to even on both sides. So the weight need not
be folded to be quantized as the integer kernel will have it, and what Krishnamoorthi (arXiv:1806.08342, section 3.2)
gets by folding with the running statistics and dividing by f behind the layer, conv(x, fake_quantize(w f, s |f|)) / f,
is conv(x, fake_quantize(w, s)). The batch norm gets its statistics from that, as in any other training, and nothing is
divided by the f of a channel with gamma = 0. The scale s |f| of the folded weight follows the batch norm by itself.
"""

from __future__ import annotations

from typing import Any

import torch

from fxopt.args import arg
from fxopt.layer_operators import CONVOLUTIONS
from fxopt.ops import SELECT_MODE
from fxopt.pass_base import run_passes
from fxopt.passes.cleanup.batch_norm_algebra import fold_after, scale_and_shift
from fxopt.passes.quantize.preparation import BEFORE_NORMS, BEHIND_NORMS
from fxopt.passes.quantize.weights import constant_of
from fxopt.rewriter import Rewriter

__all__ = ["FoldedNorm", "as_integer_layers", "constant_result", "evaluation_source", "folded_scales"]

aten = torch.ops.aten
_NORM = aten.batch_norm.default
_DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}
_LAYERS: dict[Any, tuple[str, str]] = {  # what each calls its weight and its bias
    **dict.fromkeys((*CONVOLUTIONS, aten.linear.default), ("weight", "bias")),
    aten.addmm.default: ("mat2", "self"),
}  # fmt: skip


class FoldedNorm:
    """A batch norm that went into the layer before it.

    Attributes:
        name: Site name of the batch norm.
        factor: f64[channels], ``gamma / sqrt(var + eps)``.
    """

    def __init__(self, name: str, factor: torch.Tensor) -> None:
        self.name, self.factor = name, factor


def as_integer_layers(rw: Rewriter) -> dict[str, FoldedNorm]:
    """Make a graph in eval mode what the quantizers of integer kernels are placed in; return the folded batch norms.

    The graph is frozen, and each batch norm behind a layer becomes part of it. Layers, and all other operators that
    stay, keep their names.

    Returns:
        The batch norm that each layer took in, by the site name of the layer.
    """
    name, known = rw.pass_name, len(rw.skips)
    folded: dict[str, FoldedNorm] = {}
    run_passes(rw, BEFORE_NORMS)
    for norm in rw.calls(_NORM):
        reason = _refuses(rw, norm)
        if reason is None:
            layer = arg(norm, "input")
            folded[rw.site_name(layer)] = _fold(rw, layer, norm)
        else:
            rw.skip(norm, reason)
    run_passes(rw, BEHIND_NORMS)
    rw.skips[known:] = [skip for skip in rw.skips[known:] if skip.pass_name == name]
    return folded


def folded_scales(scale: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return the scales of the folded weight, f32[channels], given those of the weight: ``s |f|``.

    A channel with f = 0 keeps its scale: its weights are zeros, and any scale stands for them.
    """
    if factor is None:
        return scale
    product = (scale.double() * factor.abs()).float()
    return torch.where(product > 0, product, scale)


def _refuses(rw: Rewriter, norm: torch.fx.Node) -> str | None:
    """Return why the batch norm cannot be part of the layer before it, or None."""
    layer = arg(norm, "input")
    if arg(norm, "training") or arg(norm, "running_mean") is None or arg(norm, "running_var") is None:
        return "it keeps no running statistics, so that it normalizes by the batch"
    if layer.op != "call_function" or layer.target not in _LAYERS:
        return f"{layer.name} before it is not a convolution or linear layer"
    if len(layer.users) > 1:
        return f"{layer.name} has {len(layer.users)} users"
    sources = [arg(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    sources += [arg(layer, name) for name in _LAYERS[layer.target]]
    if any(isinstance(source, torch.fx.Node) and source.op != "get_attr" for source in sources):
        return f"its weights, or those of {layer.name}, are computed by the graph"
    if layer.target is aten.addmm.default and (
        (arg(layer, "alpha"), arg(layer, "beta")) != (1, 1) or rw.value(arg(layer, "self")).ndim != 1
    ):
        return f"{layer.name} scales its terms, or adds more than a bias"
    features_last = layer.target in (aten.linear.default, aten.addmm.default)
    wanted = 2 if features_last else rw.value(arg(layer, "weight")).ndim
    if rw.value(layer).ndim != wanted:
        return f"axis 1 of {layer.name}, which it normalizes, is not that of the output channels"
    return None


def _fold(rw: Rewriter, layer: torch.fx.Node, norm: torch.fx.Node) -> FoldedNorm:
    mean, var = (rw.tensor(arg(norm, name)).detach().double() for name in ("running_mean", "running_var"))
    gamma, beta = (
        None if arg(norm, name) is None else rw.tensor(arg(norm, name)).detach().double() for name in ("weight", "bias")
    )
    factor, shift = scale_and_shift(gamma, beta, mean, (var + arg(norm, "eps")).sqrt())
    weight_name, bias_name = _LAYERS[layer.target]
    weight, bias = arg(layer, weight_name), arg(layer, bias_name)
    transposed = layer.target is aten.addmm.default
    held = rw.tensor(weight).t() if transposed else rw.tensor(weight)
    new_weight, new_bias = fold_after(held, None if bias is None else rw.tensor(bias), factor, shift)
    new_weight = new_weight.t().contiguous() if transposed else new_weight
    for name, plain, tensor in ((weight_name, "weight", new_weight), (bias_name, "bias", new_bias)):
        _give(rw, layer, name, f"{str(weight.target).rpartition('.')[0]}.{plain}".lstrip("."), tensor, norm)
    found = FoldedNorm(rw.site_name(norm), factor)
    rw.replace_value(norm, layer, why=f"folded into {layer.name}")
    return found


def _give(rw: Rewriter, layer: torch.fx.Node, name: str, path: str, tensor: torch.Tensor, norm: torch.fx.Node) -> None:
    """Set a weight or bias under the name that fold-batch-norm would leave it, so that plans go by the same names."""
    source, why = arg(layer, name), f"took in {norm.name}"
    if source is not None and len(source.users) == 1 and rw.readers(str(source.target), source.graph) == 1:
        rw.set_tensor(source, tensor, why=why)
        return
    path = path if source is None else str(source.target)
    rw.set_arg(layer, name, rw.constant(path, tensor, near=layer, why=why), why=why)


def evaluation_source(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the node whose value this one yields in evaluation, or None if it computes something."""
    if node.op == "call_function" and node.target in _DROPOUTS:
        return arg(node, "input")  # type: ignore[no-any-return]  # dropout reads a node
    return node.args[1] if node.target is SELECT_MODE else None  # type: ignore[return-value]  # select_mode reads nodes


def constant_result(node: torch.fx.Node) -> torch.Tensor | None:
    """Return what a node yields in evaluation if no input has a say in it, else None."""
    if node.op == "get_attr":
        return constant_of(node)
    if node.op != "call_function":
        return None
    source = evaluation_source(node)
    if source is not None:
        return constant_result(source)
    known = {argument: constant_result(argument) for argument in node.all_input_nodes}
    if not known or any(result is None for result in known.values()):
        return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda argument: known[argument])
    with torch.no_grad():
        found = node.target(*args, **kwargs)  # type: ignore[operator]  # the target of a call can be called
    return found if isinstance(found, torch.Tensor) else None
