"""The small nets do what the other tests count on: any batch size, finite values, repeatable in eval mode."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.models import NETS, RANDOM_IN_EVAL, has_batch_norm


def run(net, example):
    with torch.no_grad():
        outputs = copy.deepcopy(net)(*example.args, **example.kwargs)  # some nets write their own buffers
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", NETS)
def test_runs_at_any_batch_in_both_modes(name):
    net = NETS[name]()
    for training, batch in ((True, 2), (True, 3), (False, 1), (False, 2), (False, 5)):
        outputs = run(net.train(training), net.example(batch))
        assert outputs
        assert all(leaf.isfinite().all() for leaf in outputs)


@pytest.mark.parametrize("name", NETS)
def test_eval_mode_repeats(name):
    net = NETS[name]().eval()
    example = net.example()
    same = all(torch.equal(a, b) for a, b in zip(run(net, example), run(net, example), strict=True))
    assert same is (name not in RANDOM_IN_EVAL)


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if has_batch_norm(net())])
def test_batch_norm_has_been_trained(name):
    for key, value in NETS[name]().state_dict().items():
        if key.endswith("running_var"):
            assert (value - 1).abs().max() > 0.1
        if key.endswith("running_mean"):
            assert value.abs().max() > 0.1


@pytest.mark.parametrize("name", NETS)
def test_dynamic_shapes_go_by_the_names_of_the_inputs(name):
    net = NETS[name]()
    example = net.example()
    names = set(net.forward.__code__.co_varnames[1 : 1 + net.forward.__code__.co_argcount])
    names |= set(example.kwargs)
    assert set(example.dynamic_shapes) <= names
    sizes = pytree.tree_leaves(example.dynamic_shapes)
    assert "batch" in sizes
