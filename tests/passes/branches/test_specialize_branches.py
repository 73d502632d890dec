"""specialize-branches: the chosen side stays, the other one is guarded in eager and in the exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.passes import SpecializeBranches, profile_branches
from fxopt.passes.branches.sides import branches_in
from fxopt.testing import check_pass
from tests.models.control_flow import PROGRAMS


def captured(name: str) -> tuple[Any, fxopt.CapturedModule]:
    program = PROGRAMS[name]
    torch.manual_seed(0)
    model = program.make().eval()
    return model, fxopt.capture(model, program.inputs(0), dynamic_shapes=program.dynamic_shapes)


def line(gm: fxopt.CapturedModule, index: int = 0) -> str:
    return profile_branches(gm, []).branches[index].line


@pytest.mark.parametrize("side", [True, False])
def test_chosen_side_is_exact_and_the_other_one_raises(side: bool) -> None:
    model, gm = captured("textbook")
    result = check_pass(SpecializeBranches(sides={line(gm): side}), gm)
    assert branches_in(result.gm) == []
    outcomes = set()
    for seed in range(30):
        (x,) = PROGRAMS["textbook"].inputs(seed)
        outcomes.add(bool(x.norm() > 1))
        if (x.norm() > 1) == side:
            assert torch.equal(result.gm(x), model(x))
        else:
            with pytest.raises(fxopt.GuardError) as caught:
                result.gm(x)
            told = str(caught.value)
            assert f"if x.norm().item() > 1: was specialized to its {str(side).lower()} side" in told
            assert f"linalg_vector_norm = {x.norm().item()}" in told
            assert "branching.py:" in told
    assert outcomes == {True, False}


def test_samples_choose_and_nested_branches_follow() -> None:
    model, gm = captured("elif")
    result = check_pass(SpecializeBranches(samples=True), gm)
    assert len(branches_in(gm)) == 3
    assert branches_in(result.gm) == []
    (x,) = PROGRAMS["elif"].inputs(0)
    assert torch.equal(result.gm(x), model(x))


def test_profile_says_which_sides_were_never_taken() -> None:
    _, gm = captured("elif")
    profile = profile_branches(gm, [PROGRAMS["elif"].inputs(seed) for seed in range(40)])
    means = [float(PROGRAMS["elif"].inputs(seed)[0].mean()) for seed in range(40)]
    first = sum(mean > 0.5 for mean in means)
    assert (profile.branches[0].true, profile.branches[0].false) == (first, 40 - first)
    assert all(count.never == () for count in profile.branches)
    few = profile_branches(gm, [PROGRAMS["elif"].inputs(4)])
    assert [count.never for count in few.branches] == [(False,), (True, False), (True, False)]
    assert str(few).splitlines()[1].split()[-3:] == ["1", "0", "false"]


def test_share_of_a_profile_decides() -> None:
    _, gm = captured("textbook")
    inputs = [PROGRAMS["textbook"].inputs(seed) for seed in (0, 1, 2, 4)]  # three short ones, one long
    profile = profile_branches(gm, inputs)
    assert SpecializeBranches(profile=profile)(gm).changes == ()
    assert branches_in(SpecializeBranches(profile=profile, min_share=0.7)(gm).gm) == []


def test_branches_of_an_unrolled_loop_are_told_apart() -> None:
    model, gm = captured("mixture of experts")
    result = SpecializeBranches(samples=True)(gm)
    assert len(branches_in(gm)) == 4
    assert branches_in(result.gm) == []
    (x,) = PROGRAMS["mixture of experts"].inputs(0)
    assert torch.equal(result.gm(x), model(x))
    assert sum(node.target is torch.ops.aten.linear.default for node in result.gm.graph.nodes) == 3  # gate, one expert


def test_weights_of_the_side_that_is_cut_go() -> None:
    _, gm = captured("if else")
    result = fxopt.optimize(gm, passes=[SpecializeBranches(sides={line(gm): True}), "remove-dead-code"], strict=True)
    assert [name for name, _ in result.named_parameters()] == ["first.weight", "first.bias"]


def test_unknown_line_and_bad_text_are_refused() -> None:
    _, gm = captured("textbook")
    with pytest.raises(fxopt.PassError, match=r"there is no branch at net.py:1\n  wanted  one of branching.py:\d+"):
        SpecializeBranches(sides={"net.py:1": True})(gm)
    with pytest.raises(ValueError, match=r"side 'net.py' is not of the form 'net.py:23=true'"):
        SpecializeBranches(sides=("net.py",))
    with pytest.raises(ValueError, match=r"min_share is 0.5; wanted more than 0.5 and at most 1"):
        SpecializeBranches(min_share=0.5)


def test_text_of_a_pass_makes_it_again() -> None:
    made = fxopt.registry.resolve("specialize-branches{sides=net.py:23=true|b.py:4=false}")
    assert made == SpecializeBranches(sides={"net.py:23": True, "b.py:4": False})
    assert fxopt.registry.resolve(made.spec()) == made


@pytest.mark.ort
def test_file_says_whether_its_guards_hold(tmp_path: Path) -> None:
    from fxopt.export import Session, to_onnx

    model, gm = captured("elif")
    graph = SpecializeBranches(samples=True)(gm).gm
    file = to_onnx(graph, tmp_path / "guarded.onnx")
    assert file.validation is not None
    assert any(note.endswith("a guard of the graph does not hold") for note in file.validation.notes)
    session = Session(tmp_path / "guarded.onnx")
    assert session.output_names == ("output", "guards_hold")
    held = set()
    for seed in range(30):
        (x,) = PROGRAMS["elif"].inputs(seed)
        output, guards = session.run([x])
        try:
            graph(x)
        except fxopt.GuardError:
            assert not guards
        else:
            assert guards
            torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-6)
        held.add(bool(guards))
    assert held == {True, False}
    to_onnx(graph, tmp_path / "plain.onnx", guards="none")
    assert Session(tmp_path / "plain.onnx").output_names == ("output",)


@pytest.mark.ort
def test_file_that_lies_about_its_guards_is_found(tmp_path: Path) -> None:
    from fxopt.export import to_onnx, validate

    _, gm = captured("textbook")
    right = SpecializeBranches(sides={line(gm): False})(gm).gm
    wrong = right.clone()
    for node in wrong.graph.nodes:
        if node.target is torch.ops.aten.logical_not.default:
            node.target = torch.ops.aten.clone.default
    wrong.recompile()
    to_onnx(wrong, tmp_path / "wrong.onnx", validate=False)
    with pytest.raises(
        fxopt.NumericsError, match=r"output 'guards_hold' is false on sample 0, where the graph's guards hold"
    ):
        validate(tmp_path / "wrong.onnx", right)
