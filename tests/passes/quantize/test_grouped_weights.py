"""The matrices of experts in few bits: every group multiplies by what its own blocks or table stand for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.grouped_ops import GROUPED_MM
from fxopt.passes import CodebookWeights, QuantizeWeights
from fxopt.passes.quantize.blocks import quantize_blocks
from fxopt.testing import check_pass
from fxopt.weight_only_ops import GROUPED_MATMUL_NBITS
from tests.export.proof import op_types
from tests.models.mixtures import SortedExperts

OFFSETS = torch.tensor([2, 2, 5])


class Grouped(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn((3, 40, 8) if way == "as it is" else (3, 8, 40)))

    def forward(self, x: Tensor) -> Tensor:
        ways = {
            "as it is": lambda: self.weight,
            "transposed": lambda: self.weight.transpose(-2, -1),
            "permuted": lambda: self.weight.permute(0, 2, 1),
            "three times": lambda: self.weight.transpose(1, 2).permute(0, -1, 1).transpose(2, 1),
        }
        return GROUPED_MM(x, ways[self.way](), OFFSETS)


@pytest.mark.parametrize("way", ["as it is", "transposed", "permuted", "three times"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_each_group_multiplies_by_its_own_blocks(way: str, bits: int, symmetric: bool) -> None:
    net, x = Grouped(way), torch.randn(6, 40)
    pass_ = QuantizeWeights(bits=bits, symmetric=symmetric, min_elements=64)
    result = check_pass(pass_, net, x, changes=1, skips=[])
    rows = net.weight.transpose(1, 2) if way == "as it is" else net.weight
    held = quantize_blocks(rows.flatten(0, 1), bits=bits, block_size=32, symmetric=symmetric).floats()
    want = GROUPED_MM(x, held.unflatten(0, (3, 8)).transpose(1, 2), OFFSETS)
    torch.testing.assert_close(result.gm(x), want, rtol=1e-5, atol=1e-5)
    assert [n.target for n in result.gm.graph.nodes if "mm" in str(n.target)] == []
    assert sum(n.target is GROUPED_MATMUL_NBITS for n in result.gm.graph.nodes) == 1


def test_floats_stay_where_another_call_reads_them() -> None:
    class AlsoSummed(Grouped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.sum()

    (skip,) = check_pass(
        QuantizeWeights(min_elements=64), AlsoSummed("transposed"), torch.randn(6, 40), changes=0
    ).skips
    assert "also read by sum" in skip.why


def test_matrices_that_are_read_in_two_ways_stay() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return GROUPED_MM(GROUPED_MM(x, self.weight, OFFSETS), self.weight.transpose(1, 2), OFFSETS)

    result = check_pass(QuantizeWeights(min_elements=64), Square(), torch.randn(6, 16), changes=0)
    assert "read transposed by some" in result.skips[0].why


@pytest.mark.ort
@pytest.mark.parametrize("by_rows", [True, False])
def test_a_mixture_runs_in_blocks_whichever_experts_are_chosen(by_rows: bool) -> None:
    model = SortedExperts(width=64, by_rows=by_rows).eval()
    gm = fxopt.capture(model, (torch.randn(6, 64),), dynamic_shapes=({0: "tokens"},))
    file = to_onnx(fxopt.optimize(gm, [QuantizeWeights(min_elements=1024)], strict=True))
    smaller = len(to_onnx(gm).to_bytes()) / len(file.to_bytes())
    assert Counter(op_types(file))["MatMulNBits"] == 2 * 4
    assert smaller > 4  # of 7, the nodes included
    session = Session(file.to_bytes())
    for tokens in (1, 2, 50):  # of few tokens most experts get none
        x = torch.randn(tokens, 64)
        assert fxopt.numerics.measure(model(x).detach(), session.run((x,))[0]).sqnr_db > 12


@pytest.mark.ort
def test_a_table_serves_the_matrices_of_all_experts() -> None:
    gm = fxopt.capture(SortedExperts(width=64).eval(), (torch.randn(6, 64),), dynamic_shapes=({0: "tokens"},))
    small = fxopt.optimize(gm, [CodebookWeights(bits=4, min_elements=256)], strict=True)
    assert len(to_onnx(gm).to_bytes()) / len(to_onnx(small).to_bytes()) > 4
