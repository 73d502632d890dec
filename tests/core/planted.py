"""Wrong rewrites to plant in a graph, nets to plant them in, and what a cut of them owes."""

import dataclasses
from typing import ClassVar

import torch
from torch import nn

import fxopt
from fxopt.contracts import Contract
from fxopt.numerics import measure
from fxopt.reduce import difference, size_in_nodes

aten = torch.ops.aten


def is_float(node):
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point()


@dataclasses.dataclass(frozen=True)
class Spoil(fxopt.Pass):
    """Multiply what the named nodes yield, by their own name, or on the way to their readers."""

    name: ClassVar[str] = "spoil"
    wrong: tuple[str, ...] = ()
    factor: float = 1.01
    behind: bool = False

    def run(self, rw):
        for node in rw.nodes():
            if rw.site_name(node) not in self.wrong:
                continue
            if self.behind:
                readers = list(node.users)
                new = rw.insert_call(aten.mul.Tensor, (node, self.factor), before=node.next, why="planted")
                for reader in readers:
                    rw.replace_argument(reader, node, new, why="planted")
            else:
                copy = rw.copy_call(node, node.args, node.kwargs, before=node, why="planted")
                rw.replace_call(node, aten.mul.Tensor, (copy, self.factor), why="planted")


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 1000)
        self.blocks = nn.Sequential(*(Block(16) for _ in range(4)))

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def graph_of(net, *inputs, dynamic=None):
    torch.manual_seed(0)
    return fxopt.capture(net().eval() if isinstance(net, type) else net, inputs, dynamic_shapes=dynamic)


def residual_net():
    """Return a graph of 37 calls with residuals, with a dynamic batch."""
    return graph_of(ResNet, torch.randn(2, 3, 6, 6), dynamic=({0: "batch"},))


def bisected(gm, wrong, check=None, **options):
    return fxopt.bisect(gm, [Spoil(wrong=(wrong,), **options)], check)


def values_of(gm):
    """Return what each node of a whole graph yields on the first sample, run with nothing of fxopt."""
    interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*gm.samples[0].leaves(), enable_io_processing=False)
    return {node.name: value for node, value in interpreter.env.items()}


def outputs_of(pair):
    args = pair.before.samples[0].args
    with torch.no_grad():
        return pair.before(*args), pair.after(*args)


def check_is_minimal(found, most=10):
    """Check the size, the error against that of the whole graphs at the same value, and the inputs against theirs."""
    cut = found.reduced
    before, after = values_of(found.before), values_of(found.after)
    want, got = outputs_of(cut)
    assert cut.nodes <= most < cut.whole_nodes == size_in_nodes(found.after)
    assert measure(want, got).max_abs == measure(before[cut.value], after[cut.value]).max_abs > 0
    for spec, value in zip(cut.before.inputs, cut.before.samples[0].args, strict=True):
        assert torch.equal(value, before[spec.name])
    assert difference(cut.before, cut.after, Contract.ROUNDING) == cut.problem
    fxopt.optimize(cut.after, [])
    return cut
