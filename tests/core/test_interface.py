import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.checks import verify
from fxopt.interface import argument_leaves, argument_names, output_tree
from fxopt.judge import Judge
from fxopt.pass_base import Pass
from fxopt.rewriter import Rewriter

X = torch.arange(6.0).view(3, 2)


def pairs(x: Tensor, *, scale: dict[str, Tensor] | None = None) -> dict[str, Tensor | None]:
    return {"y": x * 2 if scale is None else x * scale["a"], "nothing": None}


def by_position() -> fxopt.CapturedModule:
    return fxopt.capture(pairs, (X,), dynamic_shapes=({0: "batch"},))


def by_keyword() -> fxopt.CapturedModule:
    sample = fxopt.Sample((X,), {"scale": {"a": torch.tensor(3.0)}})
    return fxopt.capture(pairs, sample, dynamic_shapes={"x": {0: "batch"}, "scale": {"a": None}})


def extended(gm: fxopt.CapturedModule) -> fxopt.CapturedModule:
    """Add an argument ``more`` of two tensors like x, and their sum as an output."""
    rw = Rewriter(gm.clone(), "extend")
    x = next(node for node in rw.gm.graph.nodes if node.op == "placeholder")
    fakes = {"p": x.meta["val"].clone(), "q": x.meta["val"].clone()}
    made = rw.add_argument("more", fakes, [{"p": X, "q": X + 1}], why="to test it")
    total = rw.insert_call(torch.ops.aten.add.Tensor, (made["p"], made["q"]), before=rw.gm.graph.output_node(), why="")
    rw.set_outputs({"output": output_tree(rw.gm), "sum": total}, gm.output_names, why="to test it")
    rw.finish()
    verify(rw.gm)
    return rw.gm


def test_argument_comes_last_and_can_be_given_by_name():
    gm = extended(by_position())
    assert argument_names(gm) == ["x", "more"]
    assert argument_leaves(gm) == {"x": [0], "more": [1, 2]}
    assert [str(spec) for spec in gm.inputs[1:]] == ["more_p: f32[batch, 2]", "more_q: f32[batch, 2]"]
    for found in (gm(X, {"p": X, "q": X}), gm(X, more={"p": X, "q": X}), gm(x=X, more={"p": X, "q": X})):
        assert torch.equal(found["sum"], X + X)
        assert found["output"]["nothing"] is None


def test_graph_with_keywords_gets_a_keyword():
    gm = extended(by_keyword())
    found = gm(X, scale={"a": torch.tensor(2.0)}, more={"p": X, "q": X})
    assert torch.equal(found["output"]["y"], X * 2)
    assert gm.samples[0].kwargs.keys() == {"scale", "more"}


@pytest.mark.parametrize("make", [by_position, by_keyword])
def test_old_outputs_keep_their_names_and_new_ones_are_named_by_their_place(make):
    gm = make()
    assert extended(gm).output_names == (*gm.output_names, "sum")


@pytest.mark.parametrize("make", [by_position, by_keyword])
def test_argument_that_goes_leaves_the_graph_as_it_was(make, tmp_path):
    gm = make()
    fxopt.save(extended(gm), tmp_path / "more.fxopt")
    rw = Rewriter(fxopt.load(tmp_path / "more.fxopt"), "reduce")
    rw.set_outputs(output_tree(rw.gm)["output"], gm.output_names, why="to test it")
    rw.remove_argument("more", why="to test it")
    rw.finish()
    verify(rw.gm)
    assert (rw.gm.inputs, rw.gm.output_names) == (gm.inputs, gm.output_names)
    sample = rw.gm.samples[0]
    assert torch.equal(rw.gm(*sample.args, **sample.kwargs)["y"], gm(*sample.args, **sample.kwargs)["y"])


def test_taken_name_gets_an_underscore():
    rw = Rewriter(by_position().clone(), "extend")
    x = next(node for node in rw.gm.graph.nodes if node.op == "placeholder")
    assert rw.add_argument("mul", x.meta["val"].clone(), [X], why="").name == "mul_"


def test_argument_that_is_read_is_not_removed():
    rw = Rewriter(extended(by_position()), "reduce")
    with pytest.raises(fxopt.PassError, match="'more' cannot be removed: more_p is read by add"):
        rw.remove_argument("more", why="")
    with pytest.raises(fxopt.PassError, match="no argument 'less'"):
        rw.remove_argument("less", why="")


def test_example_is_needed_for_each_sample():
    rw = Rewriter(by_position().clone(), "extend")
    with pytest.raises(fxopt.PassError, match="needs an example for each sample"):
        rw.add_argument("more", torch.empty(3), [], why="")
    with pytest.raises(fxopt.PassError, match="another structure"):
        rw.add_argument("more", torch.empty(3), [[X]], why="")


def test_the_copy_of_a_graph_keeps_its_interface():
    gm = by_position()
    copy = gm.clone()
    extended(gm)
    assert (copy.inputs, argument_names(copy)) == (gm.inputs, ["x"])
    assert torch.equal(copy(X)["y"], X * 2)


def judged(before: fxopt.CapturedModule, after: fxopt.CapturedModule, interface: str) -> str | None:
    judge = Judge(before, "all")
    return judge.judge(after, fxopt.Contract.EXACT, evaluation_only=False, interface=interface)[0]


def spoiled(gm: fxopt.CapturedModule, operator: object, value: object) -> fxopt.CapturedModule:
    copy = gm.clone()
    node = next(node for node in copy.graph.nodes if node.target is operator)
    node.args = (node.args[0], value)
    copy.recompile()
    return copy


def test_extended_graph_is_compared_on_its_own_cases_in_the_outputs_that_there_were():
    gm = by_position()
    both = extended(gm)
    assert judged(gm, both, "extended") is None
    assert judged(both, gm, "reduced") is None
    assert "output 'y'" in judged(gm, spoiled(both, torch.ops.aten.mul.Tensor, 3), "extended")
    assert "output 'y'" in judged(both, spoiled(gm, torch.ops.aten.mul.Tensor, 3), "reduced")


def test_graph_whose_interface_must_stay_is_refused_if_it_does_not():
    gm = by_position()
    assert "cannot run" in judged(gm, extended(gm), "kept")


def test_later_passes_are_compared_with_the_extended_graph():
    class Extend(Pass):
        name = "extend"
        interface = "extended"

        def run(self, rw: Rewriter) -> None:
            x = next(node for node in rw.gm.graph.nodes if node.op == "placeholder")
            more = rw.add_argument("more", x.meta["val"].clone(), [X], why="")
            rw.set_outputs({"output": output_tree(rw.gm), "more": more}, rw.gm.output_names, why="")

    def spoil(module: torch.fx.GraphModule) -> None:
        output = module.graph.output_node()
        results = list(output.args[0])
        results[-1] = results[0]
        output.args = (tuple(results),)

    result = fxopt.optimize(by_position(), passes=[Extend(), spoil])
    assert [step.status for step in result.report.steps] == ["changed", "rolled back"]
    assert "output 'more_'" in result.report.steps[1].rolled_back[0].why


def test_size_that_the_trace_found_to_be_a_number_is_one():
    auto = torch.export.Dim.AUTO
    gm = fxopt.capture(lambda x: x.view(3, 2) + 1, (X,), dynamic_shapes=({0: auto},))
    assert gm.inputs[0].shape == (3, 2)
    with pytest.raises(fxopt.InputError, match="size 4 instead of 3"):
        gm(torch.zeros(4, 2))
