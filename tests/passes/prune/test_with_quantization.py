"""Pruning and quantization of one net: masks that hold through QAT, and integers in the net that was shrunk."""

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt import passes
from fxopt.export import Session, coverage, to_onnx
from fxopt.numerics import measure
from fxopt.passes.prune.masks import masked_products
from tests.models.randomized import randomized
from tests.passes.prune.nets import Residual

pytestmark = pytest.mark.ort


@pytest.fixture
def images():
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masked(images):
    gm = fxopt.capture(randomized(Residual(16, 5)).eval(), (images[:4],), dynamic_shapes={"image": {0: "batch"}})
    return fxopt.optimize(gm, passes=[passes.Prune(0.5)], strict=True)


def test_masked_weights_are_0_through_quantization_aware_training_and_in_the_integers(masked, images, tmp_path):
    batches = [(images[at : at + 8],) for at in range(0, 32, 8)]
    net = fxopt.optimize(masked, passes=["prepare-qat"], calibration=batches, strict=True).train()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(net(images), torch.arange(32) % 5).backward()
        optimizer.step()
    held = list(masked_products(net))
    assert {weight.target for weight, _ in held} >= {"stem.weight", "body.weight", "head.weight"}
    for weight, mask in held:
        parameter, kept = net.get_parameter(weight.target), net.get_buffer(mask.target)
        assert (parameter[~kept] == 0).all()
        assert (parameter[kept] != before[weight.target][kept]).all()

    integers = fxopt.optimize(net.eval(), passes=["convert-qat"], strict=True)
    stored = [b for b in integers.buffers() if b.dtype == torch.int8 and b.ndim == 4]
    assert [int((b.flatten(1) == 0).all(dim=1).sum()) for b in stored] == [8, 8]  # rows of channels that are masked
    to_onnx(integers, tmp_path / "net.onnx")
    (scores,) = Session(tmp_path / "net.onnx").run([images])
    with torch.no_grad():
        assert measure(net(images), scores).sqnr_db > 40


def test_shrunk_net_runs_in_integers_as_a_whole(masked, images, tmp_path):
    shrunk = fxopt.optimize(masked, passes=["shrink-masked"], strict=True)
    assert shrunk.get_parameter("body.weight").shape == (8, 8, 3, 3)
    integers = fxopt.optimize(shrunk, passes=["quantize"], calibration=[(images,)], strict=True)
    file = to_onnx(integers, tmp_path / "net.onnx")
    assert coverage(file).integer_share == 1.0
    (scores,) = Session(tmp_path / "net.onnx").run([images])
    with torch.no_grad():
        assert measure(shrunk(images), scores).sqnr_db > 30


def test_quantized_net_is_not_pruned(masked, images):
    integers = fxopt.optimize(masked, passes=["quantize"], calibration=[(images,)], strict=True)
    with pytest.raises(fxopt.FxoptError, match="quantiz"):
        fxopt.optimize(integers, passes=[passes.Prune(0.5)], strict=True)
