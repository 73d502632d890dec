"""Attention by itself: heads, places inside heads, grouped queries, masks, scales, and what stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.attention_ops import MULTI_HEAD_ATTENTION
from tests.passes.prune.nets import Shrunk, captured, net, randomized, shrink, shrunk

N = ({0: "batch"},)
X = torch.randn(3, 5, 6)


def layers(heads: int, width: int, key_heads: int | None = None) -> dict[str, nn.Module]:
    keys = key_heads or heads
    return {
        "q": nn.Linear(6, heads * width), "k": nn.Linear(6, keys * width), "v": nn.Linear(6, keys * width),
        "last": nn.Linear(heads * width, 4),
    }  # fmt: skip


def told(found: Shrunk, reason: str) -> bool:
    """Return whether something stays for a reason."""
    return any(reason in why for _, why in found.removal.kept_for.values())


def split(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


@pytest.mark.parametrize("prefer", ["heads", "longest"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}])
def test_attention_of_several_heads(prefer, options):
    def forward(self, x):
        parts = [split(layer(x), 8) for layer in (self.q, self.k, self.v)]
        return self.last(F.scaled_dot_product_attention(*parts, **options).transpose(1, 2).flatten(2))

    found = shrunk(net(forward, **layers(4, 8)), X, dynamic=N, prefer=prefer)
    assert found.shape("q.weight") == (16, 6)
    assert found.shape("last.weight") == (4, 16)


@pytest.mark.parametrize("prefer", ["heads", "longest"])
def test_grouped_queries_lose_heads_of_keys_with_all_of_their_queries(prefer):
    def forward(self, x):
        parts = [split(layer(x), 4 if prefer == "heads" else 8) for layer in (self.q, self.k, self.v)]
        return self.last(F.scaled_dot_product_attention(*parts, enable_gqa=True).transpose(1, 2).flatten(2))

    parts = layers(8, 4, key_heads=4) if prefer == "heads" else layers(4, 8, key_heads=2)
    found = shrunk(net(forward, **parts), X, dynamic=N, prefer=prefer, onnx=prefer == "heads")
    assert found.shape("q.weight") == (16, 6)
    assert found.shape("k.weight") == (8, 6)


def test_queries_of_one_head_of_keys():
    def forward(self, x):
        parts = [split(layer(x), 4) for layer in (self.q, self.k, self.v)]
        return self.last(F.scaled_dot_product_attention(*parts, enable_gqa=True).transpose(1, 2).flatten(2))

    found = shrunk(net(forward, **layers(4, 4, key_heads=1)), X, dynamic=N, prefer="heads")
    assert found.shape("q.weight") == (8, 6)
    assert found.shape("k.weight") == (4, 6)


def test_mask_of_each_head_is_cut_with_its_head():
    def forward(self, x):
        parts = [split(layer(x), 8) for layer in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=self.slopes[None])
        return self.last(mixed.transpose(1, 2).flatten(2))

    found = shrunk(net(forward, slopes=torch.randn(4, 5, 5), **layers(4, 8)), X, dynamic=N, prefer="heads")
    assert found.shape("slopes") == (2, 5, 5)


def test_place_that_is_zero_in_the_query_alone_goes_from_the_key_as_well():
    def forward(self, x):
        parts = [split(layer(x), 8) for layer in (self.q, self.k, self.v)]
        return self.last(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    gm = captured(net(forward, **layers(2, 8)), X, dynamic=N)
    with torch.no_grad():
        for name in ("q.weight", "q.bias"):
            gm.get_parameter(name)[[3, 11]] = 0  # place 3 of both heads
            gm.get_parameter(name)[4] = 0  # place 4 of the first head alone
    found = shrink(gm, X)
    assert found.shape("k.weight") == (14, 6)
    assert found.shape("v.weight") == (16, 6)
    assert told(found, "scaled_dot_product_attention(*parts)")
    assert told(found, "sums over it, and it is not 0")


class Module(nn.Module):
    """``torch.nn.MultiheadAttention`` between two linear layers."""

    def __init__(self, *, batch_first: bool = True, need_weights: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        mixed, weights = self.attention(y, y, y, need_weights=self.need_weights)
        return (self.last(mixed), weights) if self.need_weights else (self.last(mixed),)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dynamic", [None, N])
def test_multi_head_attention_module_loses_heads(batch_first, dynamic):
    model = randomized(Module(batch_first=batch_first))
    if dynamic and not batch_first:
        dynamic = ({1: "batch"},)
    found = shrunk(model, X, dynamic=dynamic, prefer="heads", onnx=dynamic == N)
    assert found.shape("attention.in_proj_weight") == (24, 16)
    assert found.shape("attention.out_proj.weight") == (16, 8)


def test_multi_head_attention_module_loses_places_and_its_stream():
    found = shrunk(randomized(Module()), X, dynamic=N)
    assert found.shape("attention.in_proj_weight") == (24, 8)
    assert found.shape("first.weight") == (8, 6)


def test_heads_whose_weights_are_averaged_over_a_dynamic_batch_stay():
    gm = captured(randomized(Module(need_weights=True)), X, dynamic=N)
    with torch.no_grad():
        gm.get_parameter("attention.in_proj_weight").view(3, 4, 4, 16)[:, 1] = 0
        gm.get_parameter("attention.in_proj_bias").view(3, 4, 4)[:, 1] = 0
    found = shrink(gm, X)
    assert found.shape("attention.in_proj_weight") == (48, 16)
    assert told(found, "a reshape joins it with a size that is not fixed")


@pytest.mark.parametrize("prefer", ["heads", "longest"])
@pytest.mark.parametrize("mask", [None, torch.rand(5, 5) > 0.3, torch.randn(1, 4, 5, 5)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_attention(prefer, mask, scale):
    def forward(self, x):
        given = self.slopes if mask is not None and mask.ndim == 4 else mask
        mixed = MULTI_HEAD_ATTENTION(self.q(x), self.k(x), self.v(x), given, 4, scale, False)
        return self.last(mixed) + self.slopes.sum()

    slopes = torch.randn(1, 4, 5, 5) if mask is not None and mask.ndim == 4 else torch.randn(1)
    model = net(forward, slopes=slopes, **layers(4, 6))
    found = shrunk(model, X, dynamic=N, prefer=prefer)
    assert found.shape("k.weight") == (12, 6)
    assert found.shape("last.weight") == (4, 12)
    (call,) = [node for node in found.gm.graph.nodes if node.target is MULTI_HEAD_ATTENTION]
    assert call.args[4] == (2 if prefer == "heads" else 4)


def test_fused_attention_of_a_value_with_itself():
    def forward(self, x):
        y = self.q(x)
        return self.last(MULTI_HEAD_ATTENTION(y, y, y, None, 4, None, False))

    found = shrunk(net(forward, **layers(4, 6)), X, dynamic=N, prefer="heads")
    assert found.shape("q.weight") == (12, 6)


def test_fused_attention_keeps_a_place_that_is_zero_in_some_heads_alone():
    def forward(self, x):
        return self.last(MULTI_HEAD_ATTENTION(self.q(x), self.k(x), self.v(x), None, 2, None, False))

    gm = captured(net(forward, **layers(2, 4)), X, dynamic=N)
    with torch.no_grad():
        for name in ("q.weight", "q.bias"):
            gm.get_parameter(name)[[1, 5, 2]] = 0  # place 1 of both heads, place 2 of the first
    found = shrink(gm, X)
    assert found.shape("k.weight") == (6, 6)
    assert told(found, "sums over it, and it is not 0 in each head")
