"""A run in isolation leaves nothing behind."""

import pytest
import torch
from torch import nn

from fxopt.isolation import isolated


class Counter(nn.Module):
    """Writes its buffers in every way there is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("same", self.calls)
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls += 1
        assert self.same == self.calls
        self.last = x * 2
        self.nothing = x
        return x + self.calls + torch.rand(())


def test_buffers_are_neither_changed_nor_touched():
    model = Counter()
    calls, last = model.calls, model.last
    versions = calls._version, last._version
    with isolated(model):
        model(torch.ones(2))
        assert model.calls == 1
    assert all(now is before for now, before in ((model.calls, calls), (model.same, calls), (model.last, last)))
    assert model.nothing is None
    assert (calls._version, last._version) == versions
    assert calls == 0
    assert last.tolist() == [0, 0]


def test_every_run_draws_the_same_numbers_and_the_caller_notices_none():
    model = Counter()
    state = torch.random.get_rng_state()
    found = []
    for _ in range(2):
        with isolated(model):
            found.append(model(torch.ones(2)))
    assert torch.equal(*found)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_buffers_come_back_after_an_error():
    model = Counter()
    calls = model.calls
    with pytest.raises(TypeError), isolated(model):
        model("no tensor, which the model notices only after it wrote its buffers")
    assert model.calls is calls
    assert calls == 0
