"""Branches, loops and wrappers."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.while_loop import while_loop

import fxopt
from fxopt.export import OnnxFile, to_onnx
from tests.export.proof import op_types, prove

pytestmark = pytest.mark.ort


def prove_program(model: nn.Module, x: torch.Tensor) -> OnnxFile:
    """Export a model whose branches read parameters; torch.export traces it by itself."""
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    return to_onnx(fxopt.capture(program))


class Branches(nn.Module):
    """Both sides read parameters and a value from outside."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        scale = x.mean()
        return torch.cond(x.sum() > 0, lambda t: self.left(t) * scale, lambda t: self.right(t) - scale, (x,))


@pytest.mark.parametrize("sign", [1, -1])
def test_branch_on_a_value(sign):
    file = prove_program(Branches(), torch.rand(3, 4) * sign)
    (branch,) = [node for node in file.model.graph if node.op_type == "If"]
    assert {"left.weight", "right.weight"} <= set(file.model.graph.initializers)
    assert not branch.attributes["then_branch"].as_graph().initializers


def test_branch_on_a_size():
    prove(lambda x: torch.cond(x.shape[0] > 2, lambda t: t + 1, lambda t: t - 1, (x,)), torch.randn(3, 4))


def test_branch_with_sizes_and_several_results():
    class Sizes(nn.Module):
        def forward(self, x):
            return torch.cond(
                x.sum() > 0,
                lambda t: (t.reshape(t.shape[0] * 2, 2) + 1, t.new_ones(t.shape[0])),
                lambda t: (t.reshape(-1, 2) * 2, t[:, 0] * t.shape[0] + 1),
                (x,),
            )

    prove_program(Sizes(), torch.randn(3, 4))


def test_branch_that_returns_what_it_was_given():
    prove(lambda x: torch.cond(x.sum() > 0, lambda t: t.clone(), lambda t: t * 2, (x,)), torch.randn(3, 4))


def test_nested_branches():
    def inner(t):
        return torch.cond(t.max() > 1, lambda u: u * 3, lambda u: u * 5, (t,))

    prove(lambda x: torch.cond(x.sum() > 0, inner, lambda t: -t, (x,)), torch.randn(3, 4))


def test_loop():
    def forward(x):
        return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t * 2 + i), (torch.tensor(0), x))

    file = prove(forward, torch.randn(3, 4))
    assert "Loop" in op_types(file)


def test_loop_whose_condition_reads_the_values():
    class Halve(nn.Module):
        def __init__(self):
            super().__init__()
            self.limit = nn.Buffer(torch.tensor(0.25))

        def forward(self, x):
            (y,) = while_loop(lambda t: t.abs().max() > self.limit, lambda t: (t / 2,), (x,))
            return y

    prove_program(Halve(), torch.randn(3, 4))


def test_no_grad_regions_are_inlined():
    class Net(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x * 2
            return y + x

    assert op_types(prove(Net(), torch.randn(3, 4))) == ["Mul", "Add"]


def test_names_are_unique_across_graphs():
    file = prove_program(Branches(), torch.rand(3, 4))
    names: list[str] = []

    def collect(graph):
        for node in graph:
            names.extend(output.name for output in node.outputs)
            for attribute in node.attributes.values():
                if attribute.type.name == "GRAPH":
                    collect(attribute.as_graph())

    collect(file.model.graph)
    assert len(names) == len(set(names))
