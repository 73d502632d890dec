"""The sketch of values: exact where it says so, within its resolution elsewhere, and the same for any split."""

from __future__ import annotations

import io
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fxopt import CalibrationError
from fxopt.passes.quantize.sketch import MANTISSA_BITS, ValueSketch

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROUND = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 6.0, 2.0**-149, -(2.0**-126), 3.4028234663852886e38])
BATCH = hnp.arrays(np.float32, st.integers(1, 40), elements=FINITE | ROUND)
BATCHES = st.lists(BATCH, min_size=1, max_size=6)


def sketch_of(*batches: np.ndarray, axis: int | None = None) -> ValueSketch:
    sketch = ValueSketch(axis=axis)
    for batch in batches:
        sketch.update(torch.from_numpy(batch))
    return sketch


@given(BATCHES)
def test_extremes_counts_and_means_are_exact(batches: list[np.ndarray]) -> None:
    sketch, values = sketch_of(*batches), np.concatenate(batches)
    assert (sketch.low, sketch.high) == (values.min(), values.max())
    assert (sketch.count, sketch.batches) == (values.size, len(batches))
    for mean, extreme in ((sketch.mean_low, np.min), (sketch.mean_high, np.max)):
        assert mean == float(sum(Fraction(float(extreme(batch))) for batch in batches) / len(batches))


@given(BATCHES)
def test_each_value_is_in_its_bin(batches: list[np.ndarray]) -> None:
    values = np.sort(np.concatenate(batches).astype(np.float64))
    lower, upper, counts = sketch_of(*batches).intervals()
    assert counts.sum() == values.size
    assert (counts > 0).all()
    assert (np.diff(lower) > 0).all()
    assert (lower[1:] >= upper[:-1]).all()
    owner = np.repeat(np.arange(len(counts)), counts)
    tiny = 2.0**-134  # below it all is zero
    assert (values >= lower[owner] - tiny).all()
    assert (values <= upper[owner] + tiny).all()
    normal = np.abs(values) >= 2.0**-126
    width = (upper - lower)[owner]
    assert (width[normal] <= 2.0**-MANTISSA_BITS * np.abs(values)[normal]).all()


@given(BATCHES, st.floats(0, 1))
def test_quantile_is_in_the_bin_of_the_value_that_it_names(batches: list[np.ndarray], p: float) -> None:
    sketch, values = sketch_of(*batches), np.concatenate(batches)
    for got, of in ((sketch.quantile(p), values), (sketch.magnitude_quantile(p), np.abs(values))):
        ordered = np.sort(of).astype(np.float64)
        want = ordered[max(math.ceil(p * len(ordered)), 1) - 1]
        assert abs(got - want) <= max(2.0**-MANTISSA_BITS * abs(want), 2.0**-134)
    assert (sketch.quantile(0), sketch.quantile(1)) == (values.min(), values.max())
    assert sketch.magnitude_quantile(1) == np.abs(values).max()


@given(BATCHES, st.randoms(use_true_random=False))
def test_any_order_and_grouping_gives_the_same_sketch(batches: list[np.ndarray], choice: random.Random) -> None:
    whole = sketch_of(*batches)
    parts = [sketch_of(batch) for batch in batches]
    choice.shuffle(parts)
    while len(parts) > 1:
        first = parts.pop(choice.randrange(len(parts)))
        parts[choice.randrange(len(parts))].merge(first)
    assert parts[0] == whole
    assert parts[0].mean_low == whole.mean_low
    assert math.copysign(1, parts[0].low) == math.copysign(1, whole.low)


def test_negative_zero_leaves_no_trace_of_the_order() -> None:
    for first, second in ((0.0, -0.0), (-0.0, 0.0)):
        sketch = sketch_of(np.float32([[first, 1.0]]), np.float32([[second, 1.0]]), axis=1)
        assert math.copysign(1, sketch.low) == 1
        assert sketch.channel_low is not None
        assert not np.signbit(sketch.channel_low).any()


