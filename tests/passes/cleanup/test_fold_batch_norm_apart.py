"""Batch norms that pools stand before, and those of layers that are called several times."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes import FoldBatchNorm
from fxopt.testing import check_pass
from tests.passes.cleanup.test_fold_batch_norm import images, used


def pooled(*pools: nn.Module, layer: type[nn.Module] = nn.Conv2d, negative: bool = False) -> nn.Module:
    """Return a layer, pools, and a batch norm whose scales are positive, or one of which is not."""
    norm = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}[layer](6)
    norm = used(norm)
    with torch.no_grad():
        norm.weight.abs_().add_(0.1)
        norm.weight[2] *= -1 if negative else 1
    return nn.Sequential(layer(4, 6, 1), *pools, norm, nn.ReLU()).eval()


@pytest.mark.parametrize(
    "model",
    [
        pooled(nn.MaxPool2d(2)),
        pooled(nn.MaxPool2d(3, stride=2, padding=1)),
        pooled(nn.MaxPool1d(2), layer=nn.Conv1d),
        pooled(nn.MaxPool3d(2), layer=nn.Conv3d),
        pooled(nn.AvgPool2d(2), negative=True),
        pooled(nn.AvgPool2d(3, padding=1, count_include_pad=False), negative=True),
        pooled(nn.AvgPool1d(2), layer=nn.Conv1d),
        pooled(nn.AdaptiveAvgPool2d(2), negative=True),
        pooled(nn.MaxPool2d(2), nn.AvgPool2d(2)),
    ],
    ids=lambda model: ", ".join(type(each).__name__ for each in model[1:-2]),
)
def test_batch_norm_goes_through_pools(model: nn.Module) -> None:
    sizes = (8,) * (model[0].weight.ndim - 2)
    result = check_pass(FoldBatchNorm(), model, images(4, *sizes), skips=[])
    assert torch.ops.aten.batch_norm.default not in {node.target for node in result.gm.graph.nodes}
    assert list(result.gm.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (pooled(nn.MaxPool2d(2), negative=True), "max_pool2d takes the largest values, and 1 scales are negative"),
        (pooled(nn.AvgPool2d(3, padding=1)), "avg_pool2d counts zeros of its padding, or divides by another number"),
        (
            pooled(nn.AvgPool2d(2, divisor_override=3)),
            "avg_pool2d counts zeros of its padding, or divides by another number",
        ),
        (pooled(nn.ReLU()), "relu before it is not a convolution or linear layer"),
    ],
)
def test_batch_norm_stays_behind_pools_that_it_would_change(model: nn.Module, why: str) -> None:
    assert not check_pass(FoldBatchNorm(), model, images(4, 8, 8), skips=[why]).modified


class Twice(nn.Module):
    """A layer and its batch norm that read two inputs, one after the other; a third one goes through part of them."""

    def __init__(self, order: str, third: str = "") -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, bias=False), used(nn.BatchNorm2d(4))
        self.steps = [{"c": self.conv, "n": self.norm, "r": torch.relu}[letter] for letter in order]
        self.third = [{"c": self.conv, "n": self.norm}[letter] for letter in third]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = x, x.flip(1) * 2, x.flip(2)
        for step in self.steps:
            a, b = step(a), step(b)
        for step in self.third:
            c = step(c)
        return torch.cat([a, b] + [c] * bool(self.third), 1)


@pytest.mark.parametrize("order", ["cn", "cnr", "rnc", "rnrnc"])
def test_layer_that_is_called_twice_keeps_one_weight_and_its_name(order: str) -> None:
    model = Twice(order).eval()
    result = check_pass(FoldBatchNorm(), model, images(4, 6, 6))
    assert [name for name, _ in result.gm.named_parameters() if name.startswith("conv")] == ["conv.weight", "conv.bias"]
    norms = [node for node in result.gm.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    assert len(norms) == 2 * (order.count("n") - 1)
    convolutions = [node for node in result.gm.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert len({(fxopt.arg(node, "weight"), fxopt.arg(node, "bias")) for node in convolutions}) == 1
    assert len(convolutions) == 2


@pytest.mark.parametrize("third", ["c", "nc"])
def test_another_use_of_the_layer_keeps_the_weight_that_it_had(third: str) -> None:
    result = check_pass(FoldBatchNorm(), Twice("cn", third).eval(), images(4, 6, 6))
    convolutions = [node for node in result.gm.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    weights = [result.gm.get_parameter(str(fxopt.arg(node, "weight").target)) for node in convolutions]
    assert weights[0] is weights[1]
    assert weights[2] is not weights[0]


def test_one_of_two_places_is_folded_alone_if_it_alone_is_asked_for() -> None:
    gm = fxopt.capture(Twice("cn").eval(), (images(4, 6, 6),))
    rw = fxopt.Rewriter(gm.clone(), "fold-batch-norm", only={"batch_norm_1"})
    FoldBatchNorm().run(rw)
    left = [node.name for node in rw.gm.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    assert left == ["batch_norm"]
