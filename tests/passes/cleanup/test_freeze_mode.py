"""freeze-mode: one mode is left, and the pass manager accepts that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes import FreezeMode
from fxopt.testing import check_pass
from tests.models import NETS


@pytest.mark.parametrize("training", [True, False])
def test_frozen_graph_has_no_other_mode(training: bool) -> None:
    net = NETS["StochasticDepth"]().train(training)
    example = net.example()
    gm = fxopt.capture(net, fxopt.Sample(example.args, example.kwargs), dynamic_shapes=example.dynamic_shapes)
    result = check_pass(FreezeMode(), gm)
    assert not any("modes" in node.meta for node in result.gm.graph.nodes)
    with pytest.raises(fxopt.ModeError, match=f"{'train' if training else 'eval'} mode only"):
        result.gm.train(not training)
    outputs = []
    for graph in (gm, result.gm):
        torch.manual_seed(0)
        outputs.append(graph(*example.args))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("training", [True, False])
def test_the_manager_keeps_a_frozen_graph(training: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train(training)
    small = fxopt.optimize(model, "freeze-mode", torch.randn(4, 3), strict=True)
    assert [step.status for step in small.report.steps] == ["changed"]
    assert small.modes == ("train" if training else "eval")
    counters = [node for node in small.graph.nodes if "update_buffer" in str(node.target)]
    assert len(counters) == training
