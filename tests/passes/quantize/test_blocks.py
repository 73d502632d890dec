"""The arithmetic of blocks: errors within their bounds, and a search that is never worse."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.passes.quantize.blocks import BITS, quantize_blocks

NUMBERS = st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.sampled_from(BITS), st.booleans())
def test_no_number_is_further_off_than_its_scale(numbers: list[float], bits: int, symmetric: bool) -> None:
    weight = torch.tensor([numbers])
    stored = quantize_blocks(weight, bits=bits, block_size=16, symmetric=symmetric, search="absmax")
    scale = stored.scales.abs().repeat_interleave(16, 1)[:, : len(numbers)]
    assert bool(((stored.floats() - weight).abs() <= scale * (1 + 1e-5)).all())


@given(st.lists(NUMBERS, min_size=1, max_size=40), st.sampled_from(BITS), st.booleans())
def test_the_search_is_never_worse_than_the_whole_range(numbers: list[float], bits: int, symmetric: bool) -> None:
    weight = torch.tensor([numbers])
    errors = [
        quantize_blocks(weight, bits=bits, block_size=16, symmetric=symmetric, search=search).floats() - weight
        for search in ("mse", "absmax")
    ]
    searched, whole = (float(error.double().square().sum()) for error in errors)
    assert searched <= whole * (1 + 1e-4) + 1e-12


def test_symmetric_blocks_keep_their_largest_magnitude_exactly():
    weight = torch.randn(5, 64)
    stored = quantize_blocks(weight, bits=4, block_size=32, search="absmax")
    assert stored.zero_points is None
    largest = weight.abs().reshape(5, 2, 32).argmax(-1, keepdim=True)
    blocks = [matrix.reshape(5, 2, 32).gather(-1, largest) for matrix in (weight, stored.floats())]
    torch.testing.assert_close(*blocks, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zero_stays_zero(bits: int) -> None:
    weight = torch.rand(4, 48) + 1.0
    weight[:, ::5] = 0.0
    for symmetric, search in itertools.product((True, False), ("absmax", "mse")):
        stored = quantize_blocks(weight, bits=bits, block_size=16, symmetric=symmetric, search=search)
        assert bool((stored.floats()[:, ::5] == 0).all())


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(quantize_blocks(torch.zeros(2, 20), bits=4, block_size=16).floats(), torch.zeros(2, 20))


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_that_of_matmulnbits(bits: int) -> None:
    """Number k of a row lies in block k // 16, at bit (k % 16) bits of it; zero points are packed along a row."""
    weight = torch.randn(3, 40)
    stored = quantize_blocks(weight, bits=bits, block_size=16, symmetric=False)
    assert stored.packed.shape == (3, 3, 2 * bits)
    assert stored.scales.shape == (3, 3)
    assert stored.zero_points is not None
    assert stored.zero_points.shape == (3, -(-3 * bits // 8))
    assert stored.nbytes == 3 * 3 * 2 * bits + 3 * 3 * 4 + stored.zero_points.numel()

    def number(packed: np.ndarray, place: int) -> int:
        return int(packed[place * bits // 8]) >> (place * bits % 8) & (2**bits - 1)

    packed, scales, zeros = stored.packed.numpy(), stored.scales.double().numpy(), stored.zero_points.numpy()
    by_formula = [
        [(number(packed[n, k // 16], k % 16) - number(zeros[n], k // 16)) * scales[n, k // 16] for k in range(40)]
        for n in range(3)
    ]
    np.testing.assert_allclose(stored.floats().numpy(), by_formula, rtol=1e-6)


def test_more_bits_and_smaller_blocks_are_more_accurate():
    weight = torch.randn(64, 256)

    def noise(bits: int, block_size: int) -> float:
        stored = quantize_blocks(weight, bits=bits, block_size=block_size, symmetric=False)
        return float((stored.floats() - weight).square().mean().sqrt())

    by_bits = [noise(bits, 32) for bits in BITS]
    assert by_bits[0] > 3 * by_bits[1] > 9 * by_bits[2]
    assert noise(4, 16) < noise(4, 32) < noise(4, 128)


@pytest.mark.parametrize(
    ("weight", "options", "told"),
    [
        (torch.ones(4), {}, "is no matrix"),
        (torch.ones(0, 4), {}, "is no matrix with elements"),
        (torch.tensor([[torch.nan]]), {}, "NaN or infinity"),
        (torch.ones(2, 2), {"bits": 3}, "bits is 3; wanted 2, 4, 8"),
        (torch.ones(2, 2), {"block_size": 8}, "block_size is 8"),
        (torch.ones(2, 2), {"block_size": 48}, "block_size is 48"),
    ],
)
def test_refuses(weight: torch.Tensor, options: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        quantize_blocks(weight, **{"bits": 4, "block_size": 16} | options)
