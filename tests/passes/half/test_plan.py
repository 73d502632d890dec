"""Plans of precision as values: print, edit, save."""

import pytest
import torch

from fxopt.errors import PassError
from fxopt.passes.half import PrecisionPlan, half_dtype

PLAN = PrecisionPlan(
    {"linear": torch.float16, "softmax": torch.float32, "true_graph_0/exp": torch.float32},
    {"softmax": "it reaches 1e+09 (net.py:3)", "true_graph_0/exp": "it is denied"},
)


def test_half_lists_the_nodes_in_half():
    assert PLAN.half == ("linear",)


def test_a_plan_prints_type_and_reason_of_each_node():
    assert str(PLAN).splitlines()[:2] == [
        "linear            float16",
        "softmax           float32   it reaches 1e+09 (net.py:3)",
    ]


def test_islands_group_nodes_by_reason():
    plan = PLAN.changed("linear", dtype="float32", reason="it is denied")
    assert plan.islands["it is denied"] == ("true_graph_0/exp", "linear")


def test_a_node_made_half_loses_its_reason():
    edited = PLAN.changed("soft*", dtype=torch.float16)
    assert edited["softmax"] is torch.float16
    assert "softmax" not in edited.reasons


def test_an_edit_leaves_the_plan_alone():
    PLAN.changed("*", dtype="float32")
    assert PLAN["linear"] is torch.float16


def test_a_plan_without_halves_keeps_its_type():
    assert PrecisionPlan({}, dtype="bfloat16").changed(dtype="float32").dtype is torch.bfloat16


def test_a_saved_plan_comes_back_equal(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    read = PrecisionPlan.load(tmp_path / "plan.json")
    assert (read, read.reasons) == (PLAN, PLAN.reasons)


def test_a_file_that_holds_no_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"dtypes": {"linear": "int8"}, "dtype": "float16"}')
    with pytest.raises(PassError, match=r"plan.json holds no precision plan: KeyError: 'int8'"):
        PrecisionPlan.load(tmp_path / "plan.json")


def test_a_pattern_that_fits_no_node():
    with pytest.raises(PassError, match=r"no node of the plan fits 'conv\*'"):
        PLAN.changed("conv*", dtype="float32")


def test_two_types_of_half_precision_in_one_plan():
    with pytest.raises(ValueError, match=r"b is planned in torch.bfloat16; wanted torch.float16 or torch.float32"):
        PrecisionPlan({"a": torch.float16, "b": torch.bfloat16})


@pytest.mark.parametrize("given", ["float16", "torch.float16", torch.float16])
def test_a_type_goes_by_name_or_by_itself(given):
    assert half_dtype(given) is torch.float16


@pytest.mark.parametrize("given", ["float32", torch.float64, "half", None, 16])
def test_a_type_that_is_not_half(given):
    with pytest.raises(ValueError, match=r"wanted float16 or bfloat16"):
        half_dtype(given)
