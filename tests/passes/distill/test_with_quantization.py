"""Masks, quantizers and a teacher in one training run: masks stay, scales move, and the integers agree with eager."""

import pytest
import torch

import fxopt
from fxopt import passes
from fxopt.export import Session, to_onnx
from fxopt.numerics import measure
from fxopt.passes.distill import HintLoss, ResponseLoss
from fxopt.passes.prune.masks import masked_products
from tests.models.randomized import randomized
from tests.passes.prune.nets import Residual

pytestmark = pytest.mark.ort


@pytest.fixture(scope="module")
def distilled():
    """A student with masks and fake quantizers beside its float teacher, before and after some steps."""
    torch.manual_seed(0)
    images = torch.randn(32, 3, 8, 8)
    labels = torch.arange(32) % 5
    batches = [(images[at : at + 8],) for at in range(0, 32, 8)]
    both = passes.distilled_student(
        randomized(Residual(16, 5)).eval(),
        [passes.Prune(0.5), passes.PrepareQat(learn_scales=True)],
        (images[:4],),
        dynamic_shapes={"image": {0: "batch"}},
        losses=[ResponseLoss(alpha=0.7), HintLoss("head", "head", weight=0.1)],
        labels=labels[:4],
        calibration=batches,
    ).train()
    before = {name: p.detach().clone() for name, p in both.named_parameters()}
    optimizer = torch.optim.Adam([p for p in both.parameters() if p.requires_grad], 1e-2, weight_decay=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = both(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return both.eval(), before, losses, images, labels


def test_training_lowers_the_loss_and_moves_no_weight_of_the_teacher(distilled):
    both, before, losses, *_ = distilled
    assert losses[-1] < losses[0]
    for name, parameter in both.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    assert {p.requires_grad for name, p in both.named_parameters() if name.startswith("teacher")} == {False}


def test_masks_stay_and_scales_move(distilled):
    both, before, *_ = distilled
    held = list(masked_products(both))
    assert len(held) >= 3
    for weight, mask in held:
        assert (both.get_parameter(weight.target)[~both.get_buffer(mask.target)] == 0).all()
    growths = [name for name in before if "growth" in name]
    assert growths
    assert any(not torch.equal(both.get_parameter(name), before[name]) for name in growths)


def test_student_is_shrunk_and_converted_and_ort_agrees_with_eager(distilled, tmp_path):
    both, _, _, images, labels = distilled
    student = fxopt.optimize(both, passes=["extract-student"], strict=True)
    assert "node for node" in str(student.report)
    with torch.no_grad():
        want = both(images, labels)["output"]
        assert torch.equal(student(images), want)
    small = fxopt.optimize(student, passes=["shrink-masked"], strict=True)
    assert small.get_parameter("body.weight").shape == (8, 8, 3, 3)
    integers = fxopt.optimize(small, passes=["convert-qat"], strict=True)
    to_onnx(integers, tmp_path / "net.onnx")
    (scores,) = Session(tmp_path / "net.onnx").run([images])
    with torch.no_grad():
        assert measure(integers(images), scores).sqnr_db > 60
        assert measure(want, scores).sqnr_db > 35
