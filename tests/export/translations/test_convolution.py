"""Convolutions and pooling: strides, paddings, dilations, groups, ceil mode, divisors, inputs without a batch."""

import itertools

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.passes import Quantize
from tests.export.proof import op_types, prove, prove_each

pytestmark = pytest.mark.ort


RANKS = pytest.mark.parametrize("rank", [1, 2, 3])
CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"padding": "same"},
    {"padding": "same", "dilation": 3},
    {"padding": "valid", "stride": 2},
    {"bias": False, "padding": "same", "groups": 4},
    {"padding": 1, "padding_mode": "reflect"},
]


@RANKS
def test_conv(rank):
    layer, x = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1], torch.randn(3, 4, *(9, 8, 7)[:rank])
    prove_each({str(options): (layer(4, 8, 3, **options), x) for options in CONVOLUTIONS})


def test_conv_with_an_even_kernel_pads_more_behind():
    prove(nn.Conv1d(4, 8, 4, padding="same"), torch.randn(3, 4, 9))
    prove(nn.Conv2d(4, 8, (2, 3), stride=(1, 2), padding=(0, 1)), torch.randn(3, 4, 9, 8))


def test_conv_without_a_batch():
    prove(nn.Conv2d(4, 8, 3), torch.randn(4, 6, 6), dynamic=False)
    prove(nn.ConvTranspose1d(4, 8, 3), torch.randn(4, 6), dynamic=False)


def test_conv_with_computed_weights():
    prove(lambda x, w: F.conv2d(x, w * 2, padding=1), torch.randn(3, 4, 6, 6), torch.randn(8, 4, 3, 3), dynamic=False)


def test_conv_of_a_dynamic_image():
    layer = nn.Conv2d(3, 4, 3, padding=1).eval()
    prove(lambda x: layer(x.transpose(0, 2)), torch.randn(8, 3, 2, 6))  # the dynamic axis becomes an image axis


@RANKS
def test_conv_transpose(rank):
    every = (
        {},
        {"stride": 2},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"dilation": 2},
        {"groups": 2, "bias": False},
        {"stride": 2, "dilation": 3, "padding": 1, "output_padding": 2},
    )
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    x = torch.randn(3, 4, *(5, 4, 3)[:rank])
    prove_each({str(options): (layer(4, 6, 3, **options), x) for options in every})


SIZES = {1: (11,), 2: (11, 8), 3: (7, 8, 6)}


@RANKS
def test_max_pool(rank):
    every = (
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
        {"kernel_size": 2, "dilation": 2, "stride": 1},
        {"kernel_size": 3, "stride": 3, "dilation": 2, "padding": 1, "ceil_mode": True},
    )
    layer, x = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1], torch.randn(3, 4, *SIZES[rank]) - 5
    prove_each({str(options): (layer(**options), x) for options in every})


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"ceil_mode": True}, {"stride": 2, "dilation": 2}])
def test_max_pool_of_prelu_is_the_maximum_of_two_pools(options):
    slopes = torch.tensor([0.2, -0.7, 0.9])

    def pooled(x):
        return F.max_pool2d(F.prelu(x, slopes), 3, **options)

    assert op_types(prove(pooled, torch.randn(2, 3, 8, 9)))[-3:] == ["MaxPool", "MaxPool", "Max"]


def test_prelu_is_pooled_itself_where_others_read_it_or_the_pool_leaves_as_many():
    slopes, x = torch.tensor([0.2, -0.7, 0.9]), torch.randn(2, 3, 8, 8)

    def read_twice(x):
        y = F.prelu(x, slopes)
        return F.max_pool2d(y, 2), y

    assert op_types(prove(read_twice, x))[-2:] == ["Max", "MaxPool"]
    assert op_types(prove(lambda x: F.max_pool2d(F.prelu(x, slopes), 3, 1), x))[-2:] == ["Max", "MaxPool"]


@pytest.mark.parametrize(("skip", "pooled"), [((), "NhwcMaxPool"), (("conv2d",), "MaxPool")])
def test_a_pool_of_floats_is_quantized_behind_it_by_ort_too(skip, pooled, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)).eval()
    image, optimized = torch.randn(1, 3, 12, 12), tmp_path / "optimized.onnx"
    gm = fxopt.optimize(net, [Quantize(recipe="fast", skip=skip)], (image,), calibration=[(image,)], strict=True)
    Session(to_onnx(gm).to_bytes(), save_optimized=optimized)
    found = [node.op_type for node in onnx.load(optimized).graph.node]
    assert pooled in found
    assert ("Max" in found) is (skip != ())
    if skip:
        assert found.index("MaxPool") < found.index("QuantizeLinear")


def test_a_pool_of_what_no_layer_made_is_quantized_as_it_stands():
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(F.max_pool2d(torch.rand(1, 3, 8, 8), 2)).relu() * x

    gm = fxopt.optimize(Drawn().eval(), [Quantize(recipe="fast")], torch.randn(1), check="off", strict=True)
    assert "Max" not in op_types(to_onnx(gm, validate=False))


@RANKS
def test_max_pool_indices_count_within_a_channel(rank):
    prove((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1](2, return_indices=True), torch.randn(3, 4, *SIZES[rank]))


AVERAGES = [
    dict(zip(("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"), values, strict=True))
    for values in itertools.product((3,), (1, 2), (0, 1), (False, True), (False, True))
]


@pytest.mark.parametrize("rank", [1, 2])
def test_average_pool(rank):
    layer, x = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1], torch.randn(3, 4, *SIZES[rank])
    prove_each({str(options): (layer(**options), x) for options in AVERAGES})


def test_average_pool_with_a_divisor_of_its_own():
    prove(nn.AvgPool2d(3, 2, padding=1, divisor_override=5), torch.randn(3, 4, 8, 9))
    prove(nn.AvgPool3d(2, ceil_mode=True, divisor_override=3), torch.randn(3, 4, 5, 6, 7))
    prove(nn.AvgPool3d(2, ceil_mode=True), torch.randn(3, 4, 5, 6, 7))


@pytest.mark.parametrize("layer", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
def test_adaptive_pool(layer):
    x = torch.randn(3, 4, 9, 8)
    prove_each({str(size): (layer(size), x) for size in (1, 2, 3, 4, 7, (None, 2), (5, 1), (9, 8))})


def test_adaptive_pool_of_other_ranks():
    prove(nn.AdaptiveAvgPool1d(3), torch.randn(3, 4, 10))
    prove(nn.AdaptiveAvgPool3d((2, 1, 3)), torch.randn(3, 4, 5, 6, 7))
    prove(nn.AdaptiveMaxPool1d(4), torch.randn(3, 4, 10))
    prove(nn.AdaptiveMaxPool3d(2), torch.randn(3, 4, 5, 6, 7))
    prove(nn.AdaptiveAvgPool2d(2), torch.randn(4, 5, 7), dynamic=False)


def test_adaptive_average_pool_of_a_dynamic_size():
    class Net(nn.Module):
        def forward(self, x):
            return F.adaptive_avg_pool2d(x.transpose(0, 2), (3, 2))

    prove(Net(), torch.randn(7, 4, 2, 6))


def test_global_pools_are_one_node():
    assert op_types(prove(nn.AdaptiveAvgPool2d(1), torch.randn(3, 4, 9, 8))) == ["GlobalAveragePool"]


def test_unfold_and_fold():
    prove(nn.Unfold(3, padding=1, stride=2), torch.randn(3, 2, 6, 7))
    prove(nn.Fold((5, 6), (2, 3)), torch.randn(3, 12, 16))
