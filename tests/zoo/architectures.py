"""Architectures that users have, with random weights: torchvision's and transformers'. For structure and speed only.

``build(name)`` returns a ``Built``: the model in eval mode, inputs, and the dimensions that may vary. By default images
and transformers are small enough for a test; ``real=True`` gives the sizes that people deploy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from torchvision.models import segmentation

CLASSIFIERS = {  # one or two of each family, and the smallest image side that exercises all of it
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "maxvit_t": 224,
    "mnasnet1_0": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_large": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x1_0": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
    "vit_b_16": 64,
    "wide_resnet50_2": 64,
}
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50")
TRANSFORMERS = ("bert", "distilbert", "gpt2", "llama", "t5_encoder")


class Built(NamedTuple):
    """A model and how to call it: ``model(*args, **kwargs)``; ``dynamic_shapes`` as capture takes them."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]


def build(name: str, *, real: bool = False, batch: int = 2) -> Built:
    """Build a model of ``CLASSIFIERS``, ``SEGMENTERS`` or ``TRANSFORMERS``.

    Args:
        name: Which one.
        real: Images of 224 px and more, transformers of published size; else small ones.
        batch: Rows of the example inputs.
    """
    if name in TRANSFORMERS:
        return _transformer(name, real, batch)
    if name in CLASSIFIERS:
        side = CLASSIFIERS[name] if not real else 299 if name == "inception_v3" else 224
        model = _classifier(name, side)
    else:
        side = 520 if real else 64
        model = getattr(segmentation, name)(weights=None, weights_backbone=None)
    _wake(model.eval(), side if name == "vit_b_16" else CLASSIFIERS.get(name, 64))
    return Built(model, (_images(batch, side),), {}, {_first_input(model): {0: "batch"}})


def _classifier(name: str, side: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": True, "init_weights": False}
    elif name == "vit_b_16":
        options = {"image_size": side}
    return getattr(torchvision.models, name)(weights=None, **options)


def _first_input(model: nn.Module) -> str:
    return model.forward.__code__.co_varnames[1]


def _images(batch: int, side: int) -> torch.Tensor:
    """Return blurred noise with some grain, f32[batch, 3, side, side]; two images differ even in their means."""
    blobs = F.interpolate(torch.randn(batch, 3, 4, 4) * 2, size=(side, side), mode="bilinear")
    return blobs + 0.3 * torch.randn(batch, 3, side, side)


def _wake(model: nn.Module, side: int) -> None:
    """Make the outputs of a net with random weights depend on its inputs, as trained weights would.

    Without this half of torchvision's nets answer any two images with the same 1,000 numbers, to 1e-7, and a wrong fold
    or a dropped block goes unnoticed. So BatchNorm gets scales off one and the statistics of a batch, and parameters
    that start at (nearly) zero get values.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(layer_scale := getattr(module, "layer_scale", None), nn.Parameter):
                layer_scale.uniform_(0.1, 0.4)  # ConvNeXt starts at 1e-6
            elif isinstance(module, nn.Linear) and module.weight.std() < 0.02:
                module.weight.normal_(0, 0.05)  # ViT's head starts at 0, those of the MobileNets near it
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0, 0.2)
            norm.train().momentum = 1.0
        if norms:
            # Pictures and noise: on inputs unlike those of the statistics, a deep net amplifies whatever it is given.
            model(torch.cat([_images(12, side), torch.randn(12, 3, side, side)]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            norm.running_var.clamp_(min=1e-3)


def _transformer(name: str, real: bool, batch: int) -> Built:
    model, vocabulary, longest = _TRANSFORMERS[name](real)
    length = 128 if real else 12
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 3 :] = 0
    kwargs = {"input_ids": torch.randint(1, vocabulary, (batch, length)), "attention_mask": mask}
    axes = {0: "batch", 1: f"length<={longest}"}
    return Built(model.eval(), (), kwargs, dict.fromkeys(kwargs, axes))


# Each returns the model, the size of its vocabulary and its greatest length.
Maker = Callable[[bool], tuple[nn.Module, int, int]]


def _bert(real: bool) -> tuple[nn.Module, int, int]:
    small = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    config = transformers.BertConfig(**({} if real else small))
    return transformers.BertModel(config), config.vocab_size, config.max_position_embeddings


def _distilbert(real: bool) -> tuple[nn.Module, int, int]:
    small = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
    config = transformers.DistilBertConfig(**({} if real else small))
    return transformers.DistilBertModel(config), config.vocab_size, config.max_position_embeddings


def _gpt2(real: bool) -> tuple[nn.Module, int, int]:
    small = {
        "vocab_size": 100,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = transformers.GPT2Config(**({} if real else small), use_cache=False)
    return transformers.GPT2LMHeadModel(config), config.vocab_size, config.n_positions


def _llama(real: bool) -> tuple[nn.Module, int, int]:
    sizes = (32000, 768, 12, 12, 4, 3072, 2048) if real else (100, 32, 2, 4, 2, 64, 64)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "max_position_embeddings")
    config = transformers.LlamaConfig(**dict(zip(names, sizes, strict=True)), use_cache=False)
    return transformers.LlamaForCausalLM(config), config.vocab_size, config.max_position_embeddings


def _t5_encoder(real: bool) -> tuple[nn.Module, int, int]:
    small = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**({} if real else small))
    return transformers.T5EncoderModel(config), config.vocab_size, 512


_TRANSFORMERS: dict[str, Maker] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5_encoder": _t5_encoder,
}
