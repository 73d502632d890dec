"""remove-dead-code: calls, random calls and attributes that nobody reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes import RemoveDeadCode
from fxopt.testing import check_pass

X = torch.randn(2, 3)


def calls(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in gm.graph.nodes if node.op == "call_function"]


def test_a_chain_that_nobody_reads_goes() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x.sin().exp().sum()
        return x + 1

    check_pass(
        RemoveDeadCode(),
        function,
        X,
        text="""
        %x : f32[2, 3]
        %0 : f32[2, 3] = aten.add(%x, 1)
        return %0
        """,
    )


def test_a_random_call_stays_where_another_one_is_left() -> None:
    def before(x: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x)
        x.sin()
        return torch.rand_like(x)

    def behind(x: torch.Tensor) -> torch.Tensor:
        y = torch.rand_like(x)
        torch.rand_like(x)
        return y

    skips = ["without it rand_like_1 would draw other random numbers"]
    result = check_pass(RemoveDeadCode(), before, X, skips=skips, changes=1)
    assert calls(result.gm) == ["rand_like", "rand_like"]
    # Behind all others it still moves the generator on for the next call of the graph.
    skips = ["without it rand_like would draw other random numbers"]
    assert not check_pass(RemoveDeadCode(), behind, X, skips=skips).modified


def test_what_follows_a_random_call_goes_without_it() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        F.dropout(x, 0.5, True).sin()
        return torch.rand_like(x)

    assert calls(check_pass(RemoveDeadCode(), function, X, changes=1).gm) == ["dropout", "rand_like"]


def test_the_only_random_call_goes_with_what_it_read() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        F.dropout(x.sin(), 0.5, True).exp()
        return x + 1

    assert calls(check_pass(RemoveDeadCode(), function, X, skips=[]).gm) == ["add"]


def test_a_random_branch_counts_as_random() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.cond(x.sum() > 0, lambda x: torch.rand_like(x), lambda x: x.sin(), (x,))
        return torch.rand_like(x)

    result = check_pass(RemoveDeadCode(), function, X)
    assert any("cond" in str(node.target) for node in result.gm.graph.nodes)


def test_unread_parameters_and_buffers_go() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unread = nn.Linear(3, 3), nn.Linear(3, 3)
            self.register_buffer("mask", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    result = check_pass(RemoveDeadCode(), Unread(), torch.ones(1, 3))
    assert list(result.gm.state_dict()) == ["used.weight", "used.bias"]


def test_state_that_the_graph_writes_stays() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x + 1

    model = Counter()
    result = check_pass(RemoveDeadCode(), model, X)
    assert not result.modified
    result.gm(X)
    assert result.gm.count == 1


def test_a_clean_graph_is_left_alone() -> None:
    assert not RemoveDeadCode()(fxopt.capture(nn.Linear(3, 3), (X,))).modified
