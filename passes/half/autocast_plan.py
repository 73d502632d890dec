"""A precision plan by operator alone, as ``torch.autocast`` decides: no data are needed.

    in half        products of matrices, convolutions, recurrent layers, attention
    in float32     exponentials, logarithms, powers, softmax, norms, losses, sums
    as operands    everything else: in half if all the floats that it reads are, and in float32 otherwise

The lists are those of torch.amp for CUDA devices ("Op-specific behavior" in its documentation), whatever the device;
they go back to Micikevicius et al., Mixed Precision Training, ICLR 2018. Products of groups are products here. Batch
norm reads in half and keeps statistics and parameters in float32, as torch's kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.args import source_line
from fxopt.graph_module import graph_modules
from fxopt.moves import base_name, is_move
from fxopt.passes.half.operators import float_operands, half_candidates, kept_operands
from fxopt.passes.half.plan import PrecisionPlan
from fxopt.passes.half.planning import labels_of, nodes_fitting
from fxopt.rewriter import Rewriter

__all__ = ["autocast_plan"]

IN_HALF = frozenset({
    "__matmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot", "conv1d",
    "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "einsum", "gru",
    "grouped_mm", "gru_cell", "linear", "lstm", "lstm_cell", "matmul", "mm", "mv", "multi_head_attention", "prelu",
    "rnn_relu", "rnn_tanh", "rnn_relu_cell", "rnn_tanh_cell", "scaled_dot_product_attention",
})  # fmt: skip
IN_FLOAT32 = frozenset({
    "__pow__", "__rdiv__", "__rpow__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh",
    "cosine_embedding_loss", "cosine_similarity", "cross_entropy_loss", "cumprod", "cumsum", "dist", "erfinv", "exp",
    "expm1", "group_norm", "hinge_embedding_loss", "huber_loss", "instance_norm", "kl_div", "l1_loss", "layer_norm",
    "linalg_norm", "linalg_vector_norm", "log", "log10", "log1p", "log2", "log_softmax", "logsumexp",
    "margin_ranking_loss", "masked_group_norm", "masked_layer_norm", "mean", "mse_loss", "multi_margin_loss",
    "multilabel_margin_loss", "nll_loss", "nll_loss_nd", "norm", "pdist", "poisson_nll_loss", "pow", "prod",
    "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softmax", "softmin",
    "softplus", "sqrt", "std", "sum", "tan", "triplet_margin_loss", "var",
})  # fmt: skip


def autocast_plan(rw: Rewriter, dtype: torch.dtype, *, keep: Sequence[str] = ()) -> PrecisionPlan:
    """Return the plan, with the reason for each node that stays float32.

    Args:
        rw: Of the graph, which is only read.
        dtype: The type of half precision.
        keep: Patterns of what stays float32: nodes, operators such as ``"aten.linear"``, or modules.

    Raises:
        PassError: a pattern of ``keep`` fits nothing.
    """
    nodes, refused = half_candidates(rw, dtype)
    kept = nodes_fitting(labels_of(nodes), keep)
    reasons: dict[str, str] = dict(refused)
    dtypes: dict[str, torch.dtype] = {}
    halves: set[torch.fx.Node] = set()
    for module in graph_modules(rw.gm):
        for node in module.graph.nodes:
            name = rw.site_name(node)
            if name not in nodes:
                if is_move(node) and halves.issuperset(float_operands(node)):
                    halves.add(node)
                continue
            reason = "it is kept by the user" if name in kept else _reason(node, halves, rw)
            if reason is None:
                halves.add(node)
                dtypes[name] = dtype
            elif is_move(node):
                continue  # it keeps the type of what it moves
            else:
                line = source_line(node)
                dtypes[name], reasons[name] = torch.float32, f"{reason} ({line})" if line else reason
    return PrecisionPlan(dtypes, reasons, dtype=dtype)


def _reason(node: torch.fx.Node, halves: set[torch.fx.Node], rw: Rewriter) -> str | None:
    """Return why a node stays float32, or None."""
    name = base_name(node)
    if name in IN_HALF:
        return None
    if name in IN_FLOAT32:
        return f"{name} loses digits or range in half"
    kept = kept_operands(node)
    wide = [source for source in float_operands(node) if source not in halves and source not in kept]
    if wide:
        return f"it reads {rw.site_name(wide[0])} in float32"
    return None if float_operands(node) else "it makes floats of something else"
