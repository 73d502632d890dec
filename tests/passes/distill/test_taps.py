import re

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes.distill.taps import find_tap
from tests.passes.distill.nets import captured, images, pair


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.body(x)) + x  # the line of the tests


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.relu, self.lstm = Block(), nn.ReLU(), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        x = self.relu(self.block(x))
        x = self.block(x) * 2
        y, (h, _) = self.lstm(torch.relu(x - 1))
        return {"sequence": y, "last": h, "places": x.argmax(-1)}


@pytest.fixture(scope="module")
def twice():
    return fxopt.capture(Twice().eval(), (torch.randn(2, 3, 4),))


@pytest.fixture(scope="module")
def student():
    return captured(pair()[0], images())


def line(text: str) -> int:
    with open(__file__) as file:
        return next(number for number, code in enumerate(file, 1) if text in code)


def error(gm: fxopt.CapturedModule, where: str) -> str:
    with pytest.raises(fxopt.PassError) as caught:
        find_tap(gm, where, of="student")
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("layer1", "relu_1"),
        ("layer1.0", "conv2d_1"),
        ("output", "linear"),
        ("norm", "batch_norm"),
        ("mean", "mean"),
        ("image", "image"),
    ],
)
def test_modules_outputs_and_nodes_are_found(student, where, name):
    assert find_tap(student, where, of="student").name == name


def test_calls_of_one_module_are_told_apart(twice):
    assert find_tap(twice, "block@0", of="student").name == "add"
    assert find_tap(twice, "block@1", of="student").name == "add_1"
    assert "block@0 or block@1" in error(twice, "block")


def test_module_with_several_results_is_ambiguous(twice):
    assert "node:getitem or node:getitem_1" in error(twice, "lstm")


def test_module_and_node_of_one_name_are_told_apart(twice):
    nodes = {node.name: node for node in twice.graph.nodes}
    other = fxopt.capture(_Clash().eval(), (torch.randn(2, 4),))
    assert "module:relu or node:relu" in error(other, "relu")
    assert find_tap(other, "module:relu", of="student").name == "relu_1"
    assert find_tap(other, "node:relu", of="student").name == "relu"
    assert nodes["relu"] is find_tap(twice, "relu", of="student")


class _Clash(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(torch.relu(x) - 1)


def test_lines_are_found_functional_ones_too(student, twice):
    place = f"nets.py:{_line_of_nets('torch.relu(self.norm')}"
    assert find_tap(student, place, of="student").name == "relu"
    assert find_tap(student, f"distill/{place}", of="student").name == "relu"


def _line_of_nets(text: str) -> int:
    from tests.passes.distill import nets

    with open(nets.__file__) as file:
        return next(number for number, code in enumerate(file, 1) if text in code)


def test_line_that_runs_twice_with_other_work_between_is_ambiguous(twice):
    assert "is several values" in error(twice, f"test_taps.py:{line('# the line of the tests')}")


def test_outputs_are_found_by_name(twice):
    assert find_tap(twice, "sequence", of="student").name == "getitem"
    assert "is several values" in error(twice, "output")


def test_unknown_name_gets_near_ones(student):
    said = error(student, "layer3")
    assert "the student has no value 'layer3'" in said
    assert re.search(r"try +layer", said)


def test_integers_are_no_tap(twice):
    said = error(twice, "argmax")
    assert "holds no numbers to compare" in said
    assert "i64[2, 3]" in said
