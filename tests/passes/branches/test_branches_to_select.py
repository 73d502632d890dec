"""branches-to-select: exact on both sides, NaN included, and only where it is cheap and cannot fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.passes import BranchesToSelect
from fxopt.passes.branches.sides import branches_in
from fxopt.testing import check_pass
from tests.models.control_flow import PROGRAMS

X = torch.tensor([[0.5, -2.0, float("nan")], [float("inf"), -0.0, 1e30]])


def branches(gm: fxopt.CapturedModule) -> int:
    return len(branches_in(gm))


def scaled(x: Tensor) -> Tensor:
    if x[0, 0] > 0:
        return x.sqrt() * 2
    return x.exp().tanh()


def test_nan_of_the_side_not_taken_is_not_selected() -> None:
    result = check_pass(BranchesToSelect(), fxopt.capture(scaled, (X,)).eval())
    assert branches(result.gm) == 0
    for x in (X, -X, X * 0):
        got, want = result.gm(x), scaled(x)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_text_of_the_result() -> None:
    def small(x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else -x

    check_pass(
        BranchesToSelect(),
        fxopt.capture(small, (torch.ones(2, 3),)).eval(),
        text="""
        %x : f32[2, 3]
        %0 : f32[] = aten.sum(%x)
        %1 : bool[] = aten.gt(%0, 0)
        %2 : f32[2, 3] = aten.relu(%x)
        %3 : f32[2, 3] = aten.neg(%x)
        %4 : f32[2, 3] = aten.where(%1, %2, %3)
        return %4
        """,
    )


def divides(x: Tensor, n: Tensor) -> Tensor:
    return 100 // n if x.sum() > 0 else n


def picks(x: Tensor, n: Tensor) -> Tensor:
    return x.index_select(0, n) if x.sum() > 0 else x[:1]


def multiplies(x: Tensor, n: Tensor) -> Tensor:
    return x @ x.t() if x.sum() > 0 else x + x.t()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (divides, "aten.floor_divide.default on the true side may fail, or is no cheap work"),
        (picks, "aten.index_select.default on the true side may fail, or is no cheap work"),
        (multiplies, "aten.matmul.default on the true side may fail, or is no cheap work"),
    ],
)
def test_leaves_alone_what_may_fail_or_costs(function: object, why: str) -> None:
    gm = fxopt.capture(function, (torch.ones(3, 3), torch.ones(1, dtype=torch.int64))).eval()
    check_pass(BranchesToSelect(), gm, skips=[why])


def test_leaves_alone_what_is_large() -> None:
    gm = fxopt.capture(scaled, (torch.rand(100, 100),)).eval()
    result = check_pass(BranchesToSelect(), gm, skips=["both sides compute 40,000 elements, more than 4,096"])
    assert branches(result.gm) == 1
    assert branches(BranchesToSelect(max_elements=40_000)(gm).gm) == 0


def test_leaves_alone_a_graph_that_trains() -> None:
    gm = fxopt.capture(scaled, (X.nan_to_num(posinf=1.0),)).train()
    (skip,) = BranchesToSelect()(gm).skips
    assert skip.why.startswith("the graph is in train mode")


def test_inner_branches_go_first() -> None:
    program = PROGRAMS["tolist"]
    gm = fxopt.capture(program.make(), program.inputs(0), dynamic_shapes=program.dynamic_shapes).eval()
    assert branches(gm) > 0
    assert branches(check_pass(BranchesToSelect(), gm).gm) == 0


def test_wrong_option_is_refused() -> None:
    with pytest.raises(ValueError, match="max_elements is -1; wanted 0 or more"):
        BranchesToSelect(max_elements=-1)
