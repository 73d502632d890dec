"""Signs and ternary codes: the published formulas, training through the rounding, and the packed form of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.passes import BinarizeWeights
from fxopt.passes.quantize.binarize import binary_weight, ternary_weight
from fxopt.testing import check_pass
from fxopt.weight_only_ops import BINARIZE_STE, LOOKUP_NBITS, TERNARIZE_STE

ROWS = st.lists(st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6), min_size=1, max_size=4)
ALL = {"keep_ends": False, "min_elements": 1, "min_sqnr_db": -100.0}


def by_formula(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the rounded weight in float64 numpy, one channel after the other."""
    rows = weight.detach().double().numpy().reshape(len(weight), -1)
    rounded = np.zeros_like(rows)
    for row, out in zip(rows, rounded, strict=True):
        size = np.abs(row)
        if kind == "binary":
            out[:] = np.where(row >= 0, 1, -1) * size.mean()
        elif (kept := size > np.float32(0.7) * size.mean()).any():
            out[kept] = np.sign(row[kept]) * size[kept].mean()
    return torch.from_numpy(rounded.reshape(weight.shape)).float()


@given(ROWS)
def test_no_other_factor_and_signs_are_closer(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    codes, alpha = binary_weight(weight)
    error = float((weight - (codes * 2 - 1) * alpha[:, None]).square().sum())
    for factor in (0.9, 1.1):
        assert error <= float((weight - (codes * 2 - 1) * alpha[:, None] * factor).square().sum()) + 1e-4
    torch.testing.assert_close(((codes * 2 - 1) * alpha[:, None]), by_formula(weight, "binary"))


def test_ternary_codes_are_those_of_the_paper():
    weight = torch.randn(5, 3, 3, 3)
    codes, alpha = ternary_weight(weight)
    values = torch.tensor([0.0, 1.0, -1.0])[codes] * alpha[:, None]
    torch.testing.assert_close(values.reshape(weight.shape), by_formula(weight, "ternary"))
    assert 0.3 < float((codes == 0).double().mean()) < 0.55  # 42 % of normal numbers are below the threshold


@pytest.mark.parametrize("kind", ["binary", "ternary"])
@pytest.mark.parametrize("train", [False, True])
def test_layers_multiply_by_the_rounded_weight(kind: str, train: bool) -> None:
    layer, x = nn.Conv2d(5, 6, 3), torch.randn(2, 5, 6, 6)
    result = check_pass(BinarizeWeights(kind=kind, train=train, **ALL), layer, x, changes=1, skips=[])
    want = nn.functional.conv2d(x, by_formula(layer.weight, kind), layer.bias)
    torch.testing.assert_close(result.gm(x), want, rtol=1e-4, atol=1e-5)
    assert ("weight" in dict(result.gm.named_parameters())) is train


@pytest.mark.parametrize(("kind", "packed"), [("binary", 6), ("ternary", 12)])
def test_a_trained_graph_is_packed_to_the_same_numbers(kind: str, packed: int) -> None:
    layer, x = nn.Conv2d(5, 6, 3), torch.randn(2, 5, 6, 6)
    trained = fxopt.optimize(layer, [BinarizeWeights(kind=kind, train=True, **ALL)], (x,), strict=True)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(x).square().mean().backward()
    optimizer.step()
    want = trained(x)
    result = check_pass(BinarizeWeights(kind=kind), trained, changes=1)
    assert torch.equal(result.gm(x), want)
    assert result.gm.weight_codes.shape == (6, packed)
    assert [name for name, _ in result.gm.named_parameters()] == ["bias", "weight_alpha"]
    assert not any(node.target in (BINARIZE_STE, TERNARIZE_STE) for node in result.gm.graph.nodes)


def test_ends_stay_floats_and_a_second_run_leaves_them():
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    reason = "it is the first or the last layer"
    result = check_pass(BinarizeWeights(), net, torch.randn(2, 32), changes=2, skips=[reason, reason])
    assert sum(node.target is LOOKUP_NBITS for node in result.gm.graph.nodes) == 2


def test_conversion_leaves_the_layers_that_were_not_trained():
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    gm = fxopt.optimize(net, [BinarizeWeights(train=True)], (torch.randn(2, 32),), strict=True)
    result = BinarizeWeights(keep_ends=False)(gm)
    assert sum(node.target is LOOKUP_NBITS for node in result.gm.graph.nodes) == 2


def test_leaves_alone_and_says_why():
    x = torch.randn(2, 40)
    check_pass(BinarizeWeights(), nn.Linear(40, 8), x, skips=["its weight has 320 elements, fewer than 1024"])
    named = BinarizeWeights(keep_ends=False, min_elements=1, skip=("weight",))
    check_pass(named, nn.Linear(40, 8), x, skips=["its name is one to skip"])
    with pytest.raises(ValueError, match="kind is 'quaternary'"):
        BinarizeWeights(kind="quaternary")
