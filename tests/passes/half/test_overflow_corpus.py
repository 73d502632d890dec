"""Nets that float16 breaks: the pass keeps the right operators in float32, and says which line of the user they are."""

import functools

import pytest
import torch

import fxopt
from fxopt import passes
from fxopt.passes.half import Emulated
from fxopt.passes.half.planning import signal_to_noise
from tests.models.half_corpus import CORPUS, Case
from tests.passes.half.nets import all_half, applied

MIN_SQNR_DB = 35.0


@pytest.fixture(params=CORPUS, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@functools.cache
def captured(case: Case) -> fxopt.CapturedModule:
    torch.manual_seed(0)
    return fxopt.capture(case.model().eval(), case.inputs(), dynamic_shapes=case.dynamic)


def test_all_in_half_is_really_wrong(case):
    gm = captured(case)
    half = Emulated(applied(gm, all_half(gm)), case.accumulate)
    inputs = case.inputs()
    assert signal_to_noise([gm.flat_outputs(*inputs)], [half.flat_outputs(*inputs)]) < 20


def test_the_pass_keeps_the_right_operators_and_the_signal(case):
    gm = captured(case)
    pass_ = passes.CastHalf("float16", min_sqnr_db=MIN_SQNR_DB, accumulate=case.accumulate)
    plan = pass_.make_plan(gm)
    kept = [name for name in plan if plan[name] is torch.float32]
    for wanted in case.islands:
        assert any(name.startswith(wanted) for name in kept), (wanted, str(plan))
    assert any(case.line in reason for reason in plan.reasons.values()), plan.reasons
    half = passes.CastHalf(plan=plan, min_sqnr_db=MIN_SQNR_DB)(gm).gm
    inputs = case.inputs()
    emulated = Emulated(half, case.accumulate).flat_outputs(*inputs)
    assert signal_to_noise([gm.flat_outputs(*inputs)], [emulated]) >= MIN_SQNR_DB


def test_bfloat16_has_the_range_for_what_only_overflows():
    case = next(case for case in CORPUS if case.name == "exponential of 12")
    gm = captured(case)
    plan = passes.CastHalf("bfloat16", min_sqnr_db=20.0).make_plan(gm)
    assert plan["exp"] is torch.bfloat16
