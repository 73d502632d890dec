"""Graphs whose code changes after other software took hold of them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.dropout(self.layer(x))


class Straight(Drops):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.dropout(self.layer(x))


@pytest.fixture(params=[Drops, Straight])
def gm(request: pytest.FixtureRequest) -> fxopt.CapturedModule:
    return fxopt.capture(request.param().train(), (X,))


def repeats(call: Any) -> bool:
    return torch.equal(call(X), call(X))


def test_a_forward_that_was_kept_runs_the_graph_as_it_is_now(gm: fxopt.CapturedModule) -> None:
    kept = gm.forward
    assert not repeats(kept)
    gm.eval()
    assert repeats(kept)
    assert torch.equal(kept(X), gm(X))


def test_setting_training_switches_the_graph_like_train_and_eval(gm: fxopt.CapturedModule) -> None:
    gm.training = False
    assert repeats(gm)
    gm.training = True
    assert not repeats(gm)


def test_setting_training_is_refused_where_the_graph_has_one_mode() -> None:
    gm = fxopt.optimize(Straight().eval(), ["freeze-mode"], example_inputs=(X,))
    gm.training = False
    with pytest.raises(fxopt.ModeError, match="valid in eval mode only"):
        gm.training = True
    assert not gm.training


def test_recompiles_under_a_class_that_was_put_before_its_own(gm: fxopt.CapturedModule) -> None:
    class Wrapper:
        pass

    outer = type("FSDPGraphModuleImpl", (Wrapper, type(gm)), {})
    gm.__class__ = outer  # type: ignore[assignment]  # as fully_shard does
    assert repeats(gm.eval())
    assert not repeats(gm.train())
    assert type(gm) is outer


def test_a_copy_has_code_and_modes_of_its_own(gm: fxopt.CapturedModule) -> None:
    copied = gm.clone()
    copied.eval()
    assert repeats(copied)
    assert not repeats(gm)


def test_forward_tells_its_parameters_to_tracers(gm: fxopt.CapturedModule) -> None:
    assert list(inspect.signature(gm.forward).parameters) == ["x"]


def test_torch_compiles_it_in_both_modes() -> None:
    gm = fxopt.capture(Straight().train(), (X,))
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    assert not repeats(compiled)
    gm.eval()
    assert torch.equal(compiled(X), gm(X))
