"""Time to find what can be pruned, to mask it, and to shrink, for residual nets of 100 to 10,000 nodes.

CPU time of one thread, without the certificate. A step that is linear in the graph's size has the exponent 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fxopt
from fxopt.passes import Prune, ShrinkMasked
from tests.bench.branch_scaling import exponent
from tests.bench.zoo_table import one_thread, write_row
from tests.models.randomized import randomized

BLOCKS = (6, 66, 666)  # of 15 nodes each
WIDTH = 16
HEADER = ("nodes", "prune s", "shrink s", "prune us/node", "shrink us/node", "parameters left")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x)))) / 4


def net_of(blocks: int) -> nn.Module:
    """Return a net with a stem, blocks and a classifier."""
    body = [Block() for _ in range(blocks)]
    return randomized(
        nn.Sequential(nn.Conv2d(3, WIDTH, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
    ).eval()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


def main(console: Console | None = None, *, quick: bool = False) -> None:
    """Print the table, as Markdown, with the exponents of growth in its last row."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---:",) * len(HEADER))
    grown: list[tuple[int, float, float]] = []
    with one_thread():
        for blocks in BLOCKS[:-1] if quick else BLOCKS:
            image = torch.randn(2, 3, 8, 8)
            gm = fxopt.capture(net_of(blocks), (image,), dynamic_shapes=({0: "batch"},), modes="current", verify=False)
            masked, prune = _timed(lambda gm=gm: Prune(0.5)(gm).gm)
            shrunk, shrink = _timed(lambda masked=masked: ShrinkMasked(random_masks=0)(masked).gm)
            nodes = len(gm.graph.nodes)
            left = sum(p.numel() for p in shrunk.parameters()) / sum(p.numel() for p in gm.parameters())
            per_node = (f"{1e6 * seconds / nodes:.0f}" for seconds in (prune, shrink))
            write_row(console, (f"{nodes:,}", f"{prune:.2f}", f"{shrink:.2f}", *per_node, f"{left:.2f}"))
            grown.append((nodes, prune, shrink))
    sizes = [grown[0][0], grown[-1][0]]
    exponents = (f"{exponent(sizes, [grown[0][at], grown[-1][at]]):.2f}" for at in (1, 2))
    write_row(console, ("exponent", *exponents, "", "", ""))
