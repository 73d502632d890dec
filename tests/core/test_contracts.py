"""Contracts: what they refuse to be, how they print, and what holds after several."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt import Contract
from fxopt.contracts import METRICS

ORDER = ["EXACT", "TRAINING", "ROUNDING", "LOSSY"]
CONTRACTS = [Contract.EXACT, Contract.TRAINING, Contract.ROUNDING, Contract.lossy("sqnr_db", 30.0)]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(CONTRACTS, CONTRACTS)))
def test_the_weaker_kind_holds_after_both(first: Contract, second: Contract) -> None:
    joined = first.then(second)
    assert joined.kind == ORDER[max(ORDER.index(first.kind), ORDER.index(second.kind))]
    assert joined == second.then(first)


@given(st.lists(st.floats(-50, 120), min_size=1, max_size=5), st.sampled_from(sorted(METRICS)))
def test_the_lower_floor_is_kept(floors: list[float], metric: str) -> None:
    joined = Contract.EXACT
    for floor in floors:
        joined = joined.then(Contract.lossy(metric, floor))
    assert joined.floors == ((metric, min(floors) if METRICS[metric] else max(floors)),)


def test_floors_of_different_metrics_are_joined() -> None:
    joined = Contract.lossy("sqnr_db", 30).then(Contract.lossy("max_abs", 0.1)).then(Contract.lossy("sqnr_db", 20))
    assert dict(joined.floors) == {"sqnr_db": 20, "max_abs": 0.1}
    assert str(joined) == "LOSSY(sqnr_db >= 20, max_abs <= 0.1)"


def test_the_larger_factor_is_kept() -> None:
    assert Contract("ROUNDING", 16.0).then(Contract("ROUNDING", 2.0)).factor == 16.0


def test_text() -> None:
    assert [str(contract) for contract in CONTRACTS] == ["EXACT", "TRAINING", "ROUNDING", "LOSSY(sqnr_db >= 30)"]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric 'psnr' is unknown; there are sqnr_db"):
        Contract.lossy("psnr", 3)
    with pytest.raises(ValueError, match="needs a metric"):
        Contract("LOSSY")
    with pytest.raises(ValueError, match=r"factor is 0\.5"):
        Contract("ROUNDING", 0.5)
    with pytest.raises(ValueError, match="factor is nan"):
        Contract("ROUNDING", float("nan"))
