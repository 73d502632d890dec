"""fold-constants: what becomes a constant, what must not, and that the bits stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import Contract
from fxopt.passes import FoldConstants, RemoveDeadCode
from fxopt.testing import check_pass
from tests.models import NETS

Function = Callable[[torch.Tensor], Any]


class Table(nn.Module):
    """A buffer and a parameter, each with arithmetic on it alone."""

    def __init__(self, trainable: bool = True) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(3, 2))
        self.weight = nn.Parameter(torch.randn(3, 2), requires_grad=trainable)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table.t().exp().t() + x @ self.weight.exp()


def calls(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in gm.graph.nodes if node.op == "call_function"]


def test_constants_are_folded_and_trainable_parameters_are_not() -> None:
    result = check_pass(FoldConstants(), Table(), torch.randn(2, 3), changes=1, skips=["weight is trainable"])
    assert [name for name, _ in result.gm.named_parameters()] == ["weight"]
    assert calls(result.gm) == ["matmul", "exp", "matmul", "add"]


def test_frozen_parameters_are_constants() -> None:
    result = check_pass(FoldConstants(), Table(trainable=False), torch.randn(2, 3), changes=2)
    assert calls(result.gm) == ["matmul", "matmul", "add"]
    assert not list(result.gm.named_parameters())


def test_parameters_are_constants_on_demand() -> None:
    result = check_pass(FoldConstants(parameters=True), Table(), torch.randn(2, 3), changes=2)
    assert not list(result.gm.named_parameters())


def test_half_of_a_parameter_is_multiplied_by_another_kernel_as_a_constant() -> None:
    class CrossAttention(nn.Module):
        """Takes queries and keys from one stacked weight, of sequences that lie along the first axis."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(384, 128))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            queries, _ = self.weight.split([128, 256])
            return F.linear(x.transpose(0, 1), queries)

    assert FoldConstants(parameters=True).contract is Contract.ROUNDING
    assert FoldConstants().contract is Contract.EXACT
    check_pass(FoldConstants(parameters=True), CrossAttention(), torch.randn(2, 130, 128))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.arange(3).float() * 2,
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]).exp(),
        lambda x: x + torch.ones(2, 3).tril(),
        lambda x: x + torch.eye(3)[1],
        lambda x: x + torch.arange(6).view(2, 3).split(1)[1].sum(0),
        lambda x: x.masked_fill(torch.ones(2, 3, dtype=torch.bool).triu(), 0),
        lambda x: x + torch.linspace(0, 1, 3).pow(torch.arange(3)).max(),
    ],
)
def test_nothing_constant_is_computed_afterwards(function: Function) -> None:
    result = check_pass(FoldConstants(), function, torch.randn(2, 3))
    assert len(calls(RemoveDeadCode()(result.gm).gm)) == 1


def test_golden() -> None:
    check_pass(
        FoldConstants(),
        lambda x: x + torch.ones(3) * 2,
        torch.randn(3),
        text="""
        %x : f32[3]
        %mul_folded = attribute f32[3]
        %0 : f32[3] = aten.add(%x, %mul_folded)
        return %0
        """,
    )


def test_written_buffer_is_no_constant() -> None:
    net = NETS["RunningMean"]()
    example = net.example()
    gm = fxopt.capture(net, fxopt.Sample(example.args, example.kwargs))
    assert not check_pass(FoldConstants(), gm).modified