@given(BATCHES)
def test_state_survives_a_file_without_pickle(batches: list[np.ndarray]) -> None:
    sketch, file = sketch_of(*batches, axis=-1) if len(batches) == 1 else sketch_of(*batches), io.BytesIO()
    np.savez(file, **sketch.to_state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        again = ValueSketch.from_state(state)
    assert again == sketch
    again.merge(sketch)
    assert again != sketch
    assert again.count == 2 * sketch.count


def test_large_tensor_in_any_memory_layout_is_counted_whole() -> None:
    x = torch.randn(3, 70, 40, 41)
    plain = ValueSketch()
    plain.update(x)
    for same in (x.to(memory_format=torch.channels_last), x.transpose(0, 3), x.flip(2), x.double()):
        other = ValueSketch()
        other.update(same)
        assert other == plain
    lower, upper, counts = plain.intervals()
    values = np.sort(x.numpy().ravel())
    edges = np.searchsorted(values, upper.astype(np.float32), side="left")
    assert np.abs(np.cumsum(counts) - edges).max() <= 1  # where a value is an edge, that of a negative bin
    assert plain.bins()[0].tolist() == ((lower + upper) / 2).tolist()


def test_extremes_by_channel() -> None:
    x = torch.randn(4, 3, 5)
    sketch = ValueSketch(axis=1)
    for batch in x.split(2):
        sketch.update(batch)
    assert sketch.channel_low is not None
    assert sketch.channel_high is not None
    assert sketch.channel_low.tolist() == x.amin((0, 2)).tolist()
    assert sketch.channel_high.tolist() == x.amax((0, 2)).tolist()
    assert sketch_of(np.float32([1, 2]), np.float32([3, 0]), axis=0).channel_low.tolist() == [1, 0]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"axis 1 has 2 channels, and had 3 before"):
        sketch.update(torch.zeros(1, 2, 5))


def test_size_does_not_grow_with_the_number_of_values() -> None:
    sketch = ValueSketch()
    sketch.update(torch.randn(1 << 16))
    before = sum(array.nbytes for array in sketch.to_state().values())
    for _ in range(50):
        sketch.update(torch.randn(1 << 16))
    assert sum(array.nbytes for array in sketch.to_state().values()) < 1.5 * before
    sketch.update(torch.tensor([1e-38, -3e38, 1e-44]))
    assert sum(array.nbytes for array in sketch.to_state().values()) < (1 << 20) + 1024


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, math.nan, 2.0], "1 NaN of 3 values"),
        ([math.inf, -math.inf, 0.0], "2 infinite of 3 values"),
        ([math.nan, math.inf, 0.0, 1.0], "1 NaN and 1 infinite of 4 values"),
    ],
)
def test_nan_and_infinity_are_refused_and_leave_the_sketch_alone(values: list[float], text: str) -> None:
    sketch = sketch_of(np.float32([5.0]))
    with pytest.raises(CalibrationError, match=f"^{text}$"):
        sketch.update(torch.tensor(values))
    assert sketch == sketch_of(np.float32([5.0]))


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"floating-point values and got i64\[3\]"):
        ValueSketch().update(torch.arange(3))


def test_other_floating_types_count_by_their_float32_value() -> None:
    x = torch.randn(100)
    for dtype in (torch.float16, torch.bfloat16):
        half, rounded = ValueSketch(), ValueSketch()
        half.update(x.to(dtype))
        rounded.update(x.to(dtype).float())
        assert half == rounded


def test_empty_sketch_has_no_quantile_and_merges_as_nothing() -> None:
    empty, some = ValueSketch(), sketch_of(np.float32([-1.0, 2.0]))
    empty.update(torch.zeros(0, 3))
    assert (empty.count, empty.batches, len(empty.bins()[0])) == (0, 0, 0)
    with pytest.raises(ValueError, match="the tensor was never computed"):
        empty.quantile(0.5)
    empty.merge(some)
    assert empty == some
    with pytest.raises(ValueError, match="axis None and 1 do not merge"):
        some.merge(ValueSketch(axis=1))
    with pytest.raises(ValueError, match=r"within \[0, 1\], not 1\.5"):
        some.quantile(1.5)


def test_a_copy_without_channels_is_what_no_axis_would_have_given():
    with_axis, without, other = ValueSketch(axis=-1), ValueSketch(), ValueSketch()
    for sketch in (with_axis, without):
        sketch.update(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    other.update(torch.tensor([7.0]))
    copy = with_axis.without_channels()
    assert copy == without
    copy.merge(other)
    assert (copy.high, with_axis.high) == (7.0, 3.0)
    assert with_axis.channel_largest.tolist() == [3.0, 2.0]
    with pytest.raises(ValueError, match="keeps no extremes by channel"):
        copy.channel_largest  # noqa: B018  # it raises
