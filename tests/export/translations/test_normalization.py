"""Normalization layers in evaluation, with and without scale and shift, on inputs of several ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import fxopt
from fxopt.export import optimized_model, to_onnx
from tests.export.proof import op_types, prove

pytestmark = pytest.mark.ort


def settled(layer: nn.Module) -> nn.Module:
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return layer


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 1e-2}, {"track_running_stats": False}])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_batch_norm(rank, options):
    layer = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](4, **options)
    prove(settled(layer), torch.randn(6, 4, *(5, 4, 3)[:rank]))


def test_batch_norm_by_the_statistics_of_the_batch_in_half_sums_up_in_float32():
    def normed(x, weight):
        return F.batch_norm(x, None, None, weight=weight, training=True)

    x = (1000 + torch.randn(4, 3, 8)).half()  # whose squares have no form in half
    for weight in (torch.rand(3), torch.rand(3).half()):
        file = prove(lambda x, w=weight: normed(x, w), x)
        assert "Cast" in op_types(file)


def test_batch_norm_is_one_node():
    assert op_types(prove(settled(nn.BatchNorm2d(4)), torch.randn(3, 4, 5, 5))) == ["BatchNormalization"]


@pytest.mark.parametrize("shape", [(5,), (4, 5)])
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 1e-2}])
def test_layer_norm(shape, options):
    file = prove(settled(nn.LayerNorm(shape, **options)), torch.randn(3, 4, 5))
    assert op_types(file) == ["LayerNormalization"]


class Residual(nn.Module):
    """A sum that a layer norm and the next sum read, as in transformers."""

    def __init__(self):
        super().__init__()
        self.norm = settled(nn.LayerNorm(5))

    def forward(self, x, y):
        total = x + y
        return self.norm(total) + total


def test_a_sum_before_a_layer_norm_is_not_fused_to_a_slower_kernel():
    file = prove(Residual(), torch.randn(3, 4, 5), torch.randn(3, 4, 5))
    assert op_types(file) == ["Sum", "LayerNormalization", "Add"]
    assert "SkipLayerNormalization" not in {node.op_type for node in optimized_model(file.to_bytes()).graph}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_layer_norm_of_other_types(dtype):
    prove(settled(nn.LayerNorm(5)).to(dtype), torch.randn(3, 5).to(dtype))


def test_double_precision_is_kept():
    prove(settled(nn.BatchNorm2d(4)).double(), torch.randn(3, 4, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 1e-3}])
def test_rms_norm(options, opset):
    prove(settled(nn.RMSNorm(5, **options)), torch.randn(3, 4, 5), opset=opset)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 1e-2}])
def test_group_norm(rank, options):
    prove(settled(nn.GroupNorm(2, 4, **options)), torch.randn(3, 4, *(5, 4, 3)[:rank]))


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.GroupNorm(1, 16), (1, 16, 300, 300)),
    pytest.param(nn.GroupNorm(2, 16), (1, 16, 90000), marks=pytest.mark.slow),
    pytest.param(nn.InstanceNorm2d(2, affine=True), (1, 2, 1200, 1200), marks=pytest.mark.slow),
    (nn.LayerNorm([16, 300, 300]), (1, 16, 300, 300)),
], ids=["group", "group in 1d", "instance", "layer"])  # fmt: skip
def test_statistics_of_a_million_numbers_keep_their_digits(layer, shape):
    # ORT's own kernels add up all of them in a row, in single precision.
    prove(settled(layer), torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 3, dynamic=False)


def test_sizes_of_the_image_decide_who_adds_up():
    layer, image = settled(nn.GroupNorm(2, 4)), torch.randn(2, 4, 6, 6)
    free = {"input": {2: Dim("height", min=2, max=4096)}}
    files = {
        "short": to_onnx(fxopt.capture(layer, (image,))),
        "unknown": to_onnx(fxopt.capture(layer, (image,), dynamic_shapes=free)),
        "unknown, another runtime": to_onnx(fxopt.capture(layer, (image,), dynamic_shapes=free), runtime="onnx"),
    }
    ours = {name: "ReduceMean" in op_types(file) for name, file in files.items()}
    assert ours == {"short": False, "unknown": True, "unknown, another runtime": False}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"affine": True}, {"affine": True, "track_running_stats": True}])
def test_instance_norm(rank, options):
    layer = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1](4, **options)
    prove(settled(layer), torch.randn(3, 4, *(5, 4, 3)[:rank]))


def test_rms_norm_written_by_hand_is_what_ort_fuses():
    weight = torch.rand(5) + 0.5
    file = prove(lambda x: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), torch.randn(3, 4, 5))
    assert op_types(file) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    fused = [node.op_type for node in optimized_model(file.to_bytes()).graph]
    assert fused == ["SimplifiedLayerNormalization"]


def test_local_response_norm():
    prove(nn.LocalResponseNorm(2), torch.randn(3, 4, 5, 5))


def test_normalize():
    prove(lambda x: F.normalize(x, p=2.0, dim=-1), torch.randn(3, 4))
