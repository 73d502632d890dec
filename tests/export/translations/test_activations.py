"""Activation functions, with NaN and infinities."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.export import Session, coverage, to_onnx
from fxopt.passes import Quantize
from tests.export.proof import INF, NAN, captured, in_parts, op_types, prove, prove_each

pytestmark = pytest.mark.ort

X = torch.tensor([[NAN, 8.0, -8.0, 0.0], [0.4, 1.5, -2.5, 3e-5], [1.0, -1.0, 0.5, -0.5]])

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": lambda x: F.hardtanh(x, -2.0, 0.5),
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.5),
    "softplus": F.softplus,
    "softplus_beta": lambda x: F.softplus(x, beta=2.0, threshold=3.0),
    "logsigmoid": F.logsigmoid,
    "softshrink": lambda x: F.softshrink(x, 0.4),
    "hardshrink": lambda x: F.hardshrink(x, 0.5),
    "threshold": lambda x: F.threshold(x, 0.3, -1.0),
    "glu": F.glu,
    "softmax": lambda x: x.softmax(-1),
    "softmax_first": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax_half": lambda x: x.half().softmax(-1, dtype=torch.float32),
    "tanhshrink": F.tanhshrink,
    "softsign": F.softsign,
    "rrelu": F.rrelu,
    "softmin": lambda x: F.softmin(x, 1),
}


@pytest.mark.parametrize("names", in_parts(ACTIVATIONS), ids="-".join)
def test_activation(names):
    prove_each({name: (ACTIVATIONS[name], X) for name in names})


def test_gelu_before_opset_20_is_the_pattern_that_ort_fuses():
    assert "Gelu" not in op_types(prove(lambda x: F.gelu(x), X, opset=18))
    assert op_types(prove(lambda x: F.gelu(x), X, opset=20)) == ["Gelu"]
    prove(lambda x: F.gelu(x, approximate="tanh"), X, opset=18)


@pytest.mark.parametrize("slopes", [(0.25,), (0.1, -0.5, 0.9), (0.1, 0.0, 1.5)])
def test_prelu_along_the_channels(slopes):
    layer = nn.PReLU(len(slopes))
    layer.weight.data = torch.tensor(slopes)
    prove(layer, torch.randn(4, 3, 5))
    prove(layer, torch.randn(4, 3))


def test_prelu_of_one_number():
    prove(lambda x: F.prelu(x, torch.tensor([0.3])), torch.tensor(-2.0))


@pytest.mark.parametrize("slopes", [(0.1, -0.5, 1.0), (0.1, 0.0, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_prelu_is_exact_for_every_kind_of_number(slopes, dtype):
    tiny = torch.finfo(dtype).tiny
    special = torch.tensor([-INF, INF, NAN, -tiny, tiny, -0.0, 0.0, -1.7, 2.3], dtype=dtype)
    x = special.repeat(2, len(slopes), 1)
    slope = torch.tensor(slopes, dtype=dtype)
    file = to_onnx(captured(lambda x: F.prelu(x, slope), x, dynamic=False))
    for level in ("none", "all"):
        (got,) = Session(file.to_bytes(), optimization=level).run((x,))
        torch.testing.assert_close(got, F.prelu(x, slope), rtol=0, atol=0, equal_nan=True)


def test_prelu_is_branchless_on_ort_and_one_operator_elsewhere():
    layer = nn.PReLU(3)
    assert op_types(prove(layer, torch.randn(4, 3, 5))) == ["Reshape", "Mul", "Max"]
    assert op_types(to_onnx(captured(layer, torch.randn(4, 3, 5)), runtime="onnx")) == ["Reshape", "PRelu"]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh(), nn.GELU()])
def test_a_layer_of_integers_in_front_of_floats_is_integer_whatever_activation_ends_it(activation):
    net, x = nn.Sequential(nn.Linear(64, 64), activation, nn.Linear(64, 8)).eval(), torch.randn(4, 64)
    quantize = Quantize(recipe="fast", skip=("linear_1",))
    file = to_onnx(fxopt.optimize(net, [quantize], (x,), calibration=[(x,)], strict=True))
    assert coverage(file).kernels["linear"] == (1, 2)


def test_mish_far_from_zero():
    far = torch.tensor([-INF, -200.0, -90.0, -20.0, 19.99, 20.01, 90.0, 200.0, INF])
    assert "Softplus" not in op_types(prove(lambda x: F.mish(x), far, dynamic=False))


@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
def test_softmax_along_a_short_axis_in_the_middle_is_taken_apart(function):
    x = torch.randn(2, 5, 6, 7) * 30
    x[0, :, 1, 1] = -INF
    x[0, 1, 2, 2] = -INF
    x[1, 2, 3, 3] = NAN
    assert "ReduceMax" in op_types(prove(lambda x: function(x, 1), x))
    for dim, shape in ((-1, (2, 5, 6)), (1, (2, 33, 6))):
        assert "ReduceMax" not in op_types(prove(lambda x, dim=dim: function(x, dim), torch.randn(*shape)))


def test_softmax_in_half_precision_stays_one_operator():
    x = torch.randn(2, 5, 6, dtype=torch.float16)
    assert "ReduceMax" not in op_types(prove(lambda x: x.softmax(1), x))


def test_softmax_of_one_number():
    prove(lambda x: x.softmax(0), torch.tensor(2.0))


def test_softmax_of_infinities():
    prove(lambda x: x.softmax(-1), torch.tensor([[-INF, 0.0, 1.0], [3.0, -INF, -INF]]), dynamic=False)


def test_dropout_in_evaluation_leaves_nothing():
    layer = nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.AlphaDropout(0.1), nn.Dropout2d(0.2))
    assert op_types(prove(layer, torch.randn(3, 4, 5, 5))) == ["Relu"]
