"""fxopt's operator for attention of several heads, heads side by side along the last axis.

``fxopt::multi_head_attention(query, key, value, mask, heads, scale, is_causal)``
    Splits the last axis of each input into ``heads`` parts, computes ``aten::scaled_dot_product_attention`` for each,
    and puts the results side by side. query f32[N, L, heads * E], key f32[N, S, heads * E], value f32[N, S, heads * V];
    mask broadcasts to [N, heads, L, S]: bool, true where a key is seen, or floats that are added. The result is
    f32[N, L, heads * V], bit for bit what the calls in a row yield, with their gradients.

Source: Vaswani et al., Attention Is All You Need, NIPS 2017, section 3.2.2.
"""

from __future__ import annotations

import torch

__all__ = ["MULTI_HEAD_ATTENTION"]

_LIBRARY = torch.library.Library("fxopt", "FRAGMENT")
_LIBRARY.define(
    "multi_head_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, int heads, float? scale, "
    "bool is_causal) -> Tensor"
)


def _multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    scale: float | None,
    is_causal: bool,
) -> torch.Tensor:
    parts = [x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2) for x in (query, key, value)]
    mixed: torch.Tensor = torch.ops.aten.scaled_dot_product_attention.default(
        *parts, attn_mask=mask, is_causal=is_causal, scale=scale
    )
    return mixed.transpose(1, 2).flatten(2)


# Composite over differentiable ops: autograd derives the gradients.
_LIBRARY.impl("multi_head_attention", _multi_head_attention, "CompositeImplicitAutograd")

MULTI_HEAD_ATTENTION = torch.ops.fxopt.multi_head_attention.default
