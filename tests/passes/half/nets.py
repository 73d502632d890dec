"""Small nets and shortcuts for the tests of half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxopt
from fxopt.freeze import frozen
from fxopt.passes.half import PrecisionPlan, half_candidates
from fxopt.passes.half.apply import CAST, apply_plan
from fxopt.rewriter import Rewriter


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.last(self.norm(self.conv(x)).relu().mean((2, 3))), -1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            y = torch.relu(self.first(x))
        else:
            y = torch.tanh(self.second(x))
        return self.first(y)


class Looping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 0.5:
            x = torch.tanh(self.linear(x)) * 0.5
        return self.linear(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def transformer() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False)


def graph_of(model: Any, *inputs: Tensor) -> fxopt.CapturedModule:
    """Return the frozen evaluation graph of a model or function."""
    torch.manual_seed(0)
    return frozen(fxopt.capture(model.eval() if isinstance(model, nn.Module) else model, inputs).eval())


def rewriter_of(gm: fxopt.CapturedModule) -> Rewriter:
    return Rewriter(gm.clone(), "test")


def all_half(gm: fxopt.CapturedModule, dtype: torch.dtype = torch.float16) -> PrecisionPlan:
    """Return the plan that makes half whatever can be."""
    return PrecisionPlan(dict.fromkeys(half_candidates(rewriter_of(gm), dtype)[0], dtype))


def applied(gm: fxopt.CapturedModule, plan: PrecisionPlan, **options: bool) -> fxopt.CapturedModule:
    rw = rewriter_of(gm)
    apply_plan(rw, plan, **options)
    rw.finish()
    return rw.gm


def casts_of(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Return the casts between floating types in a graph and the graphs inside it."""
    return [
        node
        for module in fxopt.graph_module.graph_modules(gm)
        for node in module.graph.nodes
        if node.target is CAST and node.args[0].meta["val"].is_floating_point()
    ]
