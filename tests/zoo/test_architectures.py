"""The architectures with random weights answer different inputs differently, so that a wrong graph can be told."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.zoo import architectures

pytestmark = pytest.mark.zoo

NAMES = (*architectures.CLASSIFIERS, *architectures.SEGMENTERS, *architectures.TRANSFORMERS)
QUICK = ("resnet18", "mobilenet_v3_small", "bert", "llama")  # those that other quick tests take


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES])
def test_output_depends_on_the_input(name):
    built = architectures.build(name)
    with torch.no_grad():
        first, *_ = pytree.tree_leaves(built.model(*built.args, **built.kwargs))
    assert first.isfinite().all()
    assert (first[0] - first[1]).abs().max() > 0.1 * first.std() > 1e-3


def test_statistics_are_not_the_initial_ones():
    norms = [m for m in architectures.build("resnet18").model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        assert not norm.training
        assert norm.momentum == 0.1
        assert norm.running_mean.abs().max() > 0.05
        assert (norm.weight - 1).abs().max() > 0.1
