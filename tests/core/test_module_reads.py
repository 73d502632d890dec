"""The code of a graph looks each submodule up once, and computes what it computed."""

import torch
from torch import nn

import fxopt

Body = list[str]


class Odd(nn.Module):
    """Submodules with numbers for names, one called as a variable would be, parameters at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.module_1 = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, module_2):
        return self.module_1(module_2) * self.scale


def test_each_submodule_is_looked_up_once():
    x = torch.randn(3, 4)
    gm = fxopt.capture(Odd().eval(), (x,))
    lines = [line.strip() for line in gm.code.splitlines()]
    looked_up = [line.partition(" = ")[2] for line in lines if line.startswith("module_") and "torch.ops" not in line]
    assert len([text for text in looked_up if text.endswith("self.module_1")]) == 1
    assert sum('"1")' in text for text in looked_up) == 2  # the inner Sequential, and the BatchNorm in it
    assert "getattr(getattr(" not in gm.code


def test_the_code_computes_the_same_in_both_modes():
    torch.manual_seed(0)
    net, x = Odd(), torch.randn(3, 4)
    gm = fxopt.capture(net, (x,))
    for mode in (True, False):
        net.train(mode)
        gm.train(mode)
        assert torch.equal(gm(x), net(x))
    assert torch.equal(gm.get_submodule("module_1.1.1").running_mean, net.module_1[1][1].running_mean)


def test_a_parameter_that_is_replaced_is_read():
    x = torch.randn(3, 4)
    gm = fxopt.capture(nn.Sequential(nn.Sequential(nn.Linear(4, 2, bias=False))), (x,))
    gm(x)
    weight = torch.randn(2, 4)
    gm.get_submodule("0.0").weight = nn.Parameter(weight)
    assert torch.equal(gm(x), x @ weight.T)


def test_another_transformer_of_the_code_is_kept():
    gm = fxopt.capture(nn.Sequential(nn.Linear(4, 2)), (torch.randn(3, 4),))

    def marked(before):
        return lambda body: ["# by another\n", *(body if before is None else before(body))]

    with gm.graph.on_generate_code(marked):
        gm.recompile()
    assert "# by another" in gm.code
    assert "module_1 = " in gm.code
    gm.recompile()
    assert "# by another" not in gm.code
