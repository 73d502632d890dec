"""Integer layers with ranges found at run time: against numpy's integers, and against the layers of floats."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fxopt.dynamic_ops import DYNAMIC_LINEAR, DYNAMIC_LSTM, dynamic_range
from fxopt.numerics import measure

f32 = np.float32
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


def range_by_formula(x: np.ndarray) -> tuple[np.float32, int]:
    """Return scale and zero point by ONNX's text, in float32 as it says."""
    low, high = min(f32(0), x.min(initial=0)), max(f32(0), x.max(initial=0))
    scale = f32(1) if high == low else f32(f32(high - low) / f32(255))
    return scale, int(np.rint(np.clip(f32(0 - low) / scale, 0, 255)))


def product_by_formula(x: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return f64[..., out] of f32[..., in] and i8[out, in], the sums in 64-bit integers."""
    step, zero = range_by_formula(x)
    integers = np.clip(np.rint(x / step) + zero, 0, 255).astype(np.int64) - zero
    return (integers @ weight.T.astype(np.int64)) * (step * scale).astype(np.float64)


def matrix(out: int, features: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, (out, features), dtype=torch.int8), torch.rand(out) * 0.01 + 1e-3


@given(hnp.arrays(f32, hnp.array_shapes(max_dims=3, max_side=5), elements=FLOATS))
def test_range_is_that_of_the_onnx_text(x: np.ndarray) -> None:
    scale, zero_point = dynamic_range(torch.from_numpy(x))
    assert (np.float32(scale), int(zero_point)) == range_by_formula(x)


@given(hnp.arrays(f32, hnp.array_shapes(max_dims=2, max_side=9), elements=st.floats(-8, 8, width=32)))
def test_rounding_is_off_by_half_a_step(x: np.ndarray) -> None:
    features = x.shape[-1]
    got = DYNAMIC_LINEAR(torch.from_numpy(x), torch.eye(features, dtype=torch.int8), torch.ones(features))
    step = float(dynamic_range(torch.from_numpy(x))[0])
    # At an end of the range the zero point is rounded too.
    assert float((got - torch.from_numpy(x)).abs().max()) <= step * (1 + 1e-5)
    assert bool((got[torch.from_numpy(x) == 0] == 0).all()), "0 stays 0"


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_sums_integers_exactly(shape: tuple[int, ...], bias: bool) -> None:
    weight, scale = matrix(7, 40)
    x, added = torch.randn(shape), torch.randn(7) if bias else None
    want = product_by_formula(x.numpy(), weight.numpy(), scale.numpy())
    want = want + (added.double().numpy() if added is not None else 0)
    got = DYNAMIC_LINEAR(x, weight, scale, added)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=1e-6, atol=1e-6)


def test_sums_that_float32_cannot_hold_are_exact():
    x = torch.ones(1, 4097)
    x[0, -1] = 1 / 255  # one step beside 4096 * 255 * 127, which is above 2**24
    weight = torch.full((2, 4097), 127, dtype=torch.int8)
    weight[1, -1] = -127
    upper, lower = DYNAMIC_LINEAR(x, weight, torch.ones(2))[0].tolist()
    step = float(f32(1) / f32(255))
    assert [upper / step, lower / step] == pytest.approx(
        [np.float32(4096 * 255 * 127 + 127), np.float32(4096 * 255 * 127 - 127)], rel=1e-7
    )


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-30])
def test_equal_numbers(value: float) -> None:
    weight, scale = matrix(5, 8)
    x, bias = torch.full((2, 8), value), torch.randn(5)
    got = DYNAMIC_LINEAR(x, weight, scale, bias)
    want = x @ (weight * scale[:, None]).t() + bias
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if value == 0:
        assert torch.equal(got, bias.expand(2, 5)), "a scale of 0 would have made NaN"


def test_no_rows():
    weight, scale = matrix(5, 8)
    assert DYNAMIC_LINEAR(torch.zeros(0, 8), weight, scale).shape == (0, 5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_numbers_are_not_hidden(broken: float) -> None:
    weight, scale = matrix(5, 8)
    x = torch.randn(2, 8)
    x[1, 3] = broken
    assert bool(DYNAMIC_LINEAR(x, weight, scale)[1].isnan().all())


def test_what_else_is_in_the_batch_sets_the_range():
    weight, scale = matrix(5, 8)
    x = torch.randn(1, 8)
    alone = DYNAMIC_LINEAR(x, weight, scale)
    beside = DYNAMIC_LINEAR(torch.cat([x, 100 * torch.ones(1, 8)]), weight, scale)[:1]
    assert not torch.equal(alone, beside)


def test_gradients_of_a_linear_are_those_of_the_float_layer():
    weight, scale = matrix(7, 40)
    x, bias = torch.randn(2, 3, 40, requires_grad=True), torch.randn(7, requires_grad=True)
    outer = torch.randn(2, 3, 7)
    got = torch.autograd.grad(DYNAMIC_LINEAR(x, weight, scale, bias), (x, bias), outer)
    want = torch.autograd.grad(torch.nn.functional.linear(x, weight * scale[:, None], bias), (x, bias), outer)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# -- LSTM --------------------------------------------------------------------------------------------------------------


def stack(features: int, hidden: int, layers: int, directions: int, biases: bool) -> list[Tensor]:
    """Return random parameters as the operator takes them."""
    found: list[Tensor] = []
    for layer in range(layers):
        for _ in range(directions):
            found += [
                *matrix(4 * hidden, hidden * directions if layer else features),
                *matrix(4 * hidden, hidden),
                *([torch.randn(4 * hidden), torch.randn(4 * hidden)] if biases else []),
            ]
    return found


def floats_of(parameters: Sequence[Tensor], biases: bool) -> list[Tensor]:
    """Return the parameters of the float layers that the integers stand for."""
    each, found = 6 if biases else 4, []
    for first in range(0, len(parameters), each):
        w, w_scale, r, r_scale, *others = parameters[first : first + each]
        found += [w * w_scale[:, None], r * r_scale[:, None], *others]
    return found


def lstm_by_formula(
    x: np.ndarray, h: np.ndarray, c: np.ndarray, parameters: Sequence[np.ndarray], directions: int, biases: bool
) -> list[np.ndarray]:
    """Return sequence and last states of f32[length, batch, in] in float64, hidden states of a step in one range."""

    def sigmoid(t: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-t))

    each, last_h, last_c = 6 if biases else 4, [], []
    groups = [parameters[first : first + each] for first in range(0, len(parameters), each)]
    for place, (w, w_scale, r, r_scale, *added) in enumerate(groups):
        if place % directions == 0:
            source, outputs = x, []
        inner = product_by_formula(source, w, w_scale)
        hidden, cell, steps = h[place], c[place].astype(np.float64), []
        for step in inner[::-1] if place % directions else inner:
            gates = step + product_by_formula(hidden.astype(f32), r, r_scale) + sum(added)
            i, f, g, o = np.split(gates, 4, -1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            steps.append(hidden)
        outputs.append(np.stack(steps[::-1] if place % directions else steps))
        x = np.concatenate(outputs, -1).astype(f32)
        last_h.append(hidden)
        last_c.append(cell)
    return [x, np.stack(last_h), np.stack(last_c)]


FORMS = list(itertools.product((1, 2), (False, True), (False, True)))


@pytest.mark.parametrize(("layers", "bidirectional", "biases"), FORMS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lstm_is_the_formula_with_products_of_integers(
    layers: int, bidirectional: bool, biases: bool, batch_first: bool
) -> None:
    directions = 1 + bidirectional
    parameters = stack(5, 6, layers, directions, biases)
    x, h, c = torch.randn(4, 3, 5), torch.randn(layers * directions, 3, 6), torch.randn(layers * directions, 3, 6)
    given_x = x.transpose(0, 1).contiguous() if batch_first else x
    got = list(DYNAMIC_LSTM(given_x, [h, c], parameters, biases, layers, bidirectional, batch_first))
    if batch_first:
        got[0] = got[0].transpose(0, 1)
    arrays = [parameter.numpy() for parameter in parameters]
    want = lstm_by_formula(x.numpy(), h.numpy(), c.numpy(), arrays, directions, biases)
    for result, wanted in zip(got, want, strict=True):
        assert result.shape == wanted.shape
        # Where float32 and float64 round a hidden state to two sides, one step of some 1/128 differs.
        assert measure(torch.from_numpy(wanted).float(), result).sqnr_db > 60


@pytest.mark.parametrize(("layers", "bidirectional", "biases"), FORMS)
def test_lstm_is_close_to_the_layer_of_floats_and_has_its_gradients(
    layers: int, bidirectional: bool, biases: bool
) -> None:
    directions = 1 + bidirectional
    parameters = stack(5, 6, layers, directions, biases)
    leaves = [tensor.requires_grad_() for tensor in parameters if tensor.ndim == 1 and tensor.min() < 0]  # the biases
    assert len(leaves) == 2 * layers * directions * biases
    x = torch.randn(3, 4, 5, requires_grad=True)
    h, c = (torch.randn(layers * directions, 3, 6, requires_grad=True) for _ in range(2))
    got = DYNAMIC_LSTM(x, [h, c], parameters, biases, layers, bidirectional, True)
    options: tuple[Any, ...] = (biases, layers, 0.0, False, bidirectional, True)
    want = torch.ops.aten.lstm.input(x, [h, c], floats_of(parameters, biases), *options)
    outer = [torch.randn_like(result) for result in want]
    for result, wanted in zip(got, want, strict=True):
        assert measure(wanted, result).sqnr_db > 30
    gradients = [torch.autograd.grad(results, (x, h, c, *leaves), outer) for results in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_lstm_without_a_batch_is_a_batch_of_one(batch_first: bool) -> None:
    parameters = stack(5, 6, 1, 2, True)
    x, h, c = torch.randn(4, 5), torch.randn(2, 6), torch.randn(2, 6)
    alone = DYNAMIC_LSTM(x, [h, c], parameters, True, 1, True, batch_first)
    batch = DYNAMIC_LSTM(
        x.unsqueeze(0 if batch_first else 1), [h[:, None], c[:, None]], parameters, True, 1, True, batch_first
    )
    places = (0 if batch_first else 1, 1, 1)
    for result, wanted, place in zip(alone, batch, places, strict=True):
        assert torch.equal(result, wanted.squeeze(place))


def test_fake_tensors_and_autograd_know_the_operators():
    weight, scale = matrix(7, 5)
    x, bias = torch.randn(3, 5, requires_grad=True), torch.randn(7, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(DYNAMIC_LINEAR, (x, weight, scale, bias), test_utils=checks)
    torch.library.opcheck(DYNAMIC_LINEAR, (x[0].detach(), weight, scale, None), test_utils=checks)
    states = [torch.randn(4, 3, 6, requires_grad=True) for _ in range(2)]
    steps = torch.randn(3, 4, 5, requires_grad=True)
    arguments = (steps, states, stack(5, 6, 2, 2, True), True, 2, True, True)
    torch.library.opcheck(DYNAMIC_LSTM, arguments, test_utils=checks)
