"""Ranges, scales and zero points, against the formula of ONNX in float64 and a search on the values themselves."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fxopt.passes.quantize.range_search import Divergence, least_divergence
from fxopt.passes.quantize.ranges import METHODS, RangeMethod, choose_range, integer_limits, qparams
from fxopt.passes.quantize.sketch import ValueSketch

LARGEST = float(np.finfo(np.float32).max)
NUMBER = st.floats(0, LARGEST, width=32)
FORMS = st.tuples(st.integers(2, 16), st.booleans(), st.booleans())
ALL_METHODS = [*METHODS, "percentile:99", "percentile:100"]


def sketch_of(values: torch.Tensor) -> ValueSketch:
    sketch = ValueSketch()
    for batch in values.split(max(1, len(values) // 4)):
        sketch.update(batch)
    return sketch


def quantized(x: np.ndarray, scale: float, zero_point: int, limits: tuple[int, int]) -> np.ndarray:
    """ONNX QuantizeLinear and DequantizeLinear in float64."""
    steps = np.clip(np.rint(x / scale) + zero_point, *limits)
    return (steps - zero_point) * scale


def squared_error(x: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> float:
    scale, zero_point = qparams(low, high, bits=bits, signed=symmetric, symmetric=symmetric)
    smallest, largest = integer_limits(bits, symmetric)
    return float(np.mean((quantized(x, scale, zero_point, (smallest + symmetric, largest)) - x) ** 2))


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    normal, uniform = torch.randn(4000), torch.rand(4000)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "silu": F.silu(4 * normal),
        "relu6": (4 * normal).clamp(0, 6),
        "laplace": -(uniform.clamp_min(1e-6).log()) * normal.sign(),
        "one outlier": torch.cat([normal, torch.tensor([1000.0])]),
        "heavy tail": normal / torch.randn(4000),
        "negative": -uniform,
        "shifted": normal + 6,
        "softmax": (3 * torch.randn(40, 100)).softmax(1).flatten(),
    }


SAMPLES = samples()


# ---- scale and zero point


@given(NUMBER, NUMBER, FORMS, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_error_in_the_range_is_at_most_half_a_step(
    below: float, above: float, form: tuple[int, bool, bool], shares: list[float]
) -> None:
    bits, signed, symmetric = form
    low, high = (-max(below, above), max(below, above)) if symmetric else (-below, above)
    scale, zero_point = qparams(low, high, bits=bits, signed=signed, symmetric=symmetric)
    smallest, largest = limits = integer_limits(bits, signed)
    assert 0 < scale < math.inf
    assert scale == float(np.float32(scale))
    assert isinstance(zero_point, int)
    assert smallest <= zero_point <= largest
    if symmetric:
        assert zero_point == (0 if signed else 1 << (bits - 1))
    assert quantized(np.zeros(1), scale, zero_point, limits) == 0
    x = np.array([low, high, *(low + share * (high - low) for share in shares)])
    ulp = max(-low, high) * 2**-23 + 2**-149
    assert (np.abs(quantized(x, scale, zero_point, limits) - x) <= scale / 2 + ulp).all()


@given(NUMBER, NUMBER, st.integers(2, 16), st.booleans())
def test_scale_wastes_no_step(below: float, above: float, bits: int, signed: bool) -> None:
    scale, _ = qparams(-below, above, bits=bits, signed=signed, symmetric=False)
    if below + above > 1e-30:
        assert scale * ((1 << bits) - 1) <= (below + above) * (1 + 2**-23)


@pytest.mark.parametrize(
    ("low", "high", "bits", "text"),
    [
        (0.5, 1.0, 8, "holds zero; got 0.5 to 1.0"),
        (math.nan, 1.0, 8, "holds zero; got nan to 1.0"),
        (-1.0, math.inf, 8, "finite in float32; got -1.0 to inf"),
        (-1.0, 1e39, 8, "finite in float32"),
        (-1.0, 1.0, 1, "2 to 16 bits wide, not 1"),
        (-1.0, 1.0, 32, "2 to 16 bits wide, not 32"),
    ],
)
def test_wrong_ranges_are_refused(low: float, high: float, bits: int, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        qparams(low, high, bits=bits, signed=True, symmetric=False)


# ---- every method


@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    FORMS,
    st.sampled_from(ALL_METHODS),
)
def test_every_method_gives_a_range_that_holds_zero_and_fits_the_values(
    values: np.ndarray, form: tuple[int, bool, bool], method: str
) -> None:
    bits, signed, symmetric = form
    low, high = choose_range(sketch_of(torch.from_numpy(values)), method, bits=bits, signed=signed, symmetric=symmetric)
    assert low <= 0 <= high
    largest = float(np.abs(values).max())
    if symmetric:
        assert low == -high
        assert high <= largest
    else:
        assert low >= min(values.min(), 0)
        assert high <= max(values.max(), 0)
    assert (low < high) == bool(values.any())
    scale, _ = qparams(low, high, bits=bits, signed=signed, symmetric=symmetric)
    assert 0 < scale < math.inf


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("constant", [0.0, 3.5, -0.25, 1e-44, LARGEST])
def test_constant_is_the_end_of_its_range(method: str, constant: float) -> None:
    found = choose_range(sketch_of(torch.full((64,), constant)), method, bits=8, signed=False, symmetric=False)
    value = float(np.float32(constant))
    assert found == (min(value, 0.0), max(value, 0.0))


def test_minmax_and_moving_average_are_those_of_the_batches() -> None:
    sketch = ValueSketch()
    for batch in ([-1.0, 2.0], [-3.0, 10.0], [1.0, 3.0]):
        sketch.update(torch.tensor(batch))
    kind = {"bits": 8, "signed": True}
    assert choose_range(sketch, "minmax", **kind, symmetric=False) == (-3.0, 10.0)
    assert choose_range(sketch, "minmax", **kind, symmetric=True) == (-10.0, 10.0)
    assert choose_range(sketch, "moving-average", **kind, symmetric=False) == (-1.0, 5.0)
    assert choose_range(sketch, "moving-average", **kind, symmetric=True) == (-5.0, 5.0)


@pytest.mark.parametrize("name", SAMPLES)
def test_percentile_cuts_its_share_at_each_end(name: str) -> None:
    x = SAMPLES[name].double().numpy()
    sketch = sketch_of(SAMPLES[name])
    low, high = choose_range(sketch, "percentile:99", bits=8, signed=False, symmetric=False)
    want_low, want_high = np.quantile(x, [0.01, 0.99], method="inverted_cdf")
    assert low == pytest.approx(min(want_low, 0), rel=2**-8)
    assert high == pytest.approx(max(want_high, 0), rel=2**-8)
    _, high = choose_range(sketch, "percentile:99", bits=8, signed=True, symmetric=True)
    assert high == pytest.approx(np.quantile(np.abs(x), 0.99, method="inverted_cdf"), rel=2**-8)


def test_percentile_of_almost_only_zeros_keeps_the_few_values() -> None:
    values = torch.zeros(10_000)
    values[7] = 2.0
    assert choose_range(sketch_of(values), "percentile:99", bits=8, signed=False, symmetric=False) == (0.0, 2.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_as_good_as_a_search_on_the_values(name: str, bits: int, symmetric: bool) -> None:
    x = SAMPLES[name].double().numpy()
    low, high = choose_range(sketch_of(SAMPLES[name]), "mse", bits=bits, signed=symmetric, symmetric=symmetric)
    found = squared_error(x, low, high, bits, symmetric)
    bottom, top = min(x.min(), 0), max(x.max(), 0)
    fractions = 2.0 ** -np.linspace(0, 6, 25)
    if symmetric:
        reach = max(-bottom, top)
        ranges = [(-reach * f, reach * f) for f in fractions]
    else:
        lows, highs = (fractions if end else [1.0] for end in (bottom, top))
        ranges = [(bottom * f, top * g) for f in lows for g in highs]
    best = min(squared_error(x, *ends, bits, symmetric) for ends in ranges)
    # The search sees each value; the sketch sees it at one part in 256, and the ends one after the other.
    assert found <= 1.05 * best
    assert found <= 1.01 * squared_error(x, bottom, top, bits, symmetric)


# ---- entropy


def divergence(counts: np.ndarray, first: int, last: int, levels: int, smallest: float = 0.0) -> float:
    """Return Migacz's measure of the bins from first to last, written out bin by bin."""
    inside = counts[first:last].astype(float)
    p = inside.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q = np.zeros_like(p)
    for start, stop in pairwise(len(inside) * level // levels for level in range(levels + 1)):
        filled = p[start:stop] > 0
        if filled.any():
            q[start:stop][filled] = inside[start:stop].sum() / filled.sum()
    p, q = p / p.sum(), np.maximum(q / q.sum(), smallest)
    if (q[p > 0] == 0).any():
        return math.inf
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@given(
    hnp.arrays(np.int64, st.integers(4, 40), elements=st.sampled_from([0, 0, 1, 2, 50, 1000])),
    *[hnp.arrays(np.int64, st.integers(0, 3), elements=st.integers(0, 2))] * 2,
    st.sampled_from([2, 4]),
)
def test_divergence_is_that_of_the_paper(core: np.ndarray, before: np.ndarray, behind: np.ndarray, levels: int) -> None:
    counts = np.concatenate([before, core, behind])
    first, last = len(before), len(before) + len(core)
    inside, total = core.sum(), counts.sum()
    assume(total > 0)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    (found,) = Divergence(below, float(total), levels)(np.array([first]), np.array([last]))
    if inside < 0.99 * total:
        assert found == math.inf
    else:
        assert found == pytest.approx(divergence(counts, first, last, levels), abs=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["normal", "silu", "laplace", "relu"])
def test_entropy_is_as_good_as_a_search_on_the_values(name: str, bits: int) -> None:
    torch.manual_seed(1)
    many = torch.randn(200_000)
    x = {"normal": many, "silu": F.silu(4 * many), "laplace": many * many.abs(), "relu": many.relu()}[name]
    low, high = choose_range(sketch_of(x), "entropy", bits=bits, signed=False, symmetric=False)
    values = x[x != 0].double().numpy()
    span = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    tried = [
        (span[0] * f, span[1] * g)
        for f in np.linspace(0.25, 1, 7)
        for g in np.linspace(0.25, 1, 7)
        if np.mean((values >= span[0] * f) & (values <= span[1] * g)) > 0.99
    ]
    counts, edges = np.histogram(values, bins=16 << bits, range=span)

    def measured(low: float, high: float) -> float:
        first, last = np.searchsorted(edges, [low - 1e-9, high - 1e-9])
        return divergence(counts, first, last, 1 << bits, smallest=1e-9)  # a level may be empty by chance

    best, full, found = min(measured(*ends) for ends in tried), measured(*span), measured(low, high)
    # A bin of the sketch is spread over the few linear ones that it covers, hence the difference.
    assert found <= best + 0.25 * (full - best) + 1e-3


def test_entropy_cuts_the_tail_but_never_more_than_a_hundredth() -> None:
    for name, x in SAMPLES.items():
        for symmetric in (False, True):
            low, high = choose_range(sketch_of(x), "entropy", bits=8, signed=symmetric, symmetric=symmetric)
            nonzero = x[x != 0]
            assert ((nonzero >= low) & (nonzero <= high)).double().mean() >= 0.985, name
    low, high = choose_range(sketch_of(SAMPLES["one outlier"]), "entropy", bits=8, signed=False, symmetric=False)
    assert -5 < low < -2
    assert 2 < high < 5


def test_entropy_of_the_negated_values_is_the_negated_range() -> None:
    for name in ("normal", "relu", "shifted"):
        low, high = least_divergence(sketch_of(SAMPLES[name]), bits=8, symmetric=False)
        mirrored = least_divergence(sketch_of(-SAMPLES[name]), bits=8, symmetric=False)
        assert mirrored == pytest.approx((-high, -low), rel=0.15, abs=0.05), name


def test_entropy_with_more_than_8_bits_is_the_full_range() -> None:
    x = SAMPLES["normal"]
    assert choose_range(sketch_of(x), "entropy", bits=16, signed=False, symmetric=False) == (x.min(), x.max())


# ---- names


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("minmax", RangeMethod("minmax")),
        ("percentile", RangeMethod("percentile", 99.99)),
        ("percentile:99.9", RangeMethod("percentile", 99.9)),
    ],
)
def test_method_from_text(text: str, want: RangeMethod) -> None:
    assert RangeMethod.of(text) == want == RangeMethod.of(str(want)) == RangeMethod.of(want)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("max", "there is no range method 'max'; wanted one of minmax, moving-average, percentile, entropy, mse"),
        (
            "percentile:40",
            "range method 'percentile:40': the percentile of a range is above 50 and at most 100, not 40",
        ),
        ("percentile:nan", "above 50 and at most 100, not nan"),
        ("percentile:many", "range method 'percentile:many': could not convert string to float"),
        ("mse:3", "only 'percentile' takes a number, as in 'percentile:99.9'"),
    ],
)
def test_wrong_method_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        RangeMethod.of(text)


def test_tensor_that_was_never_computed_has_no_range() -> None:
    with pytest.raises(ValueError, match="never computed during calibration"):
        choose_range(ValueSketch(), "minmax", bits=8, signed=False, symmetric=False)
