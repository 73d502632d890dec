"""simplify-branches: each rule on a program that asks for it, and what it leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes import RemoveIdentities, SimplifyBranches
from fxopt.passes.branches.sides import branches_in
from fxopt.regions import COND
from fxopt.testing import check_pass
from tests.models.control_flow import PROGRAMS

X = torch.randn(3, 4)


def branches(gm: fxopt.CapturedModule) -> int:
    return len(branches_in(gm))


def targets(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in gm.graph.nodes if node.op == "call_function"]


def clean(model: object, *args: Tensor) -> fxopt.CapturedModule:
    return RemoveIdentities()(fxopt.capture(model, args)).gm


def test_equal_sides_are_one() -> None:
    def same(x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.relu() + 1
        y = x.relu()
        return y + 1

    gm = clean(same, X)
    result = check_pass(SimplifyBranches(), gm)
    assert branches(gm) == 1
    assert branches(result.gm) == 0
    assert "test_simplify_branches.py" in result.changes[0].why
    assert result.changes[0].why.endswith("both sides are the same")


def test_sides_that_differ_in_a_number_stay() -> None:
    def close(x: Tensor) -> Tensor:
        return x.relu() + 1 if x.sum() > 0 else x.relu() + 2

    result = check_pass(SimplifyBranches(), clean(close, X))
    assert branches(result.gm) == 1
    assert targets(result.gm).count("relu.default") == 1  # hoisted: both sides compute it


def test_common_work_is_done_once_before_the_branch() -> None:
    class Common(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.own = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.shared(x).relu() * 2
            return self.own(self.shared(x).relu())

    gm = clean(Common(), X)
    result = check_pass(SimplifyBranches(), gm)
    assert "linear.default" not in targets(gm)
    assert targets(result.gm)[:4] == ["sum.default", "gt.Scalar", "linear.default", "relu.default"]
    inner = [module for name, module in result.gm.named_modules() if name and isinstance(module, torch.fx.GraphModule)]
    assert sorted(targets(module) for module in inner) == [["linear.default"], ["mul.Tensor"]]


def test_work_of_one_side_is_not_done_for_both() -> None:
    def lopsided(x: Tensor) -> Tensor:
        return x.exp().sum(0) if x.sum() > 0 else x.sum(0)

    result = check_pass(SimplifyBranches(), clean(lopsided, X))
    assert "exp.default" not in targets(result.gm)


def test_random_numbers_are_not_shared_by_both_sides() -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if x.sum() > 0 else x - torch.rand_like(x)

    gm = fxopt.capture(noisy, (X,), verify=False)
    assert not SimplifyBranches()(gm).modified


def test_branches_on_one_predicate_become_one() -> None:
    program = PROGRAMS["one side defines"]
    model = program.make().eval()
    gm = RemoveIdentities()(fxopt.capture(model, program.inputs(0), dynamic_shapes=program.dynamic_shapes)).gm
    result = check_pass(SimplifyBranches(), gm)
    assert (branches(gm), branches(result.gm)) == (2, 1)
    for seed in range(12):
        assert torch.equal(model(*program.inputs(seed)), result.gm(*program.inputs(seed)))


def test_what_stands_between_moves_into_both_sides() -> None:
    def cascade(x: Tensor) -> Tensor:
        up = x.sum() > 0
        y = x + 1 if up else x - 1
        y = y.tanh()
        return y * 2 if up else y * 3

    gm = clean(cascade, X)
    result = check_pass(SimplifyBranches(), gm)
    assert (branches(gm), branches(result.gm)) == (2, 1)
    assert "tanh.default" not in targets(result.gm)


def test_branches_stay_two_if_a_value_between_is_read_elsewhere() -> None:
    def shared(x: Tensor) -> tuple[Tensor, Tensor]:
        up = x.sum() > 0
        y = (x + 1 if up else x - 1).tanh()
        z = y.mean()
        return (y * z if up else y * 3), z

    result = check_pass(SimplifyBranches(), clean(shared, X))
    assert branches(result.gm) == 2
    assert any("which would stand after it" in skip.why for skip in result.skips)


def test_inner_branch_is_decided_by_the_outer_one() -> None:
    def nested(x: Tensor) -> Tensor:
        up = x.sum() > 0
        if up:
            x = x * 2
            if up:
                x = x + 1
        elif up:
            x = x * 100
        return x

    gm = clean(nested, X)
    result = check_pass(SimplifyBranches(), gm)
    assert (branches(gm), branches(result.gm)) == (3, 1)
    for sign in (1, -1):
        assert torch.equal(result.gm(X.abs() * sign), nested(X.abs() * sign))


def test_result_that_no_side_changes_goes_around_the_branch() -> None:
    class Passing(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            pair = (x, y)
            if x.sum() > 0:
                pair = (x * 2, y + 0.5)
            else:
                pair = (x * 3, y + 0.5)
            return pair[0] + pair[1]

    result = check_pass(SimplifyBranches(), clean(Passing(), X, X))
    (call,) = [node for node in result.gm.graph.nodes if node.target is COND]
    assert len(call.meta["val"]) == 1  # y + 0.5 is hoisted, and needs no way through the branch


def test_known_predicate_keeps_its_side() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            if torch.tensor(self.scale) > 1:
                x = x.relu()
            return x + 1

    gm = fxopt.optimize(Fixed(), example_inputs=(X,), passes=["fold-constants", "simplify-branches"], strict=True)
    assert branches(gm) == 0
    assert torch.equal(gm(X), X.relu() + 1)
