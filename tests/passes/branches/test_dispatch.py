"""dispatch: every way is a line of its own, equal to what it was, and weights stand in the file once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import fxopt
from fxopt.passes import Dispatch
from fxopt.regions import COND
from fxopt.testing import check_pass
from tests.models.control_flow import PROGRAMS


def captured(name: str) -> fxopt.CapturedModule:
    program = PROGRAMS[name]
    torch.manual_seed(0)
    return fxopt.capture(program.make().eval(), program.inputs(0), dynamic_shapes=program.dynamic_shapes)


@pytest.mark.parametrize("name", ["textbook", "if else", "helper function", "three submodules", "mixture of experts"])
@pytest.mark.parametrize("variants", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_every_way_stays_what_it_was(name: str, variants: int) -> None:
    gm = captured(name)
    result = check_pass(Dispatch(variants), gm)
    for seed in range(20):
        inputs = PROGRAMS[name].inputs(seed)
        pairs = zip(pytree.tree_leaves(gm(*inputs)), pytree.tree_leaves(result.gm(*inputs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_follows_a_branch_moves_into_it() -> None:
    result = Dispatch()(captured("textbook"))
    (call,) = [node for node in result.gm.graph.nodes if node.target is COND]
    after = [node for node in result.gm.graph.nodes if call in node.all_input_nodes]
    assert [node.name for node in result.gm.graph.output_node().all_input_nodes] == [node.name for node in after]
    for name in ("variant_true", "variant_false"):
        side = result.gm.get_submodule(name)
        assert any(node.target is torch.ops.aten.linear.default for node in side.graph.nodes)


def test_loop_whose_result_nobody_reads_does_not_stay_behind() -> None:
    def unread(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        y = x * 2 if x.sum() > 0 else x * 3
        y = y + 1
        z = y
        for _ in range(int(n)):
            z = z + y
        return y

    gm = fxopt.capture(unread, (torch.ones(3), torch.tensor(2)))
    check_pass(Dispatch(), gm)


def test_number_of_ways_is_bounded() -> None:
    for variants, dispatched in ((2, 1), (3, 2), (4, 3), (8, 3)):  # the last branch of each way has nothing after it
        gm = Dispatch(variants)(captured("three submodules")).gm
        names = [name.rpartition(".")[2] for name, _ in gm.named_modules()]
        assert sum(name.startswith("variant_true") for name in names) == dispatched


def test_effect_after_a_branch_is_refused() -> None:
    (skip,) = Dispatch()(captured("counts in a buffer")).skips
    assert "has an effect" in skip.why


def test_one_way_is_refused() -> None:
    with pytest.raises(ValueError, match="variants is 1; wanted 2 or more"):
        Dispatch(1)


@pytest.mark.ort
def test_weights_stand_in_the_file_once(tmp_path: Path) -> None:
    from fxopt.export import to_onnx

    gm = captured("three submodules")
    plain = to_onnx(gm, tmp_path / "plain.onnx")
    dispatched = to_onnx(fxopt.optimize(gm, passes=["dispatch"], strict=True), tmp_path / "dispatched.onnx")
    weights = [
        sum(value.const_value.nbytes for value in file.model.graph.initializers.values())
        for file in (plain, dispatched)
    ]
    assert weights[0] == weights[1]
    assert [node.op_type for node in dispatched.model.graph].count("If") == 1
