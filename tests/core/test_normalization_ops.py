"""Masked normalization, against the formula in double precision, against torch's layers, and by finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt import Pass, Rewriter, arg
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM

KEPT = torch.tensor([True, False, True, True, False, True, True, False])
SHAPES = [(8,), (3, 8), (2, 3, 8)]
IMAGES = [(3, 8), (3, 8, 5), (2, 8, 3, 4)]


def affine(which: bool, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Tensor | None]:
    return (torch.rand(size, dtype=dtype) + 0.5, torch.randn(size, dtype=dtype)) if which else (None, None)


def expected(x: Tensor, mask: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return the formula, written out group by group: channels along the axis 1 of ``x``."""
    result = np.zeros(x.shape)
    array, each = x.double().numpy(), x.shape[1] // groups
    for row in range(x.shape[0]):
        for group in range(groups):
            channels = [c for c in range(group * each, (group + 1) * each) if mask[c]]
            if channels:
                part = array[row, channels]
                result[row, channels] = (part - part.mean()) / np.sqrt(part.var() + eps)
    column = (1, -1, *[1] * (x.ndim - 2))
    result = result * (1.0 if weight is None else weight.double().numpy().reshape(column))
    return torch.from_numpy(result + (0.0 if bias is None else bias.double().numpy().reshape(column)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [False, True])
def test_layer_norm_is_the_formula(shape: tuple[int, ...], scales: bool) -> None:
    x, (weight, bias) = torch.randn(shape) * 3 + 1, affine(scales)
    want = expected(x.reshape(-1, 8), KEPT, 1, weight, bias, 1e-3).reshape(shape)
    torch.testing.assert_close(MASKED_LAYER_NORM(x, KEPT, weight, bias, 1e-3), want.float())


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scales", [False, True])
def test_group_norm_is_the_formula(shape: tuple[int, ...], groups: int, scales: bool) -> None:
    x, (weight, bias) = torch.randn(shape) * 3 + 1, affine(scales)
    want = expected(x, KEPT, groups, weight, bias, 1e-3)
    torch.testing.assert_close(MASKED_GROUP_NORM(x, KEPT, groups, weight, bias, 1e-3), want.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_mask_of_ones_changes_nothing(dtype: torch.dtype) -> None:
    x, (weight, bias), ones = torch.randn(3, 8, 5).to(dtype), affine(True, dtype=dtype), torch.ones(8, dtype=torch.bool)
    turned = x.transpose(1, 2)
    plain = F.layer_norm(turned, (8,), weight, bias, 1e-5)
    torch.testing.assert_close(MASKED_LAYER_NORM(turned, ones, weight, bias, 1e-5), plain)
    torch.testing.assert_close(
        MASKED_GROUP_NORM(x, ones, 4, weight, bias, 1e-5), F.group_norm(x, 4, weight, bias, 1e-5)
    )


def test_kept_channels_get_what_a_smaller_norm_gives() -> None:
    x, (weight, bias) = torch.randn(4, 8), affine(True)
    small = F.layer_norm(x[:, KEPT], (int(KEPT.sum()),), weight[KEPT], bias[KEPT])
    torch.testing.assert_close(MASKED_LAYER_NORM(x, KEPT, weight, bias, 1e-5)[:, KEPT], small)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_is_masked_has_no_part_in_results_and_gradients(poison: float) -> None:
    x, (weight, bias) = torch.randn(2, 8), affine(True)
    for operator, groups in ((MASKED_LAYER_NORM, ()), (MASKED_GROUP_NORM, (2,))):
        clean = x.clone().requires_grad_()
        dirty = torch.where(KEPT, x, poison).requires_grad_()
        results = [operator(value, KEPT, *groups, weight, bias, 1e-5) for value in (clean, dirty)]
        assert torch.equal(*results)
        assert torch.equal(results[0][:, ~KEPT], bias[~KEPT].expand(2, 3))
        for result in results:
            result.square().sum().backward()
        assert torch.equal(clean.grad, dirty.grad)
        assert (clean.grad[:, ~KEPT] == 0).all()


def test_a_group_without_channels_is_its_bias() -> None:
    mask = torch.tensor([True, True, True, False, False, False, False, False])
    x, (weight, bias) = torch.randn(2, 8, 3).requires_grad_(), affine(True)
    result = MASKED_GROUP_NORM(x, mask, 2, weight, bias, 1e-5)
    assert torch.equal(result[:, 4:], bias[4:, None].expand(2, 4, 3))
    nothing = MASKED_LAYER_NORM(torch.randn(2, 8), torch.zeros(8, dtype=torch.bool), weight, bias, 1e-5)
    assert torch.equal(nothing, bias.expand(2, 8))
    MASKED_GROUP_NORM(x, mask, 2, weight, bias, 1e-5).square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scales", [False, True])
def test_gradients_are_those_of_finite_differences(scales: bool) -> None:
    def ready(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if tensor is None else tensor.requires_grad_() for tensor in tensors]

    x, weight, bias = ready(torch.randn(2, 8, dtype=torch.float64), *affine(scales, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *args: MASKED_LAYER_NORM(args[0], KEPT, *args[1:], 1e-5), (x, weight, bias))
    x, weight, bias = ready(torch.randn(2, 8, 3, dtype=torch.float64), *affine(scales, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda *args: MASKED_GROUP_NORM(args[0], KEPT, 2, *args[1:], 1e-5), (x, weight, bias)
    )


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.ones(8), r"the mask is torch.float32 \[8\]; wanted torch.bool \[8\]"),
        (torch.ones(1, dtype=torch.bool), r"the mask is torch.bool \[1\]; wanted torch.bool \[8\]"),
        (torch.ones(1, 8, dtype=torch.bool), r"the mask is torch.bool \[1, 8\]; wanted"),
    ],
)
def test_refuses_masks_of_other_types(mask: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MASKED_LAYER_NORM(torch.randn(2, 8), mask, None, None, 1e-5)
    with pytest.raises(ValueError, match=told):
        MASKED_GROUP_NORM(torch.randn(2, 8), mask, 2, None, None, 1e-5)


def test_refuses_groups_that_do_not_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="3 groups do not divide 8 channels"):
        MASKED_GROUP_NORM(torch.randn(2, 8), KEPT, 3, None, None, 1e-5)


class MaskNorms(Pass):
    """Puts the masked operators in, for a graph that holds them."""

    def run(self, rw: Rewriter) -> None:
        aten = torch.ops.aten
        for node in rw.calls(aten.layer_norm.default, aten.group_norm.default):
            source, weight, bias, eps = (arg(node, name) for name in ("input", "weight", "bias", "eps"))
            mask = rw.constant("mask", KEPT, near=node)
            if node.target is aten.layer_norm.default:
                rw.replace_call(node, MASKED_LAYER_NORM, (source, mask, weight, bias, eps), why="test")
            else:
                args = (source, mask, arg(node, "num_groups"), weight, bias, eps)
                rw.replace_call(node, MASKED_GROUP_NORM, args, why="test")


def test_a_graph_with_them_is_saved_and_loaded_and_trains(tmp_path) -> None:
    net = nn.Sequential(nn.LayerNorm(8), nn.Unflatten(-1, (8, 1)), nn.GroupNorm(2, 8)).train()
    gm = MaskNorms()(fxopt.capture(net, (torch.randn(3, 8),), dynamic_shapes=({0: "batch"},))).gm
    assert {MASKED_GROUP_NORM, MASKED_LAYER_NORM} <= {node.target for node in gm.graph.nodes}
    fxopt.save(gm, tmp_path / "net.fxopt")
    x = torch.randn(5, 8)
    loaded = fxopt.load(tmp_path / "net.fxopt")
    assert torch.equal(loaded(x), gm(x))
    loaded(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in loaded.parameters())
