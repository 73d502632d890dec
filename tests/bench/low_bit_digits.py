"""Accuracy of a small residual CNN on real digits with weights of 1 to 4 bits, before and after training goes on.

Weights become signs, ternary codes, or places in a table of k-means; the first and the last layer and the batch norms
stay floats, as do activations. "Bytes" are those of all constants of the ONNX file. Each accuracy is the share of test
images that the exported file gets right in ONNX Runtime, its optimizer off; the last column says for how many of them
graph and file predict the same. "Floats, trained on" is what the same training gives the float net. Rows are means over
the seeds of the training.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from rich.console import Console

import fxopt
from fxopt import passes
from fxopt.export import Session, to_onnx
from fxopt.tools.demo_net import Digits, accuracy, fit, load_digits, train
from tests.bench.zoo_table import one_thread, write_row

SEEDS = (0, 1, 2)
EPOCHS = 4  # of going on; the net itself was trained for 12
HEADER = ("weights", "bits", "bytes", "before", "after going on", "graph = ORT")
# name: bits of a weight, the pass to train with, the pass that packs what was trained
KINDS: dict[str, tuple[int, fxopt.Pass | None, fxopt.Pass | None]] = {
    "floats, trained on": (32, None, None),
    "table of 16": (4, passes.CodebookWeights(bits=4), None),
    "table of 4": (2, passes.CodebookWeights(bits=2, min_sqnr_db=-20.0), None),
    "table of 2": (1, passes.CodebookWeights(bits=1, min_sqnr_db=-20.0), None),
    "ternary": (2, passes.BinarizeWeights(kind="ternary", train=True), passes.BinarizeWeights(kind="ternary")),
    "binary": (1, passes.BinarizeWeights(train=True), passes.BinarizeWeights()),
}


def main(console: Console, *, quick: bool = False) -> None:
    """Print the table."""
    digits = load_digits()
    write_row(console, HEADER)
    with one_thread():
        nets = {seed: float_graph(digits, seed) for seed in (SEEDS[:1] if quick else SEEDS)}
        for name, (bits, _, _) in KINDS.items():
            rows = [row(net, digits, seed, name) for seed, net in nets.items()]
            size, *shares = (statistics.mean(column) for column in zip(*rows, strict=True))
            write_row(console, (name, str(bits), f"{size:.0f}", *(f"{100 * share:.2f} %" for share in shares)))


def row(net: fxopt.CapturedModule, digits: Digits, seed: int, kind: str) -> tuple[float, ...]:
    """Return bytes, accuracy before and after, and how often graph and ORT predict the same."""
    before = packed(low_bit(net, kind), kind)
    tuned = packed(trained_on(low_bit(net, kind), digits, seed), kind)
    _, first, _ = score(before, digits)
    size, second, same = score(tuned, digits)
    return size, first, second, same


def float_graph(digits: Digits, seed: int, *, epochs: int = 12) -> fxopt.CapturedModule:
    """Return the trained net as a graph of both modes, in eval mode."""
    net = train(digits, epochs=epochs, seed=seed)
    return fxopt.capture(net, digits.train_images[:64], dynamic_shapes={"image": {0: "batch"}})


def low_bit(net: fxopt.CapturedModule, kind: str) -> fxopt.CapturedModule:
    """Return a copy of the net, with parameters of its own, whose weights can be trained in few bits."""
    _, prepare, _ = KINDS[kind]
    own = net.clone(copy_tensors=True)  # training must not reach the float net
    return own if prepare is None else fxopt.optimize(own, [prepare], strict=True)


def packed(graph: fxopt.CapturedModule, kind: str) -> fxopt.CapturedModule:
    """Return the graph whose weights are stored in few bits."""
    _, _, convert = KINDS[kind]
    return graph if convert is None else fxopt.optimize(graph, [convert], strict=True)


def trained_on(graph: fxopt.CapturedModule, digits: Digits, seed: int, *, epochs: int = EPOCHS) -> fxopt.CapturedModule:
    """Train the graph in place, and return it in eval mode; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(graph, digits, lambda images, labels: F.cross_entropy(graph(images), labels), epochs=epochs, rate=3e-3)
    return graph


def score(graph: fxopt.CapturedModule, digits: Digits) -> tuple[float, float, float]:
    """Return the bytes of the file's constants, accuracy on the test images in ORT, and how often the graph agrees."""
    file = to_onnx(graph, validate=False)
    (scores,) = Session(file.to_bytes(), optimization="none").run([digits.test_images])
    with torch.no_grad():
        agreed = float((graph(digits.test_images).argmax(1) == scores.argmax(1)).double().mean())
    return float(file.parameter_bytes), accuracy(scores, digits.test_labels), agreed
