"""Plans: what they print, how they are edited, and that a file gives them back bit for bit."""

import pytest
import torch

from fxopt import PassError
from fxopt.passes import QuantPlan, QuantSpec

ACTIVATION = QuantSpec(scale=(0.25,), zero_point=(3,))
WEIGHT = QuantSpec("weight", 4, signed=True, symmetric=True, axis=0, scale=(0.1, 0.3), zero_point=(0, 0))
PLAN = QuantPlan({"relu": ACTIVATION, "conv_weight": WEIGHT, "open": QuantSpec()}, {"conv2": "its weight is computed"})


def test_a_plan_prints_one_line_a_value():
    assert str(PLAN).splitlines() == [
        "relu         activation  uint8, scale 0.25 zero 3 [-0.75, 63]",
        "conv_weight  weight      int4, per channel of axis 0, 2 scales 0.1 to 0.3",
        "open         activation  uint8, not calibrated",
        "not planned: conv2: its weight is computed",
    ]


@pytest.mark.parametrize(("spec", "limits", "dtype"), [
    (QuantSpec(), (0, 255), torch.uint8), (QuantSpec(signed=True), (-128, 127), torch.int8),
    (QuantSpec(signed=True, symmetric=True), (-127, 127), torch.int8), (QuantSpec(bits=4), (0, 15), torch.uint8),
    (QuantSpec(bits=2, signed=True, symmetric=True), (-1, 1), torch.int8),
    (QuantSpec(bits=16), (0, 65535), torch.uint16), (QuantSpec(bits=16, signed=True), (-32768, 32767), torch.int16),
])  # fmt: skip
def test_limits_and_types(spec, limits, dtype):
    assert (spec.limits, spec.dtype) == (limits, dtype)


@pytest.mark.parametrize(("fields", "why"), [
    ({"bits": 9}, "bits is 9; wanted one of 2, 3, 4, 5, 6, 7, 8, 16"), ({"role": "bias"}, "role is 'bias'"),
    ({"scale": (0.1, 0.2), "zero_point": (0, 0)}, "2 scales and no axis"),
    ({"scale": (0.1,)}, "1 scales and 0 zero points"),
    ({"scale": (0.0,), "zero_point": (0,)}, "scale is 0.0; wanted above 0"),
    ({"scale": (float("nan"),), "zero_point": (0,)}, "scale is nan"),
    ({"scale": (0.1,), "zero_point": (256,)}, r"a zero point of uint8 lies outside \[0, 255\]"),
])  # fmt: skip
def test_a_spec_that_no_integer_can_have_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        QuantSpec(**fields)


def test_editing_makes_a_new_plan():
    edited = PLAN.without("open").changed("conv_*", bits=8)
    assert list(edited) == ["relu", "conv_weight"]
    assert (edited["conv_weight"].bits, edited["conv_weight"].scale) == (8, ())  # another width needs another scale
    assert PLAN["conv_weight"] is WEIGHT
    assert PLAN.changed("relu", scale=(0.5,))["relu"].scale == (0.5,)


def test_a_pattern_that_fits_nothing_is_named():
    with pytest.raises(PassError, match=r"no node of the plan fits 'layer9\*'"):
        PLAN.without("layer9*")


def test_a_file_gives_the_plan_back(tmp_path):
    odd = torch.rand(3).div(3).tolist()
    plan = PLAN.with_specs({"relu": QuantSpec("weight", signed=True, axis=0, scale=tuple(odd), zero_point=(0, 1, 2))})
    plan.save(tmp_path / "plan.json")
    loaded = QuantPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.notes == plan.notes


@pytest.mark.parametrize(
    "text", ["", "[]", '{"specs": {"x": {"bits": 5, "colour": 1}}}', '{"specs": {"x": {"bits": 99}}}']
)
def test_a_file_without_a_plan_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PassError, match="holds no quantization plan"):
        QuantPlan.load(tmp_path / "plan.json")
