"""Packing, blocks, tables and straight-through estimators, against numpy and against what autograd must give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.weight_only_ops import (
    BINARIZE_STE,
    GATHER_NBITS,
    LOOKUP_NBITS,
    MATMUL_NBITS,
    TERNARIZE_STE,
    pack_bits,
    unpack_bits,
)

BITS = st.sampled_from([1, 2, 4, 8])


@given(BITS, st.integers(0, 3), st.integers(0, 37))
def test_packing_and_unpacking_give_the_codes_back(bits: int, rows: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count))
    packed = pack_bits(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, count).long(), codes)


def test_the_first_number_lies_in_the_lowest_bits():
    assert pack_bits(torch.tensor([1, 2]), 4).tolist() == [0x21]
    assert pack_bits(torch.tensor([1, 0, 2, 3]), 2).tolist() == [0b11_10_00_01]
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1]), 1).tolist() == [0b1000_0001, 1]


@pytest.mark.parametrize(("codes", "bits", "told"), [([4], 2, "from 4 to 4"), ([-1], 4, "from -1"), ([0], 3, "is 3")])
def test_packing_refuses_what_does_not_fit(codes: list[int], bits: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pack_bits(torch.tensor(codes), bits)


def blocks(out: int, features: int, bits: int, size: int, zero_points: bool) -> tuple[list[Tensor | None], np.ndarray]:
    """Return random stored blocks and, by the formula, the f64 matrix that they stand for."""
    count = -(-features // size)
    codes, scales = torch.randint(0, 2**bits, (out, count, size)), torch.randn(out, count)
    zeros = torch.randint(0, 2**bits, (out, count)) if zero_points else torch.full((out, count), 2 ** (bits - 1))
    floats = (codes.double() - zeros.double()[..., None]) * scales.double()[..., None]
    stored = [pack_bits(codes, bits), scales, pack_bits(zeros, bits) if zero_points else None]
    return stored, floats.flatten(1)[:, :features].numpy()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("features", [16, 40])
def test_blocks_are_multiplied_and_gathered_by_the_formula(bits: int, zero_points: bool, features: int) -> None:
    stored, weight = blocks(6, features, bits, 16, zero_points)
    x, bias = torch.randn(2, 3, features), torch.randn(6)
    got = MATMUL_NBITS(x, *stored, bits, 16, features, bias)
    torch.testing.assert_close(
        got.double(), torch.from_numpy(x.double().numpy() @ weight.T) + bias, rtol=1e-5, atol=1e-4
    )
    index = torch.tensor([[0, 5], [3, 3]])
    rows = GATHER_NBITS(*stored, index, bits, 16, features)
    torch.testing.assert_close(rows, torch.from_numpy(weight[index.numpy()]).float(), rtol=1e-6, atol=0)


def test_rows_that_do_not_exist_are_refused():
    stored, _ = blocks(6, 40, 4, 16, True)
    for index in (-1, 6):
        with pytest.raises(IndexError, match="out of range"):
            GATHER_NBITS(*stored, torch.tensor([index]), 4, 16, 40)


@pytest.mark.parametrize("operator", [MATMUL_NBITS, GATHER_NBITS, LOOKUP_NBITS, BINARIZE_STE, TERNARIZE_STE])
def test_fake_tensors_and_autograd_know_the_operators(operator: torch._ops.OpOverload) -> None:
    (packed, scales, zeros), _ = blocks(6, 40, 4, 16, True)
    weight = torch.randn(6, 40, requires_grad=True)
    arguments = {
        MATMUL_NBITS: (weight, packed, scales, zeros, 4, 16, 40, torch.randn(6)),
        GATHER_NBITS: (packed, scales, zeros, torch.tensor([[0, 5]]), 4, 16, 40),
        LOOKUP_NBITS: (pack_bits(torch.ones(6, 15), 2), torch.randn(4, requires_grad=True), 2, [6, 3, 5]),
    }
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments.get(operator, (weight,)), test_utils=checks)


def test_gradient_of_the_input_is_that_of_the_float_layer():
    stored, weight = blocks(6, 40, 4, 16, True)
    x = torch.randn(3, 40, requires_grad=True)
    out, g = MATMUL_NBITS(x, *stored, 4, 16, 40), torch.randn(3, 6)
    (got,) = torch.autograd.grad(out, x, g)
    torch.testing.assert_close(got, g @ torch.from_numpy(weight).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [0, 1, 2, 6])
def test_gradient_of_a_table_is_the_sum_over_the_elements_that_hold_the_entry(groups: int) -> None:
    codes = torch.randint(0, 4, (6, 3 * 5))
    table = torch.randn(4) if groups == 0 else torch.randn(groups, 4)
    table.requires_grad_()
    weight = LOOKUP_NBITS(pack_bits(codes, 2), table, 2, [6, 3, 5])
    by_channel = table.detach().expand(6, 4) if groups == 0 else table.detach().repeat_interleave(6 // groups, 0)
    assert torch.equal(weight.detach(), by_channel.gather(1, codes).reshape(6, 3, 5))

    gradient = torch.randn(6, 3, 5)
    (got,) = torch.autograd.grad(weight, table, gradient)
    hits = F.one_hot(codes, 4).double() * gradient.reshape(6, 15, 1)
    summed = hits.sum((0, 1)) if groups == 0 else hits.sum(1).reshape(groups, -1, 4).sum(1)
    torch.testing.assert_close(got.double(), summed, rtol=1e-5, atol=1e-5)


def test_binary_weights_have_the_sign_and_the_mean_magnitude():
    weight = torch.tensor([[[0.5, -1.5]], [[0.0, -2.0]]])
    assert torch.equal(BINARIZE_STE(weight), torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]]]))


def test_ternary_weights_drop_what_is_not_above_the_threshold():
    row = torch.tensor([[1.0, -3.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]])  # 0.7 of the mean magnitude 1.025 is 0.7175
    assert torch.equal(TERNARIZE_STE(row), torch.tensor([[2.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("operator", [BINARIZE_STE, TERNARIZE_STE])
def test_gradients_go_straight_through_up_to_magnitude_one(operator: torch._ops.OpOverload) -> None:
    weight = torch.tensor([[0.2, -0.9], [1.1, -4.0]], requires_grad=True)
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (got,) = torch.autograd.grad(operator(weight), weight, gradient)
    assert torch.equal(got, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
