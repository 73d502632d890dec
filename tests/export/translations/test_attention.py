"""Attention: masks of both kinds, causal, scaled, grouped heads, rows that may attend to nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.export.proof import INF, op_types, prove

pytestmark = pytest.mark.ort

Q, K, V = torch.randn(3, 4, 5, 8), torch.randn(3, 4, 7, 8), torch.randn(3, 4, 7, 8)


def attend(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_attention(options, opset):
    prove(attend(**options), Q, K, V, opset=opset)


def test_attention_without_mask_is_five_nodes():
    assert op_types(prove(attend(), Q, K, V)) == ["Transpose", "Mul", "MatMul", "Softmax", "MatMul"]


@pytest.mark.parametrize("opset", [18, 20])
def test_boolean_mask(opset):
    mask = torch.rand(3, 1, 5, 7) > 0.4
    mask[1, 0, 2] = False  # may attend to nothing: zeros, not NaN
    prove(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q, K, V, mask, opset=opset)


def test_additive_mask():
    mask = torch.randn(3, 4, 5, 7)
    mask[0, :, :, 3:] = -INF
    mask[1, 2, 4] = -INF
    prove(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q, K, V, mask)


def test_a_constant_mask_is_stored():
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    prove(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), Q, K, V)


def test_grouped_heads():
    prove(attend(enable_gqa=True), torch.randn(3, 6, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8))


def test_dynamic_length_of_a_causal_mask():
    prove(
        lambda q, k: F.scaled_dot_product_attention(
            q.transpose(0, 2), k.transpose(0, 2), k.transpose(0, 2), is_causal=True
        ),
        torch.randn(5, 4, 2, 8),
        torch.randn(5, 4, 2, 8),
    )


def test_attention_without_a_batch():
    prove(attend(), torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 8), dynamic=False)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_module(need_weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)

    prove(Net(), torch.randn(3, 5, 8))


def test_transformer_encoder_layer():
    prove(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8))


def test_masks_shared_by_layers_are_converted_once():
    def forward(q, m):
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, q, q, m)
        return q

    types = op_types(prove(forward, torch.randn(3, 2, 5, 8), torch.rand(3, 1, 5, 5) > 0.3))
    assert types.count("ReduceMax") == 1
    assert types.count("Where") == 4  # the mask once, and zeros for each layer's output
