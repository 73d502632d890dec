"""What is chosen, given the scores: shares, thresholds, what stays at least, patterns and blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.passes.prune.groups import Family, Group
from fxopt.passes.prune.selection import Scope, select_groups, select_weights

SCORES = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=24)
FRACTIONS = st.floats(0.01, 0.99)
SCOPES = st.sampled_from(["layer", "global"])


def families(counts: Sequence[int]) -> list[Family]:
    return [
        Family(f"layer{number}", tuple(Group((), np.array([number, at])) for at in range(count)))
        for number, count in enumerate(counts)
    ]


def chosen(
    scores: Sequence[Sequence[float]],
    *,
    fraction: float | None = None,
    threshold: float | None = None,
    scope: Scope = "layer",
    min_kept: int = 1,
    multiple: int = 1,
) -> list[list[int]]:
    """The places that go in each family."""
    groups = select_groups(
        families([len(row) for row in scores]),
        {f"layer{number}": torch.tensor(row) for number, row in enumerate(scores)},
        fraction=fraction,
        threshold=threshold,
        scope=scope,
        min_kept=min_kept,
        multiple=multiple,
    )
    found: list[list[int]] = [[] for _ in scores]
    for group in groups:
        found[int(group.indices[0])].append(int(group.indices[1]))
    return found


# ---- groups


@given(SCORES, FRACTIONS)
def test_share_of_a_layer_goes_and_nothing_that_goes_scores_more_than_what_stays(
    row: list[float], fraction: float
) -> None:
    (gone,) = chosen([row], fraction=fraction)
    assert len(gone) == min(round(fraction * len(row)), len(row) - 1)
    stays = [score for at, score in enumerate(row) if at not in gone]
    assert max((row[at] for at in gone), default=-math.inf) <= min(stays)


@given(st.lists(SCORES, min_size=1, max_size=4), FRACTIONS, SCOPES, st.integers(1, 5), st.integers(1, 8))
def test_what_stays_is_enough_and_a_multiple(
    rows: list[list[float]], fraction: float, scope: Scope, min_kept: int, multiple: int
) -> None:
    for row, gone in zip(
        rows, chosen(rows, fraction=fraction, scope=scope, min_kept=min_kept, multiple=multiple), strict=True
    ):
        stays = len(row) - len(gone)
        assert stays >= min(min_kept, len(row))
        assert stays == len(row) or stays % multiple == 0


@given(st.lists(SCORES, min_size=1, max_size=4), FRACTIONS)
def test_global_share_is_of_all_layers_together_where_none_runs_empty(rows: list[list[float]], fraction: float) -> None:
    gone = sum(map(len, chosen(rows, fraction=fraction, scope="global")))
    total = sum(map(len, rows))
    assert gone == min(round(fraction * total), total - len(rows))


def test_global_scores_are_compared_relative_to_the_mean_of_their_layer() -> None:
    assert chosen([[1.0, 2.0, 3.0, 2.0], [100.0, 900.0, 100.0, 900.0]], fraction=3 / 8, scope="global") == [[0], [0, 2]]


def test_global_scores_of_a_layer_that_is_all_zero_go_first_but_one() -> None:
    assert chosen([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], fraction=0.5, scope="global") == [[0, 1], [0]]


def test_min_kept_protects_a_small_layer_from_a_global_share() -> None:
    rows = [[0.1, 0.2, 5.0], [1.0] * 9]
    assert chosen(rows, fraction=0.5, scope="global", min_kept=2)[0] == [0]


@given(SCORES, st.floats(0.125, 99, width=32))
def test_threshold_takes_what_scores_below_it_but_the_best(row: list[float], threshold: float) -> None:
    (gone,) = chosen([row], threshold=threshold)
    below = [at for at, score in enumerate(row) if score < threshold]
    if len(below) < len(row):
        assert gone == below
    else:
        assert len(gone) == len(row) - 1


def test_what_is_masked_already_goes_first() -> None:
    assert chosen([[3.0, -math.inf, 1.0, -math.inf]], fraction=0.5) == [[1, 3]]
    assert chosen([[3.0, -math.inf, 1.0, 2.0], [9.0, 9.0]], fraction=0.5, scope="global")[0][0] == 1


def test_rounding_up_to_a_multiple_keeps_more() -> None:
    (gone,) = chosen([[float(at) for at in range(20)]], fraction=0.5, multiple=8)
    assert gone == [0, 1, 2, 3]


def test_layer_without_scores_is_left_alone() -> None:
    groups = select_groups(families([4]), {}, fraction=0.5, threshold=None, scope="layer", min_kept=1, multiple=1)
    assert groups == []


# ---- single weights, blocks, patterns


def weights(
    scores: Mapping[str, Tensor],
    *,
    fraction: float | None = None,
    threshold: float | None = None,
    scope: Scope = "layer",
    block: tuple[int, int] = (1, 1),
) -> dict[str, Tensor]:
    masks, notes = select_weights(scores, fraction=fraction, threshold=threshold, scope=scope, block=block)
    assert notes == {}
    return masks


@given(st.integers(2, 9), st.integers(2, 9), FRACTIONS, SCOPES, st.booleans())
def test_exact_share_of_weights_goes_even_among_equal_ones(
    rows: int, columns: int, fraction: float, scope: Scope, equal: bool
) -> None:
    scores = {name: torch.ones(rows, columns) if equal else torch.rand(rows, columns) for name in "ab"}
    masks = weights(scores, fraction=fraction, scope=scope)
    size = rows * columns
    gone = [int((~mask).sum()) for mask in masks.values()]
    if scope == "layer":
        assert gone == [min(round(fraction * size), size - 1)] * 2
    else:
        assert sum(gone) == min(round(fraction * 2 * size), 2 * size - 2)
    for names in [["a"], ["b"]] if scope == "layer" else [["a", "b"]]:
        lost = [score for name in names for score in scores[name][~masks[name]].tolist()]
        # The best one of each layer stays, whatever it is.
        kept = [score for name in names for score in sorted(scores[name][masks[name]].tolist())[:-1]]
        assert max(lost, default=-math.inf) <= min(kept, default=math.inf)


def test_no_layer_loses_all_weights_to_a_global_share() -> None:
    masks = weights({"a": torch.full((2, 2), 0.1), "b": torch.full((4, 4), 1.0)}, fraction=0.9, scope="global")
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1]


def test_threshold_takes_every_weight_below_it() -> None:
    masks = weights({"a": torch.tensor([[0.1, 0.5], [0.4, 0.2]])}, threshold=0.4)
    assert masks["a"].tolist() == [[False, True], [True, False]]


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 3), st.integers(1, 3), FRACTIONS, st.booleans())
def test_blocks_go_as_a_whole_and_by_their_mean(
    block: tuple[int, int], down: int, across: int, fraction: float, spatial: bool
) -> None:
    rows, columns = block[0] * down, block[1] * across
    score = torch.rand(rows, columns, 1, 1) if spatial else torch.rand(rows, columns)
    mask = weights({"a": score}, fraction=fraction, block=block)["a"]
    assert mask.shape == score.shape
    grid = mask.reshape(down, block[0], across, block[1]).permute(0, 2, 1, 3).reshape(down * across, -1)
    assert torch.equal(grid.any(dim=1), grid.all(dim=1))
    means = score.reshape(down, block[0], across, block[1]).double().mean(dim=(1, 3)).flatten()
    gone = ~grid.any(dim=1)
    assert int(gone.sum()) == min(round(fraction * len(means)), len(means) - 1)
    if gone.any():
        assert means[gone].max() <= means[~gone].min() + 1e-6


def test_block_goes_before_others_only_if_all_of_it_is_masked() -> None:
    score = torch.tensor([[-math.inf, -math.inf, 9.0, 9.0, -math.inf, 4.0, 3.0, 2.0]])
    assert weights({"a": score}, fraction=0.25, block=(1, 2))["a"][0, ::2].tolist() == [False, True, True, True]
    assert weights({"a": score}, fraction=0.5, block=(1, 2))["a"][0, ::2].tolist() == [False, True, False, True]


@given(st.integers(2, 6), st.data(), st.integers(0, 1), st.booleans())
def test_pattern_keeps_exactly_the_n_best_of_every_m_inputs(
    m: int, data: st.DataObject, axis: int, spatial: bool
) -> None:
    n = data.draw(st.integers(1, m - 1))
    shape = [3, 3]
    shape[axis] = 2 * m
    score = torch.rand(*shape, 2) if spatial else torch.rand(shape)
    masks, notes = select_weights(
        {"a": score}, fraction=None, threshold=None, scope="layer", pattern=(n, m), inputs={"a": axis}
    )
    assert notes == {}
    kept = masks["a"].movedim(axis, -1).reshape(-1, m)
    parts = score.movedim(axis, -1).reshape(-1, m)
    assert (kept.sum(dim=1) == n).all()
    for chosen_row, row in zip(kept, parts, strict=True):
        assert row[chosen_row].min() >= row[~chosen_row].max()


@pytest.mark.parametrize("equal", [0.0, 1.0])
def test_pattern_keeps_n_of_every_m_among_equal_ones(equal: float) -> None:
    masks, _ = select_weights(
        {"a": torch.full((2, 8), equal)}, fraction=None, threshold=None, scope="layer", pattern=(2, 4), inputs={"a": 1}
    )
    assert masks["a"].reshape(-1, 4).sum(dim=1).tolist() == [2, 2, 2, 2]


def test_weight_whose_inputs_no_pattern_divides_has_no_mask_and_a_reason() -> None:
    masks, notes = select_weights(
        {"a": torch.rand(4, 6), "b": torch.rand(4, 8), "c": torch.rand(4, 8)},
        fraction=None,
        threshold=None,
        scope="layer",
        pattern=(2, 4),
        inputs={"a": 1, "b": 1},
    )
    assert list(masks) == ["b"]
    assert notes == {"a": "its 6 inputs are no multiple of 4", "c": "no layer sums over one of its axes alone"}


def test_weight_that_blocks_do_not_tile_has_no_mask_and_a_reason() -> None:
    masks, notes = select_weights(
        {"a": torch.rand(4, 6), "b": torch.rand(3, 8)}, fraction=0.5, threshold=None, scope="layer", block=(2, 3)
    )
    assert list(masks) == ["a"]
    assert notes == {"b": "a matrix of 3 x 8 has no whole blocks of 2 x 3"}