class Scaled(nn.Module):
    """Arithmetic on the running statistics of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.norm.running_var.sqrt()


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_no_constants_while_they_may_change(training: bool) -> None:
    result = check_pass(FoldConstants(), Scaled().train(training), torch.randn(4, 3))
    assert not result.modified
    assert "the graph writes norm.running_var" in [skip.why for skip in result.skips]


def test_running_statistics_are_constants_once_the_mode_is_fixed() -> None:
    small = fxopt.optimize(Scaled().eval(), "freeze-mode,fold-constants", torch.randn(4, 3))
    assert calls(small) == ["batch_norm", "add"]


def test_a_large_result_stays_but_what_it_is_made_from_is_folded() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + (torch.ones(1) * 2).expand(1000, 1000)

    skips = ["its result would add 4000000 bytes"]
    result = check_pass(FoldConstants(max_growth_bytes=100), function, torch.ones(1000), skips=skips)
    assert calls(result.gm) == ["expand", "add"]


def test_a_huge_intermediate_is_never_made() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(1).expand(2**40)[:3]

    result = check_pass(FoldConstants(), function, torch.ones(3))
    assert calls(result.gm) == ["expand", "slice", "add"]


def test_the_bytes_of_what_is_replaced_count() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("small", torch.randn(100_000).half())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.small.neg().abs()

    assert calls(check_pass(FoldConstants(), Cast(), torch.randn(1)).gm) == ["add"]


def test_random_numbers_and_uninitialized_memory_are_no_constants() -> None:
    assert not check_pass(FoldConstants(), lambda x: x + torch.rand(3) * 2, torch.ones(3)).modified
    gm = fxopt.capture(lambda x: x + torch.empty(3) * 0, (torch.ones(3),), verify=False)
    assert not FoldConstants()(gm).modified


def test_what_is_returned_stays_a_call() -> None:
    why = "it is returned, and the caller may write into it"
    result = check_pass(FoldConstants(), lambda x: (x, torch.ones(3) * 2), torch.ones(3), skips=[why])
    first = result.gm(torch.ones(3))[1]
    first.zero_()
    assert torch.equal(result.gm(torch.ones(3))[1], torch.full((3,), 2.0))


def test_the_result_shares_no_memory_with_a_tensor_that_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table.view(2, 3) + self.table[0]

    gm = check_pass(FoldConstants(), Both(), torch.ones(2, 3)).gm
    pointers = [tensor.untyped_storage().data_ptr() for tensor in gm.buffers()]
    assert len(pointers) == len(set(pointers)) == 2


def test_strides_are_kept_so_that_matmul_rounds_the_same() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(300, 257))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.table.t()

    result = check_pass(FoldConstants(), Transposed(), torch.randn(7, 257), changes=1)
    assert [tensor.stride() for tensor in result.gm.buffers()] == [(1, 257)]


def test_a_known_size_becomes_a_number() -> None:
    gm = fxopt.capture(lambda x: x.view(x.shape[0], -1).sum(1), (torch.ones(2, 3, 4),), dynamic_shapes=({0: "batch"},))
    graph = gm.graph
    view = next(node for node in graph.nodes if "view" in str(node.target))
    with graph.inserting_before(view):
        size = graph.call_function(torch.ops.aten.sym_size.int, (view.args[0], 1))
        size.meta["val"] = 3
        product = graph.call_function(torch.ops.aten.sym_size.int, (view.args[0], 2))
        product.meta["val"] = 4
    view.args = (view.args[0], [-1, size, product])
    view.meta["val"] = view.args[0].meta["val"]
    list(graph.nodes)[-2].args = (view, [1])
    gm.recompile()
    result = FoldConstants()(gm)
    folded = next(node for node in result.gm.graph.nodes if "view" in str(node.target))
    assert folded.args[1] == [-1, 3, 4]
    assert calls(result.gm) == ["sym_size", "view", "sum"] or calls(result.gm) == ["view", "sum"]


def test_a_branch_keeps_its_values() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * (torch.ones(3) * 2).exp(), lambda x: x - 1, (x,))

    result = check_pass(FoldConstants(), function, torch.ones(3))
    assert result.modified
    for x in (torch.ones(3), -torch.ones(3)):
        assert torch.equal(result.gm(x), function(x))


def test_a_negative_limit_is_refused_before_any_graph_is_touched() -> None:
    with pytest.raises(ValueError, match="max_growth_bytes is -1; wanted 0 or more"):
        FoldConstants(max_growth_bytes=-1)


def test_a_mask_made_like_the_input_is_a_constant() -> None:
    """As shifted windows make theirs: zeros of the input's type, written into piece by piece."""

    def function(x: torch.Tensor) -> torch.Tensor:
        mask = x.new_zeros(4, 4)
        mask[:2, 2:] = 1
        return x + mask.masked_fill(mask != 0, -100.0)

    result = check_pass(FoldConstants(), function, torch.randn(2, 4, 4), dynamic_shapes=({0: "batch"},))
    assert [str(node.target) for node in result.gm.graph.nodes if node.op == "call_function"] == ["aten.add.Tensor"]


def test_zeros_of_a_dynamic_size_are_no_constant() -> None:
    result = check_pass(
        FoldConstants(), lambda x: x + torch.ones_like(x).cumsum(0), torch.randn(2, 3), dynamic_shapes=({0: "batch"},)
    )
    assert not result.modified


class StandardizedWeight(nn.Module):
    """A convolution whose weight is normalized in each call, as in NFNet and BiT: by a batch norm without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, 4, -1)
        normed = nn.functional.batch_norm(flat, None, None, weight=self.gain * 0.3, training=True, momentum=0.0)
        return nn.functional.conv2d(x, normed.reshape_as(self.weight))


def test_weights_that_are_standardized_in_each_call_are_constants_on_demand() -> None:
    fold = FoldConstants(max_growth_bytes=0, parameters=True)  # the weight, which is read twice, goes
    result = check_pass(fold, StandardizedWeight(), torch.randn(2, 3, 5, 5), changes=1)
    assert calls(result.gm) == ["conv2d"]


def test_statistics_that_are_kept_make_a_batch_norm_no_constant() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(5, 3))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.table)

    gm = fxopt.capture(Kept().train(), (torch.randn(5, 3),))
    folded = FoldConstants(parameters=True)(gm).gm.train()
    before = folded.get_buffer("norm.running_mean").clone()
    folded(torch.randn(5, 3))
    assert not torch.equal(folded.get_buffer("norm.running_mean"), before)
