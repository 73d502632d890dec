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
from fxopt.passes.cleanup.batch_norm_algebra import fold_after, fold_before, scale_and_shift
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
    "two norms alone": (
        lambda: [nn.ReLU(), used(nn.BatchNorm2d(4)), used(nn.BatchNorm2d(4, affine=False))],
        images(4, 3, 3),
    ),
    "two norms before": (
        lambda: [used(nn.BatchNorm2d(4)), used(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3)],
        images(4, 6, 6),
    ),
    "before linear": (lambda: [used(nn.BatchNorm1d(4)), nn.Linear(4, 6, bias=False)], images(4)),
}


@pytest.mark.parametrize("name", AFTER)
def test_folds_and_leaves_no_batch_norm(name: str) -> None:
    make, x = AFTER[name]
    alone = ["relu before it is not a convolution or linear layer"] if name == "two norms alone" else []
    result = check_pass(FoldBatchNorm(), nn.Sequential(*make()).eval(), x, dynamic_shapes=({0: "batch"},), skips=alone)
    targets = [str(node.target) for node in result.gm.graph.nodes]
    assert sum("batch_norm" in target for target in targets) == (name == "two norms alone")
    assert sum("update_buffer" in target for target in targets) == (name == "two norms alone")
    assert all("_1" not in key for key in result.gm.state_dict()), "a tensor that nobody else reads keeps its name"


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


class Unbatched(nn.Module):
    """A batch norm over axis 1 of a convolution without batch axis: over the rows, not the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 1), used(nn.BatchNorm1d(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class AddMm(nn.Module):
    """A batch norm before and one behind ``addmm``, whose weight is [in, out]."""

    def __init__(self, alpha: float = 1) -> None:
        super().__init__()
        self.bias, self.weight, self.alpha = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4, 6)), alpha
        self.first, self.second = used(nn.BatchNorm1d(4)), used(nn.BatchNorm1d(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.addmm(self.bias, self.first(x), self.weight, alpha=self.alpha))


class ComputedWeight(nn.Module):
    """A convolution whose weight is computed, as spectral norm and quantization do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), used(nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.nn.functional.conv2d(x, self.conv.weight / self.conv.weight.norm()))


class Broken(nn.Module):
    """A batch norm with a variance that no training gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.norm.running_var[0] = -1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def test_folds_into_addmm() -> None:
    result = check_pass(FoldBatchNorm(), AddMm().eval(), images(4), skips=[])
    assert sorted(result.gm.state_dict()) == ["bias", "weight"]


def test_folds_before_a_transposed_convolution_only_without_shift() -> None:
    norm = used(nn.BatchNorm2d(4))
    model = nn.Sequential(norm, nn.ConvTranspose2d(4, 6, 3, groups=2)).eval()
    why = "the border of conv_transpose2d would get the shift of the batch norm less often than its middle"
    assert not check_pass(FoldBatchNorm(), model, images(4, 5, 5), skips=[why]).modified
    with torch.no_grad():
        norm.bias.zero_()
        norm.running_mean.zero_()
    assert check_pass(FoldBatchNorm(), model, images(4, 5, 5), skips=[]).modified


def test_padding_is_no_obstacle_without_shift() -> None:
    model = Padded()
    with torch.no_grad():
        model.norm.bias.zero_()
        model.norm.running_mean.zero_()
    assert check_pass(FoldBatchNorm(), model.eval(), images(4, 6, 6), skips=[]).modified


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_weights_stay_frozen(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), used(nn.BatchNorm2d(4))).eval().requires_grad_(False)
    small = check_pass(FoldBatchNorm(), model, images(3, 4, 4)).gm
    assert sorted(small.state_dict()) == ["0.bias", "0.weight"]
    assert not any(tensor.requires_grad for tensor in small.parameters())


def test_the_counter_of_a_batch_norm_that_is_still_used_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), used(nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(torch.relu(self.norm(self.conv(x))))

    result = check_pass(
        FoldBatchNorm(), Shared().eval(), images(4, 3, 3), skips=["relu before it is not a convolution or linear layer"]
    )
    assert result.modified
    assert "norm.num_batches_tracked" in result.gm.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), used(nn.BatchNorm2d(6))).eval().to(dtype)
    assert check_pass(FoldBatchNorm(), model, images(4, 6, 6).to(dtype), skips=[]).modified


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (Unbatched(), torch.randn(4, 6, 1), "it normalizes axis 1 of conv2d, which has no batch axis"),
        (ComputedWeight(), images(4, 3, 3), "the weight of conv2d is computed by the graph"),
        (Broken(), images(4, 3, 3), "the folded weights of conv2d are not finite in torch.float32"),
        (
            nn.Sequential(nn.ReLU(), used(nn.BatchNorm2d(4))),
            images(4, 3, 3),
            "relu before it is not a convolution or linear layer",
        ),
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
    assert skips in ([why], ["batch norm is training"])
    assert not check_pass(FoldBatchNorm(), model.eval(), x).modified


def test_scaled_addmm_is_left_alone() -> None:
    why = "addmm scales its terms, or adds more than a bias"
    assert not check_pass(FoldBatchNorm(), AddMm(0.5).eval(), images(4), skips=[why, why]).modified


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
    scale, shift = scale_and_shift(gamma, beta, mean, torch.rand(channels).double() + 0.1)
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
