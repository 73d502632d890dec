"""Branches whose sides differ between training and evaluation: one graph, equal to eager in both modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.eager_control_flow import observing
from fxopt.graph_module import graph_modules
from fxopt.regions import COND
from tests.core.control_flow.once import captured_once
from tests.models.control_flow import rows

BATCH = ({0: "batch"},)


class Path(nn.Module):
    """Stochastic depth: its very input in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1) > 0.5) if self.training else x


class ReturnsDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return F.dropout(x, 0.5, self.training)
        return x * 2


class ReturnsDropoutOrInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else F.dropout(x, 0.5, training=self.training)


class ReturnsTwoDropouts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return F.dropout(x, 0.5, self.training)
        else:
            return F.alpha_dropout(x, 0.25, self.training)


class DropsByProbability(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(x, 0.5 if self.training else 0.0, True)
        if x.sum() > 0:
            y = F.dropout(y, 0.5 if self.training else 0.0, True)
        return y + x


class ReadsTheInputAgain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            y = F.dropout(x, 0.5, self.training)
            z = x + y
        else:
            y = x * 3
            z = x - y
        return torch.cat([x, y, z], 1)


class DropsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        if x.sum() > 0:
            F.dropout(y, 0.5, self.training, inplace=True)
        z = F.dropout(y, 0.5, self.training)
        z.mul_(2)  # in evaluation this writes into y, too
        return y + z


class WithPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.path, self.other = Path(), Path()
        self.norm = nn.BatchNorm1d(6)


class ReturnsPath(WithPaths):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.path(x)
        return x * 2


class ReturnsTwoPaths(WithPaths):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) if x.sum() > 0 else self.other(x)


class PathsInPaths(WithPaths):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        if x.sum() > 0:
            x = self.path(x)
            y = x + 1
        else:
            x = F.dropout(x, 0.5, self.training)
            if y.mean() < -0.05:
                y = self.other(y)
        return x + y


class BothSidesReadAPath(WithPaths):
    def forward(self, x: Tensor) -> Tensor:
        y = self.path(x)
        if x.sum() > 0:
            z = y + 1
        else:
            z = y - 1
        return z * y


class BranchesInTrainingOnly(WithPaths):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.mean() > 0:
            x = self.norm(x)
        if x.sum() < 0:
            x = x + 1
        return x


class BranchesInEvaluationOnly(WithPaths):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 0:
            x = x + 1
            if not self.training and x.max() > 0.5:
                x = x / 2
        if x.min() < -1:
            x = self.path(x)
        return x


class OneFunctionInsideAndOutside(WithPaths):
    def shifted(self, x: Tensor) -> Tensor:
        y = x * 2 + 1
        if y.mean() > 1:
            y = y - 1
        return y

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if x.sum() > 0:
                x = self.shifted(x)
        else:
            x = self.shifted(x)
        return x


class DropsInALoop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 1:
            x = F.dropout(x, 0.1, self.training) / 2
            if x.sum() > 0:
                x = F.dropout(x, 0.2, self.training)
        return F.dropout(x, 0.1, self.training)


class OnlyDropsInALoop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        turns, y = torch.zeros((), dtype=torch.int64), x
        while turns < 3:
            turns = turns + 1
            y = F.dropout(y, 0.1, self.training)
        return y


NETS = [
    ReturnsDropout, ReturnsDropoutOrInput, ReturnsTwoDropouts, DropsByProbability, ReadsTheInputAgain, DropsInPlace,
    ReturnsPath, ReturnsTwoPaths, PathsInPaths, BothSidesReadAPath, BranchesInTrainingOnly, BranchesInEvaluationOnly,
    OneFunctionInsideAndOutside, DropsInALoop, OnlyDropsInALoop,
]  # fmt: skip
LONG = [
    ReturnsDropout,
    DropsByProbability,
    ReturnsPath,
    ReturnsTwoPaths,
    OnlyDropsInALoop,
]  # others have what they have


def batch(seed: int) -> Tensor:
    return rows(seed, width=6, scales=(0.1, 1.0, 3.0, 0.5))


def conds(gm: fxopt.CapturedModule) -> list[Any]:
    nodes = [node for module in graph_modules(gm) for node in module.graph.nodes]
    return [node for node in nodes if node.target is COND]


def model_of(net: type[nn.Module], training: bool) -> nn.Module:
    torch.manual_seed(0)
    return net().train(training)


@captured_once
def graph_of(net: type[nn.Module], training: bool) -> fxopt.CapturedModule:
    """Return a graph of ``model_of(net, training)``."""
    return fxopt.capture(model_of(net, training), batch(0), dynamic_shapes=BATCH)


@pytest.mark.parametrize("net", [pytest.param(net, marks=[pytest.mark.slow] if net in LONG else []) for net in NETS])
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_graph_equals_eager_in_both_modes_on_every_side(net: type[nn.Module], training: bool) -> None:
    model, gm = model_of(net, training), graph_of(net, training)
    assert gm.modes == "both", gm.modes_reason
    taken: dict[bool, set[bool]] = {True: set(), False: set()}
    for seed in range(36):
        mode = seed % 5 < 3
        outputs = []
        for one in (model, gm):
            one.train(mode)
            torch.manual_seed(seed)
            with observing(lambda _, answer, mode=mode: taken[mode].add(answer)):
                outputs.append(one(batch(seed)))
        assert torch.equal(*outputs), f"seed {seed}, {'training' if mode else 'evaluation'}"
    assert taken == dict.fromkeys([True, False], {True, False} if conds(gm) else set())
    buffers = dict(gm.named_buffers())
    for key, want in model.named_buffers():
        assert torch.equal(want, buffers[key]), key


@pytest.mark.ort
@pytest.mark.parametrize("net", [pytest.param(net, marks=[pytest.mark.slow] if net in LONG else []) for net in NETS])
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_onnx_runtime_takes_the_sides_of_evaluation(net: type[nn.Module], training: bool, tmp_path: Any) -> None:
    from fxopt.export import Session, to_onnx

    model = model_of(net, training).eval()
    to_onnx(graph_of(net, training).eval(), tmp_path / "net.onnx")
    sessions = [Session(tmp_path / "net.onnx", optimization=level) for level in ("none", "all")]
    for seed in range(12):
        for session in sessions:
            torch.testing.assert_close(session.run([batch(seed)])[0], model(batch(seed)), rtol=1e-5, atol=1e-6)


def test_side_that_hands_back_its_input_in_evaluation_is_not_read_by_the_other() -> None:
    gm = fxopt.capture(ReturnsDropout().eval(), batch(0))
    assert fxopt.graph_text(gm).count("select_mode") == 0
    (node,) = conds(gm)
    assert len(node.args[3]) == 1


def test_trace_of_both_modes_is_the_same_from_either() -> None:
    for net in (ReturnsDropout, ReturnsTwoDropouts, ReadsTheInputAgain, DropsInALoop):
        first, second = (fxopt.capture(net().train(mode), batch(0)).eval() for mode in (True, False))
        assert fxopt.graph_text(first) == fxopt.graph_text(second)
