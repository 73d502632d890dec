"""Tables: the best of all k-means, by exhaustion; uniform steps; powers of two."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.passes.quantize.tables import nearest_codes, number_table

NUMBERS = st.floats(-100, 100, width=32)


def squared_error(values: torch.Tensor, table: torch.Tensor) -> float:
    return float((values.double()[:, None] - table.double()).abs().amin(1).square().sum())


def least_error(values: list[float], entries: int) -> float:
    """Return the least squared error over all ways to cut the sorted values into runs."""
    numbers = np.sort(np.array(values, dtype=np.float64))
    cuts = itertools.combinations(range(1, len(numbers)), min(entries, len(numbers)) - 1)
    return min(sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(numbers, list(cut))) for cut in cuts)


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.integers(2, 4))
def test_kmeans_is_the_best_there_is(values: list[float], entries: int) -> None:
    table = number_table(torch.tensor(values), entries, "kmeans")
    assert squared_error(torch.tensor(values), table) <= least_error(values, entries) + 1e-6


def test_kmeans_of_many_numbers_beats_lloyd_from_many_starts():
    values = torch.cat([torch.randn(20_000), 0.1 * torch.randn(20_000) + 3])
    found = squared_error(values, number_table(values, 8, "kmeans"))
    numbers = values.double().numpy()
    for seed in range(8):
        table = np.sort(np.random.default_rng(seed).choice(numbers, 8, replace=False))
        for _ in range(200):
            codes = np.searchsorted((table[1:] + table[:-1]) / 2, numbers)
            table = np.array([numbers[codes == entry].mean() for entry in range(8)])
        assert found <= squared_error(values, torch.from_numpy(table)) * 1.0005


def test_few_different_numbers_are_kept_exactly():
    values = torch.tensor([3.0, -1.0, 3.0, 0.0])
    table = number_table(values, 16, "kmeans")
    assert table.shape == (16,)
    assert torch.equal(table[nearest_codes(values, table)], values)


def test_uniform_steps_reach_from_end_to_end():
    assert number_table(torch.tensor([5.0, -1.0, 0.3]), 4, "uniform").tolist() == [-1.0, 1.0, 3.0, 5.0]


def test_powers_of_two_are_powers_of_two_of_both_signs():
    table = number_table(torch.randn(1000), 16, "power-of-two")
    positive = table[table > 0].unique()
    assert len(positive) == 7
    assert torch.equal(positive.log2(), positive.log2().round())
    assert torch.equal(table[table < 0].unique(), (-positive).flip(0))
    assert 0.0 in table.tolist()


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.sampled_from(["kmeans", "uniform", "power-of-two"]))
def test_codes_are_those_of_the_nearest_entry(values: list[float], kind: str) -> None:
    table = number_table(torch.tensor(values), 4, kind)
    assert torch.equal(table, table.sort().values)
    chosen = table[nearest_codes(torch.tensor(values), table)]
    distance = (torch.tensor(values).double()[:, None] - table.double()).abs().amin(1)
    torch.testing.assert_close((torch.tensor(values).double() - chosen.double()).abs(), distance, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "entries", "kind", "told"),
    [
        (torch.ones(2), 1, "kmeans", "1 entries is too small"),
        (torch.ones(2), 2, "power-of-two", "2 entries is too small"),
        (torch.ones(0), 4, "uniform", "needs values"),
        (torch.tensor([torch.inf]), 4, "kmeans", "all of them finite"),
    ],
)
def test_refuses(values: torch.Tensor, entries: int, kind: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        number_table(values, entries, kind)
