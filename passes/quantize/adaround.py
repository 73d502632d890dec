"""Learn for each weight whether to round it up or down: AdaRound.

    before:  y = relu(conv2d(x, w, b))
    after:   y = relu(conv2d(x, q s, b))        q integers of the plan, s its scales: InsertQdq rounds q s to q

For each layer ``q = floor(w / s) + h(v)``, with h from 0 to 1, and v minimizes the error of the layer's output, limits
such as relu included, plus a term that drives each h to 0 or 1. The inputs are those that the layer gets where all
layers before it are quantized and settled; the outputs to be had are those of the float net. A channel for which the
result is no better than rounding to nearest keeps the latter.

The paper draws whole images; here a step draws output positions, and so costs the same whatever the size of the image.
The error is counted by channel in units of what rounding to nearest costs for each weight, so that one strength of the
second term serves all layers; it is not the 0.01 of the paper, whose error has the unit of the activations. With it a
few hundred steps do, at a rate of learning that is high enough for each h to cross its range in them.

Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization,
ICML 2020.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.calibration_data import calibration_of
from fxopt.passes.quantize.layer_inputs import PlannedLayer, planned_layers
from fxopt.passes.quantize.planned_pass import PlannedPass
from fxopt.rewriter import Rewriter

__all__ = ["AdaRound", "LayerRows", "adaptive_rounding", "rectified_sigmoid", "rounding_loss"]

_ZETA, _GAMMA = 1.1, -0.1  # the stretch of the sigmoid, section 3.2 of the paper
_BETAS = 20.0, 2.0
_WARM_UP = 0.2  # share of the steps without the second term
_RATE = 0.25
# How many rows a layer learns from, and how many of them a step draws: least, for each of its inputs, and most.
_ROWS = 512, 4, 16384
_BATCH = 64, 0.25, 1024
_BYTES = 256 * 2**20  # of the rows


@dataclasses.dataclass(frozen=True)
class AdaRound(PlannedPass):
    """Put the weights of a plan on its grid by AdaRound. Runs before :class:`InsertQdq` with the same plan.

    Attributes:
        plan: ``{node: QuantSpec}`` with scales.
        target: Name of the runtime that the plan was made for.
        iterations: Steps of Adam for each layer.
        strength: Weight of the term that drives each h to 0 or 1.
        asymmetric: Aim at what the float net yields, so that a layer makes up for the layers before it; else at what
            its own float weights yield of the quantized inputs, which a small set of inputs tells more reliably.
        seed: Of the positions that are drawn.
        megabytes: Memory for the activations of the calibration inputs; it takes in as many inputs as fit.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB.
    """

    name: ClassVar[str] = "adaround"
    iterations: int = 300
    strength: float = 100.0
    asymmetric: bool = True
    seed: int = 0
    megabytes: int = 2048

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; wanted at least 1")
        if not self.strength >= 0:
            raise ValueError(f"strength is {self.strength}; wanted at least 0")

    def run(self, rw: Rewriter) -> None:
        """Replace the weights.

        Raises:
            PassError: the graph is quantized or in train mode, or the plan does not fit it.
            CalibrationError: the calibration data do not fit.
        """
        layers = planned_layers(
            rw, self.plan, self.target, calibration_of(rw.gm), megabytes=self.megabytes, with_targets=True
        )
        for layer, settle in layers:
            if layer.on_grid or not any(layer.layout.count(x) for x in layer.inputs):
                continue
            rows = LayerRows.of(layer, self.seed, asymmetric=self.asymmetric)
            low, high = layer.spec.limits
            integers = adaptive_rounding(
                layer.weight,
                layer.scale,
                rows,
                low,
                high,
                iterations=self.iterations,
                strength=self.strength,
                seed=self.seed,
            )
            settle(integers, by="AdaRound")


@dataclasses.dataclass(frozen=True)
class LayerRows:
    """What a layer reads and is to yield, at some of its output positions.

    Attributes:
        inputs: f32[groups, rows, in].
        targets: f32[groups, rows, out].
        bias: f32[groups, out], or None.
        low: Smallest result, or None.
        high: Largest result, or None.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, layer: PlannedLayer, seed: int, *, asymmetric: bool = True) -> LayerRows:
        """Return rows of a layer that are drawn from all calibration inputs alike."""
        assert layer.targets is not None  # AdaRound asks for them
        groups, _, size = layer.weight.shape
        wanted = min(_share(size, _ROWS), max(1, _BYTES // (4 * groups * size)))
        counts = [layer.layout.count(x) for x in layer.inputs]
        draw = torch.Generator().manual_seed(seed)
        # Where values decide which rows a layer gets, those of the float graph are others.
        asymmetric &= counts == [layer.layout.outcomes(y) for y in layer.targets]
        drawn = torch.randperm(sum(counts), generator=draw)[:wanted].sort().values
        inputs, targets, start = [], [], 0
        for x, y, count in zip(layer.inputs, layer.targets, counts, strict=True):
            chosen = drawn[(drawn >= start) & (drawn < start + count)] - start
            inputs.append(layer.layout.rows(x, chosen))
            if asymmetric:
                targets.append(layer.layout.results(y, chosen))
            start += count
        read = torch.cat(inputs, 1).contiguous()
        rows = cls(read, torch.cat(targets, 1).contiguous() if asymmetric else read, layer.bias, *layer.limits)
        return rows if asymmetric else dataclasses.replace(rows, targets=rows._results(read, layer.weight))

    def errors(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of each channel for weights f32[groups, out, in], f32[groups, out]."""
        return (self._results(self.inputs, weight) - self.targets).square().mean(1)

    def gradient(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the mean squared error of each channel in these rows by the weights.

        Where a limit cuts the output off, no weight moves it.
        """
        x = self.inputs[:, rows]
        y = self._linear(x, weight)
        error = y - self.targets[:, rows]
        if self.low is not None or self.high is not None:
            error = y.clamp(self.low, self.high) - self.targets[:, rows]
            error.masked_fill_((y < (-torch.inf if self.low is None else self.low)), 0.0)
            error.masked_fill_((y > (torch.inf if self.high is None else self.high)), 0.0)
        return torch.bmm(error.transpose(1, 2), x).mul_(2 / len(rows))

    def _results(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = self._linear(x, weight)
        return y if self.low is None and self.high is None else y.clamp_(self.low, self.high)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(self.bias[:, None], x, weight.transpose(1, 2))


def rectified_sigmoid(v: torch.Tensor) -> torch.Tensor:
    """Return ``h(v) = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)``, equation 23 of the paper."""
    return (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def rounding_loss(h: torch.Tensor, beta: float) -> torch.Tensor:
    """Return ``sum 1 - |2 h - 1|^beta``, equation 24 of the paper: 0 if each h is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def adaptive_rounding(
    weight: torch.Tensor,
    scale: torch.Tensor,
    rows: LayerRows,
    qmin: int,
    qmax: int,
    *,
    iterations: int = 300,
    strength: float = 100.0,
    seed: int = 0,
) -> torch.Tensor:
    """Return the integers of a weight that AdaRound chooses, as float32 numbers of its shape.

    Args:
        weight: f32[groups, out, in].
        scale: Units per step, > 0, f32[groups, out].
        rows: What the layer reads and is to yield.
        qmin: Smallest integer.
        qmax: Largest integer.
        iterations: Steps of Adam.
        strength: Weight of the term that drives each h to 0 or 1, lambda in the paper but in another unit.
        seed: Of the rows that each step draws.

    In each channel the mean squared error over ``rows`` is at most that of rounding to nearest, and each integer is
    the one below or above its weight, or the end of the grid.
    """
    step = scale[..., None]
    nearest = torch.round(weight / step).clamp(qmin, qmax)
    before = rows.errors(nearest * step)
    below = torch.floor(weight / step)
    v = _learned(weight, below, step, rows, before, (qmin, qmax), iterations, strength, seed)
    chosen = (below + (rectified_sigmoid(v) >= 0.5)).clamp(qmin, qmax)
    better = rows.errors(chosen * step) < before
    return torch.where(better[..., None], chosen, nearest)


def _learned(
    weight: torch.Tensor,
    below: torch.Tensor,
    step: torch.Tensor,
    rows: LayerRows,
    unit: torch.Tensor,
    limits: tuple[int, int],
    iterations: int,
    strength: float,
    seed: int,
) -> torch.Tensor:
    """Return v after the steps; its gradient is written out, which costs a third of autograd's time."""
    share = (weight / step - below).clamp(0.01, 0.99)
    v = -torch.log((_ZETA - _GAMMA) / (share - _GAMMA) - 1)
    optimizer = torch.optim.Adam([v], lr=_RATE)
    # dE/dh of a channel in units of the error that is to be beaten, and of its number of weights.
    rate = step * weight.shape[-1] / unit.clamp_min(1e-12 * float(unit.max()) + 1e-30)[..., None]
    draw = torch.Generator().manual_seed(seed)
    count = rows.inputs.shape[1]
    batch = min(count, _share(weight.shape[-1], _BATCH))
    first = int(_WARM_UP * iterations)
    for number in range(iterations):
        chosen = torch.randint(count, (batch,), generator=draw)
        sigmoid = torch.sigmoid(v)
        h = sigmoid * (_ZETA - _GAMMA) + _GAMMA
        inside = (h > 0) & (h < 1)
        h.clamp_(0, 1)
        soft = below + h
        slope = rows.gradient(soft.clamp(*limits) * step, chosen).mul_(rate)
        slope.mul_((soft >= limits[0]) & (soft <= limits[1]))
        if number >= first:
            done = (number - first) / max(1, iterations - first)
            beta = _BETAS[0] + (_BETAS[1] - _BETAS[0]) * done
            u = 2 * h - 1
            slope.sub_(u.sign() * u.abs().pow(beta - 1), alpha=2 * beta * strength)
        v.grad = slope * inside * (sigmoid * (1 - sigmoid)) * (_ZETA - _GAMMA)
        optimizer.step()
    return v


def _share(size: int, bounds: tuple[int, float, int]) -> int:
    least, each, most = bounds
    return min(max(int(each * size), least), most)
