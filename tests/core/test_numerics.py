"""Errors are measured as numpy's float64 does, and each contract has teeth at its own bound."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import fxopt
from fxopt import Contract
from fxopt.isolation import isolated
from fxopt.numerics import measure, reference, run_float64, violation

FLOATS = st.floats(-1e6, 1e6, width=32)
PAIRS = hnp.array_shapes(min_dims=1, max_dims=3, max_side=5).flatmap(
    lambda shape: st.tuples(*(hnp.arrays(np.float32, shape, elements=FLOATS) for _ in range(2)))
)


@given(PAIRS)
def test_measure_agrees_with_numpy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    w, g = (array.astype(np.float64) for array in pair)
    found = measure(*(torch.from_numpy(array) for array in pair))
    error = np.abs(g - w)
    assert found.max_abs == error.max()
    assert error[found.worst] == error.max()
    assert error.ravel()[found.worst_flat] == error.max()
    assert (found.mismatches, found.size) == (int((w != g).sum()), w.size)
    noise, signal = (error**2).sum(), (w**2).sum()
    if noise == 0:
        assert found.sqnr_db == math.inf
    elif signal == 0:
        assert found.sqnr_db == -math.inf
    else:
        assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise))
    counted = np.abs(w) > 1e-6 * np.abs(w).max()
    relative = error[counted] / np.abs(w[counted])
    assert found.max_rel == pytest.approx(relative.max() if relative.size else 0.0)
    norms = np.sqrt((w**2).sum()) * np.sqrt((g**2).sum())
    if norms > 1e-200:
        assert found.cosine == pytest.approx((w * g).sum() / norms, abs=1e-9)


@pytest.mark.parametrize(
    ("want", "got", "max_abs", "mismatches"),
    [
        ([math.inf, 1.0], [math.inf, 1.0], 0.0, 0),
        ([math.nan, 1.0], [math.nan, 1.5], 0.5, 1),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf, 1),
        ([math.nan, 1.0], [0.0, 1.0], math.inf, 1),
        ([0.0, 1.0], [math.nan, 1.0], math.inf, 1),
        ([1.0, 1.0], [1.0, math.inf], math.inf, 1),
    ],
)
def test_nan_and_infinity(want: list[float], got: list[float], max_abs: float, mismatches: int) -> None:
    found = measure(torch.tensor(want), torch.tensor(got))
    assert (found.max_abs, found.mismatches) == (max_abs, mismatches)
    assert not math.isnan(found.sqnr_db)


def test_measure_of_other_types() -> None:
    assert measure(torch.tensor([1, 5]), torch.tensor([1, 2])).max_abs == 3
    assert measure(torch.tensor([True, False]), torch.tensor([True, True])).mismatches == 1
    assert measure(torch.zeros(0, 3), torch.zeros(0, 3)).size == 0
    assert measure(torch.tensor(2.0), torch.tensor(2.5)).worst == ()
    with pytest.raises(ValueError, match=r"wanted \(2,\), got \(1,\)"):
        measure(torch.zeros(2), torch.zeros(1))


def test_top1_agreement_counts_rows_and_lets_ties_agree() -> None:
    want = torch.tensor([[1.0, 2, 0], [3, 0, 0], [0, 0, 1], [5, 4, 0]])
    got = torch.tensor([[1.0, 2, 0], [0, 3, 0], [1, 0, 1], [4, 5, 0]])
    assert measure(want, got).top1_agreement == 0.5


@pytest.mark.parametrize("contract", [Contract.EXACT, Contract.ROUNDING, Contract.lossy("sqnr_db", 10)])
def test_every_contract_sees_shape_dtype_and_nan(contract: Contract) -> None:
    want = torch.tensor([1.0, -2.0])
    assert violation(contract, want, want.clone()) is None
    assert "dtype changed" in violation(contract, want, want.double())
    assert "shape changed" in violation(contract, want, want[None])
    assert violation(contract, want, torch.tensor([1.0, math.nan])) == "1 of 2 elements became NaN"
    assert violation(contract, 3, 3) is None
    assert violation(contract, 3, 4) == "wanted 3, got 4"
    assert violation(contract, 1, True) == "wanted 1, got True"


def test_exact_allows_no_bit() -> None:
    want = torch.tensor([1.0, 2.0])
    got = torch.nextafter(want, torch.tensor(math.inf))
    text = violation(Contract.EXACT, want, got, noise=1.0)
    assert text.startswith("2 of 2 elements differ")
    assert "at [1]: wanted 2.0" in text


def test_rounding_allows_factor_times_the_noise_and_no_more() -> None:
    precise = torch.tensor([1.0, 2.0], dtype=torch.float64)
    want = precise.float()
    contract = Contract("ROUNDING", 4.0)
    assert violation(contract, want, want + 0.0039, precise, 0.001) is None
    text = violation(contract, want, want + 0.0041, precise, 0.001)
    assert "exceeds the ROUNDING bound 0.004" in text
    assert violation(contract, want.long(), want.long() + 1, noise=100.0) is not None, "integers never round"


def test_lossy_holds_its_metric() -> None:
    want = torch.tensor([1.0, 0.0])
    got = torch.tensor([1.1, 0.0])  # 20 dB
    assert violation(Contract.lossy("sqnr_db", 19.9), want, got) is None
    assert violation(Contract.lossy("sqnr_db", 20.1), want, got).startswith("sqnr_db is 20, the contract says at least")
    assert violation(Contract.lossy("max_abs", 0.11), want, got) is None
    assert "at most 0.09" in violation(Contract.lossy("max_abs", 0.09), want, got)


def test_run_float64_is_the_model_in_double() -> None:
    net = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).eval()
    x = torch.randn(5, 40)
    gm = fxopt.capture(net, (x,))
    (got,) = run_float64(gm, [x])
    assert got.dtype == torch.float64
    assert got.detach().allclose(net.double()(x.double()), rtol=1e-13, atol=1e-13)


def test_run_float64_widens_what_the_graph_asks_to_be_float32() -> None:
    gm = fxopt.capture(lambda x: x.long().to(torch.float32) / 3, (torch.tensor([1.0, 2.0]),))
    (got,) = run_float64(gm, [torch.tensor([1.0, 2.0])])
    assert got.tolist() == [1 / 3, 2 / 3]


def test_run_float64_leaves_buffers_and_random_state() -> None:
    net = nn.BatchNorm1d(4).train()
    x = torch.randn(3, 4)
    gm = fxopt.capture(net, (x,))
    before, state = net.running_mean.clone(), torch.get_rng_state()
    assert run_float64(gm, [x]) is not None
    assert torch.equal(net.running_mean, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_of_a_reference_is_the_rounding_of_the_graph() -> None:
    net = nn.Linear(200, 4).eval()
    x = torch.randn(3, 200)
    gm = fxopt.capture(net, (x,))
    found = reference(gm, gm.flat_outputs(x), [x])
    net.requires_grad_(False)
    exact = net.weight.double() @ x.double().T + net.bias.double()[:, None]
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    rounding = (net(x).double() - exact.T).abs().max()
    assert found.noise[0] == pytest.approx(float(max(floor, rounding)), rel=1e-6)
    assert violation(Contract.ROUNDING, found.outputs[0], found.outputs[0] + 1e-3, found.precise[0], found.noise[0])


def test_float64_run_draws_the_same_random_numbers() -> None:
    """Else the difference of two draws would pass for rounding error, and any rewrite within it for a good one."""

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(x) + torch.nn.functional.dropout(x, 0.5, training=True)

    gm = fxopt.capture(noisy, torch.randn(50, 4))
    leaves = gm.flatten_inputs(*gm.samples[0].args)
    with isolated(gm):
        outputs = gm.flat_outputs(*gm.samples[0].args)
    found = reference(gm, outputs, leaves)
    assert found.noise[0] < 1e-5


def test_no_bound_is_as_wide_as_the_signal() -> None:
    """A graph that amplifies rounding error to the size of its output gets no bound that lets anything pass."""

    def chaotic(x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = 3.9 * x * (1 - x)
        return x

    gm = fxopt.capture(chaotic, torch.rand(64))
    outputs = gm.flat_outputs(*gm.samples[0].args)
    found = reference(gm, outputs, gm.flatten_inputs(*gm.samples[0].args))
    assert 0 < found.noise[0] < 1e-3


def test_what_is_smaller_than_any_normal_number_is_rounding() -> None:
    """As from nets with small random weights, layer behind layer: the digits of such an output are few, or none."""
    gm = fxopt.capture(lambda x: x * 1e-20 * 1e-21, (torch.randn(4, 3),))
    x = torch.randn(4, 3)
    want = gm(x)
    held = reference(gm, [want], [x])
    assert 0 < float(want.abs().max()) < torch.finfo(torch.float32).tiny
    contract = Contract("ROUNDING", 4.0)
    assert violation(contract, want, want * 0, held.precise[0], held.noise[0]) is None
    assert violation(contract, want, want + 1e-36, held.precise[0], held.noise[0]) is not None
