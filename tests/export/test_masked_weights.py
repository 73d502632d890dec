"""Pruned weights in a file: one constant each, with its zeros, where masks are for training alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import OnnxFile, to_onnx
from fxopt.passes import Prune
from tests.export.proof import prove


def types(file: OnnxFile) -> list[str]:
    return [node.op_type for node in file.model.graph]


def test_the_file_of_a_pruned_graph_is_as_large_as_before_and_holds_the_zeros():
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(4, 64)
    dense = fxopt.optimize(net.eval(), None, (x,))
    pruned = fxopt.optimize(dense, [Prune(0.5, min_sqnr_db=-60.0)], strict=True)
    before, file = to_onnx(dense), to_onnx(pruned)  # compared with ORT, optimizer off and on
    assert types(file) == types(before)
    assert len(file.to_bytes()) < len(before.to_bytes()) + 500
    held = {name: torch.from_numpy(value.const_value.numpy()) for name, value in file.model.graph.initializers.items()}
    want = pruned.get_parameter("0.weight") * pruned.get_buffer("0.weight_mask")
    assert torch.equal(held["0.weight"], want)
    assert 0.4 < float((want == 0).double().mean()) < 0.6


def test_layers_of_one_operator_for_all_weights_take_pruned_ones():
    gm = fxopt.capture(nn.LSTM(8, 16).eval(), (torch.randn(5, 2, 8),))
    pruned = fxopt.optimize(gm, [Prune(0.5, granularity="weights", min_sqnr_db=-60.0)], strict=True)
    assert any("mask" in name for name, _ in pruned.named_buffers())
    assert types(to_onnx(pruned)) == types(to_onnx(gm))


class Masked(nn.Module):
    """A weight and its mask, written in different ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("mask", torch.rand(6, 6) > 0.5)
        self.register_buffer("row", torch.rand(6) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        ways = {
            "mask first": lambda: x @ (self.mask * self.weight),
            "read twice": lambda: x @ (self.weight * self.mask) + self.weight[0],
            "a mask that is spread": lambda: x @ (self.weight * self.row),
            "a value": lambda: x * self.row,
        }
        return ways[self.way]()


@pytest.mark.parametrize(
    ("way", "products"), [("mask first", 0), ("read twice", 1), ("a mask that is spread", 1), ("a value", 1)]
)
def test_only_a_weight_that_nothing_else_reads_takes_its_mask_in(way, products):
    assert types(prove(Masked(way), torch.randn(3, 6))).count("Mul") == products
