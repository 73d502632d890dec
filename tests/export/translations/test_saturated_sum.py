"""hardsigmoid between integers: the sum that saturates, for every integer, and where it must not be written so."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.quantized_ops import DEQUANTIZE, QUANTIZE
from tests.export.proof import op_types


class Between(nn.Module):
    """hardsigmoid of dequantized integers, quantized again."""

    def __init__(self, scale, zero_point, out_scale, *, out_zero_point=0, read_twice=False):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("offset", torch.tensor(zero_point, dtype=torch.uint8))
        self.register_buffer("out_scale", torch.tensor(out_scale))
        self.register_buffer("out_offset", torch.tensor(out_zero_point, dtype=torch.uint8))
        self.read_twice = read_twice

    def forward(self, integers):
        y = F.hardsigmoid(DEQUANTIZE(integers, self.scale, self.offset, 0))
        q = QUANTIZE(y, self.out_scale, self.out_offset, 0, 0, 255)
        return (q, y) if self.read_twice else q


def exported(net):
    integers = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    return to_onnx(fxopt.capture(net, (integers,), modes="current"), validate=False), integers


@pytest.mark.parametrize(("scale", "zero_point"), [(0.05, 120), (0.02, 0), (0.02, 255), (0.5, 128), (1e-3, 100)])
@pytest.mark.parametrize("highest", [1.0, 0.6])
@pytest.mark.parametrize("optimization", ["none", "all"])
def test_every_integer_becomes_that_of_the_formula(scale, zero_point, highest, optimization):
    net = Between(scale, zero_point, highest / 255)
    file, integers = exported(net)
    assert op_types(file) == ["DequantizeLinear", "DequantizeLinear", "Add", "QuantizeLinear"]
    step, out = np.float64(np.float32(scale)), np.float64(np.float32(highest / 255))
    x = (integers.numpy().astype(np.float64) - zero_point) * step
    want = np.clip(np.clip(x / 6 + 0.5, 0, 1) / out, 0, 255)
    (got,) = Session(file.to_bytes(), optimization=optimization).run([integers])
    assert np.abs(got.numpy() - want).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    "options", [{"out_scale": 1.01 / 255}, {"out_scale": 1 / 255, "out_zero_point": 3},
                {"out_scale": 1 / 255, "read_twice": True}],
    ids=["integers above 1", "integers below 0", "read as floats"],
)  # fmt: skip
def test_where_integers_do_not_end_where_the_function_does_it_stays(options):
    file, integers = exported(Between(0.05, 120, **options))
    assert "HardSigmoid" in op_types(file)
    want = Between(0.05, 120, **options)(integers)
    got = Session(file.to_bytes()).run([integers])
    for one, other in zip(want if isinstance(want, tuple) else (want,), got, strict=True):
        steps = 1 if one.dtype is torch.uint8 else 1e-6  # a tie may be rounded the other way
        assert (one.double() - other.double()).abs().max() <= steps


def test_a_file_for_other_runtimes_keeps_the_function():
    integers = torch.arange(256, dtype=torch.uint8)
    gm = fxopt.capture(Between(0.05, 120, 1 / 255), (integers,), modes="current")
    assert "HardSigmoid" in op_types(to_onnx(gm, runtime="onnx", validate=False))
