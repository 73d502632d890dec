"""The time of each operator stands at its name, and a branch does not count what runs inside it twice."""

import time

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import Session, node_times, to_onnx
from fxopt.export.coverage_run import kernel_times
from tests.models.branching import Textbook
from tests.tools.viz.foreign_files import foreign, parsed

pytestmark = pytest.mark.ort

LOOP = (
    "main (int64 n, float[200, 200] x) => (float[200, 200] y) <bool go = {1}> { y = Loop (n, go, x) <body = b "
    "(int64 i, bool c, float[200, 200] s) => (bool d, float[200, 200] t) { d = Identity(c) t = MatMul(s, x) }> }"
)


def test_times_stand_at_the_nodes_of_the_graph():
    gm = fxopt.capture(Textbook().eval(), (torch.randn(3, 10),))
    found = node_times(to_onnx(gm), runs=3)
    names = {node.name for module in (gm, *gm.children()) for node in getattr(module, "graph", gm.graph).nodes}
    assert {"cond", "linear"} <= set(found.ms) <= names
    assert all(ms >= 0 for ms in found.ms.values())


def test_a_large_product_takes_most_of_the_time():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = nn.Linear(1024, 1024), nn.Linear(1024, 2)

        def forward(self, x):
            return self.small(self.large(x).sigmoid())

    gm = fxopt.capture(Net().eval(), (torch.randn(64, 1024),))
    ms = node_times(to_onnx(gm), [gm.samples[0].args[0]], runs=5).ms
    assert max(ms, key=ms.get) == "linear"


def test_a_loop_is_without_what_runs_in_its_body():
    model = parsed(LOOP).SerializeToString()
    inputs = [torch.tensor(20), torch.eye(200)]
    started = time.perf_counter()
    kernels = kernel_times(model, inputs, 4, 1)
    whole = time.perf_counter() - started
    seconds = {kernel.node.op_type: sum(times) for kernel, times in kernels}
    assert sum(seconds.values()) < whole
    assert seconds["MatMul"] > seconds["Loop"]  # which would be the longer one, with its body


def test_files_of_others_have_the_names_of_their_operators(tmp_path):
    model = foreign("names with slashes", tmp_path).SerializeToString()
    given = torch.randn(Session(model).ort.get_inputs()[0].shape)
    names = {f"/layer1/conv{i}/Op" for i in range(5)}
    assert set(node_times(model, [given], runs=2).ms) <= names


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="runs is 0; wanted 1 or more"):
        node_times(b"", runs=0)
