"""Masked normalization in ORT: any rank and element type, groups without channels, masks stored and computed."""

import pytest
import torch
from torch import Tensor

from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM
from tests.export.proof import captured, prove

pytestmark = pytest.mark.ort

KEPT = torch.tensor([True, False, True, True, False, False, False, False])
WEIGHT, BIAS = torch.rand(8) + 0.5, torch.randn(8)


def test_the_operators_reach_the_translations():
    def forward(x: Tensor) -> Tensor:
        return MASKED_GROUP_NORM(MASKED_LAYER_NORM(x, KEPT, None, None, 1e-3), KEPT, 2, None, None, 1e-3)

    gm = captured(forward, torch.randn(3, 8))
    calls = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert calls == [MASKED_LAYER_NORM, MASKED_GROUP_NORM]


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 2, 5, 8)])
@pytest.mark.parametrize(("weight", "bias"), [(WEIGHT, BIAS), (None, None), (WEIGHT, None)])
def test_layer_norm(shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    prove(lambda x: MASKED_LAYER_NORM(x, KEPT, weight, bias, 1e-3), torch.randn(shape) * 3 + 1)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 5)])
@pytest.mark.parametrize(("weight", "bias"), [(WEIGHT, BIAS), (None, None), (None, BIAS)])
def test_group_norm_one_of_whose_groups_has_no_channel(
    shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> None:
    prove(lambda x: MASKED_GROUP_NORM(x, KEPT, 2, weight, bias, 1e-3), torch.randn(shape) * 3 + 1)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_places_of_dynamic_sizes(opset: int) -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        wide = x[:, :, None] * y[None, None]  # [n3, 8, n5]
        return MASKED_GROUP_NORM(wide, KEPT, 2, WEIGHT, BIAS, 1e-3)

    prove(forward, torch.randn(3, 8), torch.randn(5), opset=opset)


def test_a_computed_mask() -> None:
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mask = y > 0
        return MASKED_LAYER_NORM(x, mask, WEIGHT, BIAS, 1e-3), MASKED_GROUP_NORM(x, mask, 2, WEIGHT, BIAS, 1e-3)

    prove(forward, torch.randn(3, 8), torch.randn(8), dynamic=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    weight, bias = WEIGHT.to(dtype), BIAS.to(dtype)
    prove(lambda x: MASKED_LAYER_NORM(x, KEPT, weight, bias, 1e-3), (torch.randn(3, 8) * 30).to(dtype))
    prove(lambda x: MASKED_GROUP_NORM(x, KEPT, 2, weight, bias, 1e-3), (torch.randn(3, 8, 5) * 30).to(dtype))


def test_infinity_and_nan_stay_out() -> None:
    x = torch.where(KEPT, torch.randn(3, 8), float("nan"))
    x[0, 1] = float("inf")
    prove(lambda x: MASKED_LAYER_NORM(x, KEPT, WEIGHT, BIAS, 1e-3), x)
