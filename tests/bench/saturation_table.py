"""What safety from 16-bit saturation costs real weights: channels that can overflow, and the error of cutting them.

8-bit symmetric weights, one scale a channel. SQNR is the mean over channels of the error of their weights alone: a
factor on a channel, such as BatchNorm's once it is folded, changes neither it nor which channels can overflow. Three
ways to make every channel safe: 7 bits for all, as ORT's ``reduce_range``; 7 bits for the channels that can overflow;
and the smallest scale for those, as ``fxopt.passes.quantize.saturation`` finds it. ``saturation_in_ort`` runs whole
nets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from rich.console import Console
from torch import nn

from fxopt.pair_sums import can_overflow
from fxopt.passes.quantize.insert_qdq import weight_integers
from fxopt.passes.quantize.saturation import avoid_saturation
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.weights import channel_scales
from tests.zoo import weights

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mnist_cnn": weights.mnist_cnn,
    "crepe_tiny": lambda: weights.crepe("tiny"),
    "mobilenetv2": weights.mobilenetv2,
    "minilm_l6": weights.minilm,
}
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
HEADER = "model", "layers", "channels", "can overflow", "scale ×", "as it is", "fxopt", "7 bits there", "7 bits for all"


@dataclasses.dataclass(frozen=True)
class Cut:
    """The channels of one layer.

    Attributes:
        guilty: bool[channels], those that can overflow.
        increase: f64[channels], factor by which the scale is raised; 1 if it is not.
        sqnr: f64[channels, 4], dB of each channel's weights: as they are, smallest scales, 7 bits for the guilty,
            7 bits for all.
    """

    guilty: torch.Tensor
    increase: torch.Tensor
    sqnr: torch.Tensor


def cut(weight: torch.Tensor, groups: int) -> Cut:
    """Quantize one weight, f32[out, ...], in four ways."""
    eight, seven = (_spec(bits) for bits in (8, 7))
    scale, half = (torch.tensor(channel_scales(weight, spec)) for spec in (eight, seven))
    guilty = can_overflow(_integers(weight, scale), groups=groups)
    raised = torch.tensor(avoid_saturation(weight, scale.tolist(), 0, groups=groups))
    ways = scale, raised, torch.where(guilty, half, scale), half
    return Cut(guilty, raised.double() / scale.double(), torch.stack([_sqnr(weight, way) for way in ways], 1))


def _spec(bits: int, scale: tuple[float, ...] = ()) -> QuantSpec:
    return QuantSpec("weight", bits, signed=True, symmetric=True, axis=0, scale=scale, zero_point=(0,) * len(scale))


def _integers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight_integers(weight, _spec(8, tuple(scale.tolist())))


def _sqnr(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    exact = weight.double().flatten(1)
    error = _integers(weight, scale).flatten(1) * scale.double().unsqueeze(1) - exact
    return 10 * torch.log10(exact.square().sum(1) / error.square().sum(1))


def row(name: str) -> str:
    """Return the line of one model, over all channels of all its convolutions and linears."""
    net = MODELS[name]()
    layers = [module for module in net.modules() if isinstance(module, LAYERS)]
    cuts = [cut(layer.weight.detach(), getattr(layer, "groups", 1)) for layer in layers]
    guilty, increase, sqnr = (torch.cat([getattr(c, field) for c in cuts]) for field in ("guilty", "increase", "sqnr"))
    usable = sqnr.isfinite().all(1)  # not a channel of zeros, nor one that 8 bits hold exactly
    means = " | ".join(f"{value:.2f}" for value in sqnr[usable].mean(0).tolist())
    factor = f"{float(increase[guilty].mean()):.2f}" if bool(guilty.any()) else "-"
    share = float(guilty.double().mean())
    return f"| {name} | {len(layers)} | {len(guilty):,} | {share:.1%} | {factor} | {means} |"


def main(console: Console, *, quick: bool = False) -> None:
    """Print the table: mean factor over the channels that are cut, and the mean SQNR of weights in dB in four ways."""
    console.print(f"| {' | '.join(HEADER)} |\n| --- {'| ---: ' * (len(HEADER) - 1)}|", highlight=False)
    for name in list(MODELS)[: 2 if quick else None]:
        console.print(row(name), highlight=False)
