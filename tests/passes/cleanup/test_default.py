"""The list that ``optimize(model)`` runs: exact in training, on every small net."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.passes import DEFAULT
from tests.models import NETS, RANDOM_IN_EVAL


@pytest.mark.parametrize("name", sorted(NETS))
def test_no_default_pass_breaks_its_contract(name: str) -> None:
    net = NETS[name]().eval()
    example = net.example()
    sample = fxopt.Sample(example.args, example.kwargs)
    small = fxopt.optimize(net, None, sample, dynamic_shapes=example.dynamic_shapes, strict=True)
    assert [step.name for step in small.report.steps] == [item.spec() for item in DEFAULT]
    again = fxopt.optimize(small, strict=True)
    if name not in RANDOM_IN_EVAL:
        assert [step.status for step in again.report.steps] == ["unchanged"] * len(DEFAULT)


class Trained(nn.Module):
    """Batch norm, dropout, a residual, a value computed twice, no-op views and copies of what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.norm(self.conv(x)).relu())
        y = y + y[:].relu() * 0.7 + (self.conv.weight.exp() - self.conv.weight.exp() * 0.3).sum()
        z = y.mean((2, 3)).view(x.shape[0], 8).contiguous().float()
        return self.head(z * 1) + self.head(z).sin()


def test_three_steps_of_training_equal_eager_bit_for_bit() -> None:
    """Gradients, running statistics and random numbers, over several calls."""
    states = []
    for optimized in (False, True):
        torch.manual_seed(7)
        model = Trained().train()
        x = torch.randn(6, 3, 8, 8)
        module = fxopt.optimize(model, None, x, dynamic_shapes=({0: "batch"},), strict=True) if optimized else model
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(8)
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        states.append({key: item.clone() for key, item in module.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# Noise draws in a way that no seed fixes; eager SliceWriter has no backward; Residual's momentum=None reads a counter
# as a Python number while training.
@pytest.mark.parametrize("name", sorted(set(NETS) - {"Noise", "Residual", "SliceWriter"}))
def test_training_after_the_default_passes_equals_eager(name: str) -> None:
    """In train mode the default list is exact: gradients, buffers and outputs agree bit for bit."""
    torch.manual_seed(1)
    net = NETS[name]().train()
    example = net.example()
    sample = fxopt.Sample(example.args, example.kwargs)
    gm = fxopt.optimize(net, None, sample, dynamic_shapes=example.dynamic_shapes, check="off")
    results = []
    for module in (gm, net):
        start = {key: item.clone() for key, item in net.state_dict().items()}
        torch.manual_seed(5)
        copy = sample.clone()
        leaves = pytree.tree_leaves(module(*copy.args, **copy.kwargs))
        loss = sum(leaf.double().square().sum() for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad)
        grads = {}
        if torch.is_tensor(loss):
            loss.backward()
            grads = {id(p): p.grad.clone() for p in module.parameters() if p.grad is not None}
        module.zero_grad()
        buffers = {key: item.clone() for key, item in net.named_buffers()}
        results.append((leaves, grads, buffers))
        with torch.no_grad():
            for key, item in net.state_dict().items():
                item.copy_(start[key])
    (a, grads_a, buffers_a), (b, grads_b, buffers_b) = results
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True) if torch.is_tensor(p))
    assert grads_a.keys() == grads_b.keys()
    assert all(torch.equal(grads_a[key], grads_b[key]) for key in grads_a)
    assert all(torch.equal(buffers_a[key], buffers_b[key]) for key in buffers_a)
