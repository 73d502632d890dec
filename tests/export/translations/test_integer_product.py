"""Convolutions of integers with a float result: each against eager PyTorch and against sums of integers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.quantized_ops import DEQUANTIZE, QUANTIZE
from tests.export.proof import captured, op_types, prove

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class IntegerConv(nn.Module):
    """A convolution of 8-bit integers, and maybe a function of its result."""

    def __init__(self, weight, bias, behind=None, **options):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.linspace(0.001, 0.02, len(weight)))
        self.register_buffer("zero", torch.zeros(len(weight), dtype=torch.int8))
        self.register_buffer("step", torch.tensor(0.02))
        self.register_buffer("offset", torch.tensor(100, dtype=torch.uint8))
        self.bias = None if bias is None else nn.Parameter(bias)
        self.behind, self.options = behind, options

    def forward(self, x):
        x = DEQUANTIZE(QUANTIZE(x, self.step, self.offset, 0, 0, 255), self.step, self.offset, 0)
        weight = DEQUANTIZE(self.weight, self.scale, self.zero, 0)
        y = CONV[weight.ndim - 2](x, weight, self.bias, **self.options)
        return y if self.behind is None else self.behind(y)


def made(out, channels, kernel, *, bias=True, **options):
    weight = torch.randint(-63, 64, (out, channels, *kernel), dtype=torch.int8)  # 7 bits: exact on every CPU
    return IntegerConv(weight, torch.randn(out) if bias else None, **options)


@pytest.mark.parametrize(
    ("kernel", "sizes", "options"),
    [
        ((3, 3), (7, 9), {}),
        ((3, 3), (7, 9), {"padding": 1, "bias": False}),
        ((3, 2), (9, 8), {"stride": (2, 1), "padding": (0, 1)}),
        ((2, 3), (9, 8), {"dilation": (3, 2), "padding": (1, 2)}),
        ((3, 3), (9, 9), {"stride": 2, "dilation": 2, "padding": 2}),
        ((4, 2), (9, 8), {"padding": "same"}),
        ((1, 1), (5, 4), {}),
        ((1, 1), (5, 4), {"stride": 2}),
        ((4, 4), (8, 8), {"stride": 4}),
        ((5,), (11,), {"padding": 2, "stride": 3}),
        ((2, 3, 2), (4, 5, 6), {"padding": (1, 0, 1)}),
    ],
)
def test_a_convolution_of_integers_is_one_product(kernel, sizes, options):
    file = prove(made(4, 3, kernel, **options), torch.randn(2, 3, *sizes))
    types = op_types(file)
    assert types.count("MatMulIntegerToFloat") == 1
    assert not any("Conv" in name for name in types)


def test_sizes_of_the_image_may_be_dynamic():
    conv = made(4, 3, (3, 3), stride=2, padding=1)
    gm = fxopt.capture(
        conv,
        (torch.randn(2, 3, 9, 8),),
        dynamic_shapes={"x": {0: "n", 2: Dim("h", min=3, max=64), 3: Dim("w", min=3, max=64)}},
    )
    file = to_onnx(gm)
    assert op_types(file).count("MatMulIntegerToFloat") == 1
    for shape in ((1, 3, 4, 4), (3, 3, 17, 5), (2, 3, 8, 31)):
        x = torch.randn(shape)
        torch.testing.assert_close(Session(file.to_bytes()).run([x])[0], conv(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2), st.integers(0, 2**31))
def test_sums_are_those_of_integers_in_float64(kernel, stride, padding, dilation, seed):
    generator = torch.Generator().manual_seed(seed)
    conv = made(3, 2, (kernel, kernel), bias=False, stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(2, 2, 9, 9, generator=generator) * 2
    integers = QUANTIZE(x, conv.step, conv.offset, 0, 0, 255).double() - 100
    sums = F.conv2d(integers, conv.weight.double(), stride=stride, padding=padding, dilation=dilation)
    want = sums * 0.02 * conv.scale.double()[:, None, None]
    (got,) = Session(to_onnx(fxopt.capture(conv, (x,))).to_bytes()).run([x])
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("behind", [None, torch.relu, F.relu6, lambda y: y.clamp(0, 3)])
def test_where_a_quantizer_reads_the_result_it_stays_a_convolution(behind):
    class Quantized(IntegerConv):
        def forward(self, x):
            return QUANTIZE(super().forward(x), self.step, self.offset, 0, 0, 255)

    weight = torch.randint(-63, 64, (4, 3, 3, 3), dtype=torch.int8)
    # Not compared: the float sums of eager PyTorch may round a tie the other way.
    file = to_onnx(captured(Quantized(weight, None, behind), torch.randn(2, 3, 7, 7)), validate=False)
    assert op_types(file).count("Conv") == 1
    assert "MatMulIntegerToFloat" not in op_types(file)


def test_groups_and_an_image_without_a_batch_stay_convolutions():
    weight = torch.randint(-63, 64, (4, 1, 3, 3), dtype=torch.int8)
    assert op_types(prove(IntegerConv(weight, None, groups=3 - 1), torch.randn(1, 2, 7, 7))).count("Conv") == 1
    assert op_types(prove(made(4, 3, (3, 3)), torch.randn(3, 7, 7), dynamic=False)).count("Conv") == 1
