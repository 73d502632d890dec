"""Operators without a translation of our own: torchlib's functions, then PyTorch's decompositions."""

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt.export import decompose, to_onnx
from fxopt.export.registry import TRANSLATIONS
from tests.export.proof import captured, op_types, prove

pytestmark = pytest.mark.ort

BY_TORCHLIB = {
    "addbmm": lambda x: torch.addbmm(x[0], x, x),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, -x),
    "addr": lambda x: torch.addr(x[0], x[0, 0], x[0, 1]),
}
BY_DECOMPOSITION = {
    "deg2rad of integers": lambda x: torch.deg2rad((x * 9).long()),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(1)),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, x.flip(1), reduction="none"),
    "huber": lambda x: F.huber_loss(x, x.flip(1)),
    "mse": lambda x: F.mse_loss(x, x * 2),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float()),
    "kl": lambda x: F.kl_div(x.log_softmax(-1), x.flip(1).softmax(-1), reduction="batchmean"),
    "fold": lambda x: F.unfold(x[:, None], 2),
    "trace": lambda x: torch.trace(x[0]),
    "rot90": lambda x: torch.rot90(x, 1, (1, 2)),
    "logaddexp2": lambda x: torch.logaddexp2(x, x.flip(1)),
    "vander": lambda x: torch.linalg.vander(x[0, 0]),
    "block_diag": lambda x: torch.block_diag(x[0], x[0]),
    "cdist": lambda x: torch.cdist(x, x.flip(1), compute_mode="donot_use_mm_for_euclid_dist"),
}


@pytest.mark.parametrize("name", BY_TORCHLIB)
def test_torchlib(name):
    prove(lambda x: BY_TORCHLIB[name](x), torch.randn(3, 4, 4), dynamic=False)


@pytest.mark.parametrize("name", BY_DECOMPOSITION)
def test_decomposition(name):
    prove(lambda x: BY_DECOMPOSITION[name](x), torch.randn(3, 4, 4), dynamic=False)


def test_decomposition_with_dynamic_sizes():
    prove(lambda x: F.pairwise_distance(x, x.flip(1)), torch.randn(3, 4))
    prove(lambda x: F.smooth_l1_loss(x, x * 2, reduction="none"), torch.randn(3, 4))


def test_sizes_of_an_attempt_that_failed_are_computed_again(monkeypatch):
    # torchlib's function fails behind the size that it asked for; the decomposition asks for the same.
    monkeypatch.delitem(TRANSLATIONS, torch.ops.aten.linspace.default)
    prove(lambda x: x * torch.linspace(0.5, x.shape[0] - 0.5, 4), torch.randn(3, 4))


def test_a_decomposition_that_fixes_a_dynamic_size_is_refused(monkeypatch):
    operator = torch.ops.aten.deg2rad.default
    gm = captured(lambda x: torch.deg2rad((x * 9).long()), torch.randn(3, 4))
    monkeypatch.setattr(decompose, "_decompositions", lambda: {operator: lambda x: x * torch.ones(int(x.shape[0]), 1)})
    with pytest.raises(fxopt.ExportError, match=r"deg2rad(.|\n)*it fixes the dynamic size s\d+"):
        to_onnx(gm)


def test_no_function_is_left_in_the_model():
    file = prove(lambda x: torch.addbmm(x[0], x, x), torch.randn(3, 4, 4), dynamic=False)
    assert not file.model.functions
    assert "Constant" not in op_types(file)


def test_pieces_of_a_decomposition_carry_the_name_of_the_operator():
    file = prove(lambda x: F.pairwise_distance(x, x * 2), torch.randn(3, 4))
    assert {node.metadata_props["fxopt.node"] for node in file.model.graph} >= {"pairwise_distance"}
    assert any(node.name.startswith("pairwise_distance") for node in file.model.graph)


def test_our_own_translation_comes_first_then_torchlib(monkeypatch):
    monkeypatch.delitem(TRANSLATIONS, torch.ops.aten.hardswish.default)
    prove(lambda x: F.hardswish(x), torch.randn(3, 4))


def test_what_would_be_wrong_is_not_left_to_a_fallback():
    with pytest.raises(fxopt.ExportError, match="cannot be exported: averages of integers, which PyTorch rounds down"):
        to_onnx(captured(lambda x: F.avg_pool1d(x, 2), torch.randint(0, 9, (3, 2, 8))))
