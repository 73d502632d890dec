"""Accuracy of a small residual CNN on real digits in few bits: quantized after training, and trained with quantizers.

The net has batch norm behind every convolution. Each cell is the share of test images that the exported file gets right
in ONNX Runtime, its optimizer off. QAT goes on from the same trained weights. Rows are means over the seeds of the
training.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import fxopt
from fxopt import passes
from fxopt.export import Session, to_onnx
from fxopt.tools.demo_net import Digits, accuracy, fit, load_digits, train
from tests.bench.zoo_table import one_thread, write_row

SEEDS = (0, 1, 2)
WIDTHS = ((4, 8), (3, 8), (2, 8), (2, 4))  # of weights and of activations
HEADER = ("bits", "fp32", "PTQ", "QAT", "QAT, learned scales", "QAT graph = ORT")
_BATCH = 64


def main(console: Console, *, quick: bool = False) -> None:
    """Print the table."""
    with one_thread():  # such small convolutions are slower on several
        _main(console, load_digits(), quick=quick)


def _main(console: Console, digits: Digits, *, quick: bool) -> None:
    write_row(console, HEADER)
    seeds, widths = (SEEDS[:1], WIDTHS[1:2]) if quick else (SEEDS, WIDTHS)
    nets = {seed: float_graph(digits, seed) for seed in seeds}
    floats = {seed: score(net, digits)[0] for seed, net in nets.items()}
    for weight_bits, bits in widths:
        rows = [row(nets[seed], digits, seed, weight_bits, bits) for seed in seeds]
        means = [f"{100 * statistics.mean(column):.2f} %" for column in zip(*rows, strict=True)]
        write_row(console, (f"W{weight_bits}A{bits}", f"{100 * statistics.mean(floats.values()):.2f} %", *means))


def row(net: fxopt.CapturedModule, digits: Digits, seed: int, weight_bits: int, bits: int) -> tuple[float, ...]:
    """Return accuracy after PTQ, QAT, and QAT with learned scales, and how often graph and ORT predict the same."""
    rounded = fxopt.optimize(
        net,
        [passes.Quantize(weight_bits=weight_bits, bits=bits, min_sqnr_db=-99)],
        calibration=batches(digits),
        strict=True,
    )
    found = [score(rounded, digits)[0]]
    same: list[float] = []
    for learn in (False, True):
        trained = quantization_aware(net, digits, seed, weight_bits=weight_bits, bits=bits, learn_scales=learn)
        integers = fxopt.optimize(trained, [passes.ConvertQat()], strict=True)
        in_ort, predictions = score(integers, digits)
        found.append(in_ort)
        with torch.no_grad():
            same.append(float((trained(digits.test_images).argmax(1) == predictions).double().mean()))
    return (*found, min(same))


def float_graph(digits: Digits, seed: int) -> fxopt.CapturedModule:
    """Return the trained net as a graph of both modes, in eval mode."""
    return fxopt.capture(train(digits, seed=seed), digits.train_images[:_BATCH], dynamic_shapes={"image": {0: "batch"}})


def quantization_aware(
    net: fxopt.CapturedModule,
    digits: Digits,
    seed: int,
    *,
    weight_bits: int,
    bits: int = 8,
    learn_scales: bool = False,
    epochs: int = 12,
) -> fxopt.CapturedModule:
    """Return a copy of the net that was trained with quantizers in it, in eval mode."""
    graph = fxopt.optimize(
        net.clone(copy_tensors=True),  # training must not reach the float net
        [passes.PrepareQat(weight_bits=weight_bits, bits=bits, learn_scales=learn_scales)],
        calibration=batches(digits),
        strict=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(graph, digits, lambda images, labels: F.cross_entropy(graph(images), labels), epochs=epochs, rate=5e-3)
    return graph


def batches(digits: Digits, count: int = 4) -> list[Tensor]:
    """Return images to calibrate with."""
    return list(digits.train_images[: count * _BATCH].split(_BATCH))


def score(graph: fxopt.CapturedModule, digits: Digits) -> tuple[float, Tensor]:
    """Return accuracy on the test images in ORT, its optimizer off, and the predictions."""
    file = to_onnx(graph, validate=False)
    scores = Session(file.to_bytes(), optimization="none").run([digits.test_images])[0]
    return accuracy(scores, digits.test_labels), scores.argmax(1)
