"""Saturation of 16-bit sums: the proof is exact, the raised scales are safe, and they are the smallest that are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fxopt.pair_sums import can_overflow, kernel_order, pair_sums
from fxopt.passes.quantize.insert_qdq import weight_integers
from fxopt.passes.quantize.saturation import avoid_saturation, proof
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.weights import channel_scales
from tests.passes.quantize import avx2

SPEC = QuantSpec("weight", 8, signed=True, symmetric=True, axis=0)
WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(-4, 4, width=32) | st.sampled_from([0.0, 1.0, -1.0, 4.0]),
)
INTEGERS = hnp.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 9)))
f32, u8 = np.float32, np.uint8


def integers(weight: torch.Tensor, scale: tuple[float, ...], axis: int | None = 0) -> torch.Tensor:
    """Quantize as the pass does that puts integers into the graph."""
    return weight_integers(weight, QuantSpec("weight", 8, True, True, axis, scale=scale, zero_point=(0,) * len(scale)))


def saturates(weight: torch.Tensor, activations: np.ndarray) -> np.ndarray:
    """Return which channels of i8[out, K] the emulated kernel gets wrong, bool[out]."""
    columns = weight.numpy().T
    return (avx2.accumulate(activations, columns) != avx2.accumulate(activations, columns, exact=True)).any(0)


@given(INTEGERS, st.integers(1, 255))
def test_a_channel_can_overflow_if_and_only_if_some_activations_make_it(weight, largest):
    found = can_overflow(torch.from_numpy(weight), largest=largest)
    assert found.tolist() == saturates(torch.from_numpy(weight), avx2.worst_rows(weight, largest)).tolist()


@given(WEIGHTS, st.data())
def test_with_the_raised_scales_no_activations_overflow(weight, data):
    tensor = torch.from_numpy(weight)
    scale = channel_scales(tensor, SPEC)
    held = integers(tensor, avoid_saturation(tensor, scale, 0))
    rows = data.draw(hnp.arrays(u8, (8, weight.shape[1]), elements=st.sampled_from([0, 1, 128, 254, 255])))
    assert not saturates(held, np.concatenate([rows, avx2.worst_rows(held.numpy())])).any()


@given(WEIGHTS)
def test_the_raised_scale_is_the_smallest_and_a_safe_channel_keeps_its_own(weight):
    tensor = torch.from_numpy(weight)
    scale = channel_scales(tensor, SPEC)
    raised = avoid_saturation(tensor, scale, 0)
    guilty = can_overflow(integers(tensor, scale))
    for channel in range(len(weight)):
        if guilty[channel]:
            just_below = float(np.nextafter(f32(raised[channel]), f32(0)))
            row = tensor[channel : channel + 1]
            assert can_overflow(integers(row, (just_below,))).all()
        else:
            assert raised[channel] == scale[channel]
    assert avoid_saturation(tensor, raised, 0) == raised


@given(WEIGHTS, st.floats(1, 8))
def test_a_larger_scale_than_the_smallest_is_safe_too(weight, factor):
    tensor = torch.from_numpy(weight)
    raised = avoid_saturation(tensor, channel_scales(tensor, SPEC), 0)
    assert not can_overflow(integers(tensor, tuple(float(f32(number * factor)) for number in raised))).any()


@given(WEIGHTS, st.floats(0.05, 1))
def test_weights_that_a_narrow_range_cuts_off_are_made_safe(weight, factor):
    tensor = torch.from_numpy(weight)
    narrow = tuple(float(f32(number * factor)) for number in channel_scales(tensor, SPEC))
    assert not can_overflow(integers(tensor, avoid_saturation(tensor, narrow, 0))).any()


def test_before_the_fix_a_sum_comes_out_wrong():
    weight = torch.tensor([[1.0, 0.75, 0.0], [1.0, 0.0, 0.75]])
    scale = channel_scales(weight, SPEC)
    held = integers(weight, scale)
    assert held.tolist() == [[127, 95, 0], [127, 0, 95]]
    assert avx2.accumulate(np.full((1, 3), 255, u8), held.numpy().T).tolist() == [[32767, 222 * 255]]
    raised = avoid_saturation(weight, scale, 0)
    assert raised[1] == scale[1]
    cut = integers(weight, raised)
    assert cut[1].tolist() == held[1].tolist()
    assert int(cut[0].sum()) in (127, 128)
    assert avx2.accumulate(np.full((1, 3), 255, u8), cut.numpy().T)[0, 0] == 255 * int(cut[0].sum())


def test_a_bound_on_the_activations_spares_channels():
    weight = torch.tensor([[1.0, 1.0]])
    scale = channel_scales(weight, SPEC)
    assert avoid_saturation(weight, scale, 0, largest=129) == scale  # 129 * 254 = 32766
    assert avoid_saturation(weight, scale, 0, largest=130) > scale


def test_products_of_two_signs_cannot_overflow_and_those_of_one_can_from_129_on():
    weight = torch.tensor([[127, -127, -127, -2, 5]], dtype=torch.int8)
    assert pair_sums(weight) == (torch.tensor([-129]), torch.tensor([127]))
    assert not can_overflow(torch.tensor([[127, -128], [-128, 127], [64, 64], [-64, -64]], dtype=torch.int8)).any()
    assert can_overflow(torch.tensor([[64, 65], [-64, -65]], dtype=torch.int8)).all()


def test_the_negative_end_itself_is_no_overflow():
    weight = torch.tensor([[-128, -128]], dtype=torch.int8)
    assert not can_overflow(weight, largest=128).any()  # -32768
    assert can_overflow(weight, largest=129).all()


def test_a_depthwise_convolution_is_left_alone_and_one_with_a_multiplier_is_not():
    weight = torch.ones(4, 1, 3, 3)
    scale = channel_scales(weight, SPEC)
    assert avoid_saturation(weight, scale, 0, groups=4) == scale
    assert all(np.array(avoid_saturation(weight, scale, 0, groups=2)) > scale)
    assert all(np.array(avoid_saturation(weight, scale, 0)) > scale)


def test_one_scale_for_all_is_raised_for_the_worst_channel():
    weight = torch.tensor([[1.0, 0.2], [1.0, 1.0]])
    both = avoid_saturation(weight, (1 / 127,), 0)
    assert both == avoid_saturation(weight, (1 / 127, 1 / 127), 0)[1:]
    assert not can_overflow(integers(weight, both, None)).any()


def test_a_matrix_is_read_along_either_axis():
    weight = torch.randn(7, 5)
    scale = channel_scales(weight, SPEC)
    assert avoid_saturation(weight.t(), scale, 1) == avoid_saturation(weight, scale, 0)
    assert kernel_order(weight.t(), -1).equal(weight)


def test_the_kernel_reads_a_convolution_position_by_position():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert kernel_order(weight)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_the_cut_costs_less_than_seven_bits_for_all():
    weight = torch.randn(64, 16, 3, 3) * torch.rand(64, 16, 3, 3) ** 2
    scale = channel_scales(weight, SPEC)
    raised = avoid_saturation(weight, scale, 0)
    seven = channel_scales(weight, QuantSpec("weight", 7, signed=True, symmetric=True, axis=0))

    def noise(scales: tuple[float, ...]) -> float:
        step = torch.tensor(scales).reshape(-1, 1, 1, 1)
        return float((integers(weight, scales) * step - weight).square().sum())

    assert 0 < can_overflow(integers(weight, scale)).sum() < 64
    assert noise(raised) < 0.7 * noise(seven)


def test_the_proof_says_what_was_found():
    weight = torch.tensor([[1.0, 0.75], [1.0, 0.0], [1.0, -1.0]])
    scale = channel_scales(weight, SPEC)
    found = proof(weight, scale, 0)
    assert str(found) == "1 of 3 channels can overflow; cut to at most 73 (scale × 1.73)"
    assert str(proof(weight, scale, 0, raised=scale)) == "1 of 3 channels can overflow; 1 still can with the new scales"
    assert str(proof(weight[1:], scale[1:], 0)) == "none of 2 channels can overflow"
    assert str(proof(torch.ones(4, 1, 3, 3), (1 / 127,), 0, groups=4)) == "none of 4 channels can overflow"


@pytest.mark.parametrize(
    ("weight", "scale", "axis", "options", "message"),
    [
        (torch.ones(3, 2), (1.0, 1.0), 0, {}, "2 scales for 3 channels"),
        (torch.ones(3, 2), (0.0,), 0, {}, "not a finite number above 0"),
        (torch.full((3, 2), torch.inf), (1.0,), 0, {}, "NaN or infinity"),
        (torch.ones(3), (1.0,), 0, {}, r"shape \(3,\) has no output channels along axis 0"),
        (torch.ones(3, 2, 2), (1.0,), 1, {}, "axis 1 of 3; wanted 0, or 1 of 2"),
        (torch.ones(3, 2), (1.0,), 0, {"largest": 256}, "largest activation is 256; wanted 1 to 255"),
        (torch.ones(3, 2), (1.0,), 0, {"limits": (-127, 128)}, "-127 to 128; wanted a part of -128 to 127"),
    ],
)
def test_refuses(weight, scale, axis, options, message):
    with pytest.raises(ValueError, match=message):
        avoid_saturation(weight, scale, axis, **options)


def test_weights_without_pairs_or_without_channels_are_safe():
    for shape in ((3, 1), (3, 0), (0, 4), (2, 0, 3, 3)):
        weight = torch.ones(shape)
        assert avoid_saturation(weight, (1 / 127,), 0) == (1 / 127,)
        assert not can_overflow(integers(weight, (1 / 127,), None)).any()
