"""Graphs of single modules: equal bit for bit, names kept, and refused where one call cannot stand for the module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.passes import PrepareQat, Prune

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Pair(nn.Module):
    """Two results, of which the second is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y.relu(), y.sigmoid()


class UsesPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pair(x)
        return a * b + b


def captured(net: nn.Module) -> fxopt.CapturedModule:
    torch.manual_seed(0)
    return fxopt.capture(net.train(), (X,), dynamic_shapes=({0: "batch"},))


def masked(gm: fxopt.CapturedModule) -> fxopt.CapturedModule:
    return Prune(0.5, "weights", min_sqnr_db=-1000.0)(gm).gm


GRAPHS: dict[str, tuple[Callable[[], fxopt.CapturedModule], str]] = {
    "plain": (lambda: captured(Net()), "layers.*"),
    "masked": (lambda: masked(captured(Net())), "layers.*"),
    "learned scales": (lambda: PrepareQat(learn_scales=True)(masked(captured(Net()))).gm, "layers.?"),
    "two results": (lambda: captured(UsesPair()), "pair"),
}


def step(gm: fxopt.CapturedModule, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    gm.zero_grad()
    y = gm(x)
    y.square().sum().backward()
    return y, {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", GRAPHS)
def test_results_and_gradients_are_equal_bit_for_bit_in_both_modes(name: str) -> None:
    make, pattern = GRAPHS[name]
    gm = make()
    split = fxopt.split_by_module(gm.clone(copy_tensors=True), pattern)
    for training in (True, False, True):
        gm.train(training)
        split.train(training)
        (y, gradients), (z, others) = step(gm, X[:3]), step(split, X[:3])
        assert torch.equal(y, z)
        assert gradients.keys() == others.keys()
        assert all(torch.equal(gradients[key], others[key]) for key in gradients)
    for key, tensor in gm.state_dict().items():  # the statistics of batch norms, too
        assert torch.equal(tensor, split.state_dict()[key]), key


def test_each_module_is_a_graph_that_holds_its_tensors_under_their_names() -> None:
    gm = masked(captured(Net()))
    split = fxopt.split_by_module(gm, "layers.*")
    for index in range(2):
        block = split.get_submodule(f"layers.{index}")
        assert isinstance(block, torch.fx.GraphModule)
        assert {name for name, _ in block.named_parameters()} == {name for name, _ in Block().named_parameters()}
        assert "up.weight_mask" in dict(block.named_buffers())
    calls = [node.target for node in split.graph.nodes if node.op == "call_module"]
    assert calls == ["layers.0", "layers.1"]
    assert split.state_dict().keys() == gm.state_dict().keys()
    assert all(a is b for a, b in zip(gm.parameters(), split.parameters(), strict=True))
    assert not any(node.op == "call_module" for node in gm.graph.nodes)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.other(self.layer(x)).relu())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.layer.weight)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if y.sum() > 0:
            return y * 2
        return y - 1


@pytest.mark.parametrize(
    ("net", "pattern", "reason"),
    [
        (Twice, "layer", "stands amid it and reads what it computes"),
        (Tied, "layer", r"the rest of the graph reads its layer\.weight"),
        (Branches, "layer", "it holds a branch or loop"),
        (Net, "layers.0.dropout", "it has no parameters"),
    ],
)
def test_refuses_a_module_that_one_call_cannot_stand_for(
    net: Callable[[], nn.Module], pattern: str, reason: str
) -> None:
    with pytest.raises(fxopt.PassError, match=reason):
        fxopt.split_by_module(captured(net()), pattern)


def test_refuses_a_pattern_that_fits_no_module() -> None:
    with pytest.raises(fxopt.PassError, match="no module with operators in the graph fits 'blocks"):
        fxopt.split_by_module(captured(Net()), "blocks.*")


def test_passes_refuse_what_is_split() -> None:
    with pytest.raises(fxopt.InvariantError, match="is a call_module"):
        fxopt.optimize(fxopt.split_by_module(captured(Net()), "layers.*"))
