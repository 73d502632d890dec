"""The certificate for many nets: random masks of every layer, shrunk, and compared with the masked graph.

    python -m tests.bench prune_certificate [--models resnet18,bert]

Known architectures with random weights, none of them 0, and nets with trained weights. Each mask set prunes a random
share of the channels, places inside heads and hidden units of every layer, up to all but one. An error is relative to
the largest magnitude of the output that it is in; above 1e-4 it is a failure. ``--quick`` takes 5 mask sets, not 100.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fxopt
from fxopt.passes.prune.certificate import certify
from tests.bench.zoo_table import one_thread, write_row
from tests.models.randomized import randomized
from tests.zoo import journeys, real
from tests.zoo.architectures import Built

HEADER = ("net", "nodes", "mask sets", "parameters left", "worst error", "failures", "groups not removed", "s")
RANDOM = (
    "densenet_small", "swin_small", "vit_small", "bert", "distilbert", "gpt2", "llama", "t5_encoder", "lstm", "gru",
    "Dlrm", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf", "mnasnet1_0",
)  # fmt: skip
TRAINED = ("mnist_cnn", "crepe_tiny", "mtcnn_onet", "mobilenetv2")
TAGGERS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Tagger(nn.Module):
    """Names a class for each token: an embedding, two recurrent layers in both directions, a linear layer."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.layers = kind(24, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.layers(self.embedding(tokens))[0])
        return scores


def built(name: str) -> Built:
    """Return a net by name with what it is called with."""
    if name in real.REAL:
        model = real.REAL[name]
        return Built(model.load(), model.inputs(2), {}, model.dynamic_shapes)
    if name in TAGGERS:
        tokens = torch.randint(50, (3, 9))
        return Built(randomized(Tagger(TAGGERS[name]).eval()), (tokens,), {}, {"tokens": {0: "batch"}})
    made = journeys.build(name)
    return made._replace(model=randomized(made.model))


def main(console: Console | None = None, *, quick: bool = False, models: Sequence[str] = (), **unused: Any) -> None:
    """Print the table row by row, as Markdown."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---",) * len(HEADER))
    with one_thread():
        for name in models or (*TRAINED, *RANDOM):
            torch.manual_seed(0)
            net = built(name)
            sample = fxopt.Sample(net.args, net.kwargs)
            gm = fxopt.capture(net.model, sample, dynamic_shapes=net.dynamic_shapes, modes="current", verify=False)
            started = time.perf_counter()
            found = certify(gm, runs=5 if quick else 100)
            seconds = time.perf_counter() - started
            share = f"{min(found.kept):.2f} to {max(found.kept):.2f}"
            results = (share, f"{found.worst:.1e}", str(found.failures), str(sum(found.left)), f"{seconds:.0f}")
            write_row(console, (name, f"{len(gm.graph.nodes):,}", str(len(found.errors)), *results))
