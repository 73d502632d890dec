"""Which values share memory: by the schemas, by the trace, and still after a file was read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes import RemoveIdentities
from fxopt.passes.cleanup.memory import Memory, same_layout

X = torch.randn(4, 6)


def returned(function: Callable[[torch.Tensor], Any], name: str) -> bool:
    gm = fxopt.capture(function, (X,))
    found = next(node for node in gm.graph.nodes if node.name == name)
    return Memory(gm).is_returned(found)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp(),
        lambda x: x.exp().t()[1:],
        lambda x: x.exp().split(2)[1],
        lambda x: x.exp().unbind(0)[1].unsqueeze(0),
        lambda x: x.exp().view(-1),
        lambda x: x.exp().chunk(2, 1)[0].squeeze(),
        lambda x: F.dropout(x.exp(), 0.5, False),
        lambda x: x.exp().type_as(x),
        lambda x: torch.einsum("ij->ji", x.exp()),
        lambda x: [{"a": x.exp()[0]}, 1],
    ],
)
def test_what_is_returned_through_views(function: Callable[[torch.Tensor], Any]) -> None:
    assert returned(function, "exp")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp() + 1,
        lambda x: x.exp().clone(),
        lambda x: x.exp().sum(0),
        lambda x: torch.cat([x.exp(), x]),
        lambda x: x.exp().t().matmul(x),
    ],
)
def test_what_is_returned_as_a_copy_only(function: Callable[[torch.Tensor], Any]) -> None:
    assert not returned(function, "exp")


def test_batch_norm_writes_its_statistics_and_nothing_else() -> None:
    gm = fxopt.capture(nn.BatchNorm1d(6), (X,))
    memory = Memory(gm)
    written = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr" and memory.is_written(node)}
    assert written == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_tensor_with_two_names_is_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("mean", self.norm.running_mean)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.mean

    gm = fxopt.capture(Two(), (X,))
    memory = Memory(gm)
    reads = [node for node in gm.graph.nodes if node.op == "get_attr" and "mean" in str(node.target)]
    assert reads
    assert all(memory.is_written(node) for node in reads)


def test_a_graph_from_a_file_shares_memory_as_before(tmp_path: Any) -> None:
    fxopt.save(fxopt.capture(lambda x: (x.clone().t(), x.exp().clone()), (X,)), tmp_path / "net.fxg")
    gm = RemoveIdentities()(fxopt.load(tmp_path / "net.fxg")).gm
    x = X.clone()
    gm(x)[0].zero_()
    assert torch.equal(x, X)
    assert sum("clone" in str(node.target) for node in gm.graph.nodes) == 1


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.ones(2, 3), torch.zeros(2, 3), True),
        (torch.ones(2, 3), torch.ones(3, 2).t(), False),
        (torch.ones(1, 3), torch.ones(3, 1).t(), True),
        (torch.ones(2, 3), torch.ones(1, 3).expand(2, 3), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), 1.0, False),
    ],
)
def test_same_layout(a: Any, b: Any, same: bool) -> None:
    assert same_layout(a, b) is same
