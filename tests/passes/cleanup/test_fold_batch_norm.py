"""fold-batch-norm: every layer it folds into, every reason it refuses, and the arithmetic against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.passes import FoldBatchNorm
from fxopt.passes.cleanup.fold_batch_norm import fold_after, fold_before, scale_and_shift
from fxopt.testing import check_pass


def used(norm: nn.Module) -> nn.Module:
    """Return a batch norm with statistics and weights unlike the initial ones."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2.0)
        if norm.affine:
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.normal_()
    return norm


def images(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape)


AFTER = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3), used(nn.BatchNorm1d(6))], images(4, 9)),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3, stride=2, padding=1), used(nn.BatchNorm2d(6))], images(4, 9, 8)),
    "conv3d": (lambda: [nn.Conv3d(2, 6, 3), used(nn.BatchNorm3d(6))], images(2, 5, 5, 5)),
    "no bias": (lambda: [nn.Conv2d(4, 6, 3, bias=False), used(nn.BatchNorm2d(6))], images(4, 6, 6)),
    "grouped": (lambda: [nn.Conv2d(4, 6, 3, groups=2), used(nn.BatchNorm2d(6))], images(4, 6, 6)),
    "depthwise": (lambda: [nn.Conv2d(4, 8, 3, groups=4), used(nn.BatchNorm2d(8))], images(4, 6, 6)),
    "padding same": (lambda: [nn.Conv2d(4, 6, 3, padding="same"), used(nn.BatchNorm2d(6))], images(4, 6, 6)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2), used(nn.BatchNorm2d(6))], images(4, 6, 6)),
    "transposed grouped": (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), used(nn.BatchNorm2d(6))], images(4, 5, 5)),
    "transposed 1d": (lambda: [nn.ConvTranspose1d(4, 6, 3), used(nn.BatchNorm1d(6))], images(4, 5)),
    "transposed 3d": (lambda: [nn.ConvTranspose3d(2, 4, 2), used(nn.BatchNorm3d(4))], images(2, 3, 3, 3)),
    "linear": (lambda: [nn.Linear(4, 6), used(nn.BatchNorm1d(6))], images(4)),
    "no affine": (lambda: [nn.Conv2d(4, 6, 3), used(nn.BatchNorm2d(6, affine=False))], images(4, 6, 6)),
    "eps": (lambda: [nn.Conv2d(4, 6, 3), used(nn.BatchNorm2d(6, eps=0.5))], images(4, 6, 6)),
    "two norms": (lambda: [nn.Conv2d(4, 6, 3), used(nn.BatchNorm2d(6)), used(nn.BatchNorm2d(6))], images(4, 6, 6)),
    "before, no padding": (lambda: [used(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3)], images(4, 6, 6)),
    "before, grouped": (lambda: [used(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, groups=2)], images(4, 6, 6)),
    "before, 1x1 same": (lambda: [used(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 1, padding="same")], images(4, 6, 6)),
    "before linear": (lambda: [used(nn.BatchNorm1d(4)), nn.Linear(4, 6, bias=False)], images(4)),
}


@pytest.mark.parametrize("name", AFTER)
def test_folds_and_leaves_no_batch_norm(name: str) -> None:
    make, x = AFTER[name]
    result = check_pass(FoldBatchNorm(), nn.Sequential(*make()).eval(), x, dynamic_shapes=({0: "batch"},), skips=[])
    targets = [str(node.target) for node in result.gm.graph.nodes]
    assert not any("batch_norm" in target or "update_buffer" in target for target in targets)


class Padded(nn.Module):
    """A batch norm before a convolution with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = used(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))


class TwoReaders(nn.Module):
    """A convolution that two values read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), used(nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class LastAxis(nn.Module):
    """A batch norm over axis 1 of what a linear layer gives along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), used(nn.BatchNorm1d(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (Padded(), images(4, 6, 6), "conv2d pads with zeros, which the shift of the batch norm would change"),
        (TwoReaders(), images(4, 6, 6), "conv2d has 2 users"),
        (LastAxis(), images(5, 4), "it normalizes axis 1 of linear, whose features are the last axis"),
        (
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)),
            images(4, 6, 6),
            "it keeps no running statistics, so that it normalizes by the batch",
        ),
    ],
)
def test_leaves_alone_and_says_why(model: nn.Module, x: torch.Tensor, why: str) -> None:
    skips = [skip.why for skip in check_pass(FoldBatchNorm(), model.eval(), x).skips]
    if not model.eval()(x).requires_grad:
        pytest.fail("the model must train")
    assert skips == [why] or skips == ["batch norm is training"], skips
    assert not check_pass(FoldBatchNorm(), model.eval(), x).modified


def test_training_graph_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), used(nn.BatchNorm2d(6))).train()
    result = check_pass(FoldBatchNorm(), model, images(4, 6, 6), skips=["batch norm is training"])
    assert not result.modified


def test_shared_convolution_is_folded_into_weights_of_its_own() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), used(nn.BatchNorm2d(4)), used(nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.conv(torch.relu(self.a(self.conv(x)))))

    result = check_pass(FoldBatchNorm(), Shared().eval(), images(4, 6, 6), skips=[])
    weights = [name for name, p in result.gm.named_parameters() if p.ndim == 4]
    assert len(weights) == 2


def test_names_of_the_layer_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), used(nn.BatchNorm2d(6))).eval()
    result = check_pass(FoldBatchNorm(), model, images(4, 6, 6))
    assert list(result.gm.state_dict()) == ["0.weight", "0.bias"]
    assert not torch.equal(result.gm.state_dict()["0.weight"], model[0].weight)


def test_train_afterwards_is_a_frozen_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), used(nn.BatchNorm2d(6)), nn.Dropout(0.5)).eval()
    x = images(4, 6, 6)
    small = fxopt.optimize(model, [FoldBatchNorm()], x)
    assert "keep its present statistics" in small.report.details()
    frozen = copy.deepcopy(model).train()
    frozen[1].eval()
    small.train()
    torch.manual_seed(3)
    want = frozen(x)
    torch.manual_seed(3)
    torch.testing.assert_close(small(x), want, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_folded_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), used(nn.BatchNorm2d(3))).eval().double()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    small = fxopt.optimize(model, [FoldBatchNorm()], x)
    parameters = dict(small.named_parameters())
    names = list(parameters)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(small, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(run, tuple(p.detach().clone().requires_grad_() for p in parameters.values()))


@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_arithmetic_equals_the_two_steps_in_float64(groups: int, width: int, transposed: bool, bias: bool) -> None:
    channels = groups * width
    weight = torch.randn(channels, width, 3, 3, dtype=torch.float64)
    offset = torch.randn(channels, dtype=torch.float64) if bias else None
    gamma, beta, mean = torch.randn(3, channels, dtype=torch.float64)
    scale, shift = scale_and_shift(gamma, beta, mean, torch.rand(channels).double() + 0.1, 1e-3)
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    layer = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    per_channel = (1, -1, 1, 1)
    want = layer(x, weight, offset, groups=groups) * scale.reshape(per_channel) + shift.reshape(per_channel)
    got = layer(x, *fold_after(weight, offset, scale, shift, transposed=transposed, groups=groups), groups=groups)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    if not transposed:
        want = layer(x * scale.reshape(per_channel) + shift.reshape(per_channel), weight, offset, groups=groups)
        got = layer(x, *fold_before(weight, offset, scale, shift, groups=groups), groups=groups)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
