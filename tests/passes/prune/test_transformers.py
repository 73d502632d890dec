"""Heads, places inside heads, hidden units and the stream of transformers: each pruned, shrunk and compared."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import convnext, maxvit, swin_transformer, vision_transformer

from tests.passes.prune.nets import randomized
from tests.passes.prune.norm_masks import Prefer, shrunk_with_norms

pytestmark = pytest.mark.ort

N = ({0: "batch"},)
TOKENS = ({0: "batch", 1: "length<=12"}, {0: "batch", 1: "length<=12"})
VOCABULARY, WIDTH = 40, 32


QUICK = {
    ("llama", "longest"), ("swin v1", "heads"), ("convnext", "longest"),
}  # fmt: skip


def cases(names: Iterable[str]) -> list[Any]:
    """Return each net with both ways to prune it; those that are not quick run with the long tests."""
    both = [
        (name, prefer) for name in names for prefer in ("longest", "heads") if (name, prefer) != ("convnext", "heads")
    ]
    return [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in both]


class Reader(nn.Module):
    """A language model, and a layer that reads its hidden states: they are not the result, so that they can go."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.last = model, nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.model(input_ids=tokens, attention_mask=mask)[0])


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=12,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=12
    )
    return transformers.DistilBertModel(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=12, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    return transformers.GPT2Model(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=8, intermediate_size=48, max_position_embeddings=12, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config)


def t5_encoder() -> nn.Module:
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config)


@dataclasses.dataclass(frozen=True)
class Language:
    """A model, how many head groups it has in all layers, and what one of its parameters is left with.

    Attributes:
        make: Makes the model.
        heads: How many heads each family has.
        shapes: Shapes of parameters after every other group is gone, by what was pruned.
    """

    make: Callable[[], nn.Module]
    heads: list[int]
    shapes: dict[str, dict[str, tuple[int, ...]]]


LANGUAGE = {
    "bert": Language(bert, [4, 4], {
        "longest": {
            "encoder.layer.0.attention.self.query.weight": (16, 16), "encoder.layer.1.output.dense.weight": (16, 24),
            "embeddings.word_embeddings.weight": (VOCABULARY, 16), "embeddings.LayerNorm.weight": (16,),
        },
        "heads": {"encoder.layer.1.attention.self.value.bias": (16,)},
    }),
    "distilbert": Language(distilbert, [4, 4], {
        "longest": {"transformer.layer.0.attention.v_lin.weight": (16, 16), "transformer.layer.1.ffn.lin2.bias": (16,)},
        "heads": {"transformer.layer.0.attention.out_lin.weight": (32, 16)},
    }),
    "gpt2": Language(gpt2, [4, 4], {
        "longest": {"h.0.attn.c_attn.weight": (16, 48), "h.1.mlp.c_proj.weight": (64, 16), "ln_f.weight": (16,)},
        "heads": {"h.0.attn.c_attn.weight": (32, 48), "h.0.attn.c_proj.weight": (16, 32)},
    }),
    "llama": Language(llama, [4, 4], {
        "longest": {
            "layers.0.self_attn.q_proj.weight": (32, 16), "layers.0.self_attn.k_proj.weight": (16, 16),
            "layers.1.mlp.down_proj.weight": (16, 24), "norm.weight": (16,),
        },
        "heads": {"layers.0.self_attn.q_proj.weight": (32, 32), "layers.0.self_attn.k_proj.weight": (16, 32)},
    }),
    "t5_encoder": Language(t5_encoder, [4], {
        "longest": {
            "encoder.block.0.layer.0.SelfAttention.q.weight": (16, 16), "encoder.final_layer_norm.weight": (16,),
            "encoder.block.1.layer.1.DenseReluDense.wo.weight": (16, 24),
        },
        "heads": {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2)},
    }),
}  # fmt: skip


@pytest.mark.parametrize(("name", "prefer"), cases(LANGUAGE))
def test_language_model(name: str, prefer: Prefer) -> None:
    case = LANGUAGE[name]
    tokens, mask = torch.randint(0, VOCABULARY, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    found = shrunk_with_norms(
        randomized(Reader(case.make()), 0.25),
        tokens,
        mask,
        dynamic=TOKENS,
        prefer=prefer,
        onnx=(name, prefer) == ("llama", "longest"),
    )
    for parameter, shape in case.shapes[prefer].items():
        assert found.shape(f"model.{parameter}") == shape
    if prefer == "heads":
        assert [len(family.groups) for family in found.families] == case.heads
        assert all(family.is_heads for family in found.families)


def vit() -> nn.Module:
    return vision_transformer.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5
    )


def swin(version: int) -> nn.Module:
    kinds = swin_transformer.SwinTransformerBlock, swin_transformer.SwinTransformerBlockV2
    merging = swin_transformer.PatchMerging, swin_transformer.PatchMergingV2
    return swin_transformer.SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=[2, 2], mlp_ratio=2.0,
        num_classes=5, block=kinds[version - 1], downsample_layer=merging[version - 1],
    )  # fmt: skip


def convnext_() -> nn.Module:
    return convnext.ConvNeXt([convnext.CNBlockConfig(16, 24, 1), convnext.CNBlockConfig(24, None, 1)], num_classes=5)


def maxvit_() -> nn.Module:
    return maxvit.MaxVit(
        input_size=(16, 16), stem_channels=8, partition_size=2, block_channels=[16], block_layers=[1], head_dim=4,
        stochastic_depth_prob=0.1, num_classes=5,
    )  # fmt: skip


VISION = {
    "vit": (vit, 8, [4, 4], {
        "class_token": (1, 1, 16), "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": (48, 16),
    }),
    "swin v1": (lambda: swin(1), 8, [2, 2, 4], {
        "features.1.0.attn.qkv.weight": (24, 8), "features.2.norm.weight": (32,),
    }),
    "swin v2": (lambda: swin(2), 8, [2, 2, 4], {
        "features.1.1.attn.qkv.weight": (24, 8), "features.2.norm.weight": (16,),
    }),
    "convnext": (convnext_, 16, [], {"features.0.1.weight": (8,), "features.3.0.layer_scale": (12, 1, 1)}),
    "maxvit": (maxvit_, 16, [4, 4], {"blocks.0.layers.0.layers.window_attention.attn_layer.0.weight": (8,)}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "prefer"), cases(VISION))
def test_vision_model(name: str, prefer: Prefer) -> None:
    make, side, heads, shapes = VISION[name]
    found = shrunk_with_norms(
        randomized(make(), 0.25), torch.randn(2, 3, side, side),
        dynamic=N, prefer=prefer, onnx=(name, prefer) == ("vit", "heads"),
        exactly=name != "swin v2",  # some units of its small nets for position are 0 for all positions that there are
    )  # fmt: skip
    if prefer == "heads":
        assert [len(family.groups) for family in found.families] == heads
        assert all(family.is_heads for family in found.families)
        assert found.kept < 1
    else:
        assert found.kept < 0.5
        for parameter, shape in shapes.items():
            assert found.shape(parameter) == shape
