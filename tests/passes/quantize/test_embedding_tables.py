"""Embeddings beside layers of integers: tables in blocks of 8 bits, which stay floats and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.passes import Quantize, QuantizeWeights
from fxopt.passes.quantize.blocks import quantize_blocks
from fxopt.testing import check_pass
from fxopt.weight_only_ops import GATHER_NBITS

aten = torch.ops.aten
WORDS, WIDTH = 200, 40
BAGS = QuantizeWeights(bits=8, search="absmax", kinds=("embedding",))


class Words(nn.Module):
    """Words, looked up and classified; ``tied`` by the very table."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.layer(self.words(index)).tanh())


def indices(*shape: int) -> Tensor:
    return torch.randint(0, WORDS, shape)


def graph_of(net: nn.Module) -> fxopt.CapturedModule:
    gm = fxopt.capture(net.eval(), (indices(3, 7),), dynamic_shapes=({0: "batch", 1: "length"},))
    gm.calibration = [(indices(2, 7),) for _ in range(8)]
    return gm


def look_ups(gm: fxopt.CapturedModule) -> list[object]:
    kinds = (GATHER_NBITS, aten.embedding.default)
    return [node.target for node in gm.graph.nodes if node.target in kinds]


def in_blocks(table: Tensor) -> Tensor:
    """Return the floats that a table stands for in 8 bits."""
    return quantize_blocks(table, bits=8, block_size=32, symmetric=False, search="absmax").floats()


def floats_held(gm: fxopt.CapturedModule) -> int:
    """Return the elements of the largest tensor of floats."""
    return max(held.numel() for held in gm.state_dict().values() if held.is_floating_point())


# -- what becomes of look-ups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_is_looked_up_in_blocks(tied: bool, tmp_path: Path) -> None:
    net = Words(tied=tied)
    small = fxopt.optimize(graph_of(net), [Quantize()], strict=True)
    assert look_ups(small) == [GATHER_NBITS]
    assert floats_held(small) < WORDS * WIDTH / 8
    report = to_onnx(small, tmp_path / "words.onnx")  # compared with ORT, optimizer off and on
    assert "GatherBlockQuantized" in {node.op_type for node in report.model.graph}
    assert (tmp_path / "words.onnx").stat().st_size < 4 * WORDS * WIDTH + 30_000


def test_rows_are_those_of_the_table_in_blocks():
    net, index = nn.Sequential(nn.Embedding(WORDS, WIDTH)), indices(3, 7)
    small = fxopt.optimize(fxopt.capture(net.eval(), (index,)), [Quantize()], strict=True)
    torch.testing.assert_close(small(index), in_blocks(net[0].weight)[index], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (Words(), {"embeddings": False}),
        (Words(), {"skip": ("words",)}),
        (Words(), {"skip": ("words.weight",)}),
        (Words(), {"target": "onnx"}),
        (Words(tied=True), {"skip": ("head",)}),
    ],
    ids=["not wanted", "skipped by module", "skipped by weight", "another runtime", "its layer goes on to read it"],
)
def test_a_table_stays_float(net: nn.Module, options: dict[str, object]) -> None:
    small = fxopt.optimize(graph_of(net), [Quantize(**options)], strict=True)
    assert look_ups(small) == [aten.embedding.default]
    assert any(torch.equal(held, net.words.weight) for held in small.parameters())


def test_a_plan_made_before_fits_the_graph_with_tables():
    gm = graph_of(Words())
    plan = Quantize().make_plan(gm)
    assert "embedding" in plan  # what the first layer reads, by the name that the look-up had
    assert look_ups(fxopt.optimize(gm, [Quantize(plan=plan)], strict=True)) == [GATHER_NBITS]


# -- bags --------------------------------------------------------------------------------------------------------------


class Bags(nn.Module):
    """Bags of embeddings, in one of the ways to give them."""

    def __init__(self, mode: str = "sum", **options: object) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(WORDS, WIDTH, mode=mode, **options)

    def forward(self, index: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.bags(index, offsets, weights)


RAGGED = (indices(20), torch.tensor([0, 3, 3, 11]))


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (Bags(), (indices(4, 5),)),
        (Bags("mean"), (indices(4, 5).int(),)),
        (Bags("max"), (indices(4, 5),)),
        (Bags(), (indices(4, 5), None, torch.rand(4, 5))),
        (Bags(), RAGGED),
        (Bags("mean"), RAGGED),
        (Bags("mean", include_last_offset=True), (RAGGED[0], torch.tensor([0, 3, 3, 20]))),
    ],
    ids=["sum", "mean of int32", "max", "weighted", "ragged", "ragged mean", "last offset"],
)
def test_bags_sum_rows_of_the_table_in_blocks(net: Bags, inputs: tuple[Tensor, ...]) -> None:
    net.eval()
    result = check_pass(BAGS, net, *inputs, skips=[])
    assert look_ups(result.gm) == [GATHER_NBITS]
    with torch.no_grad():
        got = result.gm(*inputs)
        net.bags.weight.copy_(in_blocks(net.bags.weight))
        torch.testing.assert_close(got, net(*inputs), rtol=1e-6, atol=1e-6)
    to_onnx(result.gm)  # compared with ORT, optimizer off and on


def test_bags_of_any_number(tmp_path: Path) -> None:
    gm = fxopt.capture(Bags().eval(), (indices(4, 5),), dynamic_shapes=({0: "batch", 1: "length"},))
    small = BAGS(gm).gm
    small.recompile()
    other = indices(9, 3)
    want = in_blocks(gm.get_parameter("bags.weight"))[other].sum(1)
    torch.testing.assert_close(small(other), want, rtol=1e-6, atol=1e-6)
    to_onnx(small, tmp_path / "bags.onnx")
    torch.testing.assert_close(Session(tmp_path / "bags.onnx").run((other,))[0], want, rtol=1e-6, atol=1e-6)


class AllResults(nn.Module):
    """Bags of which the size is read, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH))

    def forward(self, index: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        sums, _, sizes, _ = torch.embedding_bag(self.weight, index, offsets, mode=1)
        return sums, sizes


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Bags(padding_idx=3), "rows of its padding do not count"),
        (AllResults(), "more than the sums of its bags is read"),
    ],
    ids=["padding", "other results"],
)
def test_bags_stay_float(net: nn.Module, why: str) -> None:
    check_pass(BAGS, net.eval(), *RAGGED, changes=0, skips=[why])


# -- an accuracy budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "kept"), [(0.0, True), (0.1, True), (0.3, False)])
def test_tables_take_half_of_a_budget_at_most(cost: float, kept: bool) -> None:
    calls = []

    def metric(model):
        stored = isinstance(model, nn.Module) and GATHER_NBITS in look_ups(model)
        calls.append(stored)
        return 1.0 - cost * stored

    small = fxopt.optimize(graph_of(Words()), [Quantize(metric=metric, max_drop=0.3)], strict=True)
    assert look_ups(small) == [GATHER_NBITS if kept else aten.embedding.default]
    assert calls[:2] == [False, True]
    told = next(note for note in small.report.steps[0].notes if note.startswith("tables of embeddings"))
    assert told.endswith("kept" if kept else "they stay floats")


def test_a_budget_counts_what_tables_cost():
    def metric(model):
        integers = sum("integers" in name for name in model.state_dict())
        return 1.0 - 0.1 * (GATHER_NBITS in look_ups(model)) - 0.25 * integers

    with pytest.raises(fxopt.PassError, match="no choice of widths"):
        fxopt.optimize(graph_of(Words()), [Quantize(metric=metric, max_drop=0.3)], strict=True)
