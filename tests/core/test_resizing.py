"""Changes of sizes that take effect together: what is recorded of them, and what stays as it was."""

import torch
from torch import nn

import fxopt
from fxopt import Rewriter
from fxopt.resizing import Resizing


def test_each_read_of_a_tensor_is_counted_once_afterwards():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    rw = Rewriter(fxopt.capture(net.eval(), (torch.randn(2, 4),)).clone(), "test")
    reads = {str(node.target): node for node in rw.gm.graph.nodes if node.op == "get_attr"}
    assert rw.readers("1.weight", rw.gm.graph) == 1
    with Resizing(rw, "halved") as resizing:
        resizing.set_tensor(reads["0.weight"], torch.zeros(4, 4))
    for name, node in reads.items():
        assert rw.readers(name, rw.gm.graph) == 1
        assert rw.reads(rw.tensor(node)) == [node]
    assert not rw.gm.get_parameter("0.weight").any()
    assert net[0].weight.any(), "the model's own parameter is left alone"
