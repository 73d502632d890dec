"""The graphs of all steps in a report: there if asked for, left alone afterwards, and not saved."""

import pytest
import torch
from torch import nn

import fxopt


@pytest.fixture
def small():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).eval()
    example = (torch.randn(1, 3, 6, 6),)
    return fxopt.optimize(net, "fold-batch-norm,remove-identities", example, keep_graphs=True)


def test_there_is_a_graph_before_the_first_step_and_after_each(small):
    graphs = small.report.graphs
    assert [len(graph.graph.nodes) for graph in graphs] == [
        small.report.steps[0].nodes[0],
        *(s.nodes[1] for s in small.report.steps),
    ]
    assert fxopt.graph_text(graphs[-1]) == fxopt.graph_text(small)


def test_what_becomes_of_the_result_leaves_them_alone(small):
    text = fxopt.graph_text(small.report.graphs[-1])
    small.train()
    small.graph.erase_node(small.graph.output_node())
    assert fxopt.graph_text(small.report.graphs[-1]) == text


def test_they_are_not_kept_unless_asked_for():
    assert fxopt.optimize(nn.ReLU(), "remove-identities", (torch.randn(2),)).report.graphs == []


def test_a_report_is_written_without_them(small, tmp_path):
    assert "graphs" not in small.report.to_dict()
    assert fxopt.Report.from_dict(small.report.to_dict()) == small.report
    fxopt.save(small, tmp_path / "small.fxopt")
    assert fxopt.load(tmp_path / "small.fxopt").report.graphs == []
