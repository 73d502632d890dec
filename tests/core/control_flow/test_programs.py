"""Programs with branches and loops on tensor values: one graph that equals eager on every way, trains, and exports."""

from __future__ import annotations

import copy
import gc
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fxopt
from fxopt.graph_module import graph_modules
from fxopt.regions import COND, WHILE_LOOP
from tests.core.control_flow.once import captured_once
from tests.models.control_flow import PROGRAMS

# Programs that read the value of a trained tensor, which torch warns of when it runs them.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")

SEEDS = 45  # every scale with every batch size, several times
STATEFUL = {"counts in a buffer"}
LONG = {  # whose statements others have too
    "if else", "chained comparison", "while with a counter", "for in range(a, t, 2)", "halting recurrence",
    "three submodules", "bool of a tensor", "comparisons of scalars", "walrus and allclose", "newton",
}  # fmt: skip


def programs(but: Collection[str] = ()) -> list[Any]:
    """Return the names of all programs, those that others cover marked as slow."""
    names = [name for name in PROGRAMS if name not in but]
    return [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in names]


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    made = PROGRAMS[name].make()
    return made.eval() if isinstance(made, torch.nn.Module) else made


def captured(name: str, model: Any) -> fxopt.CapturedModule:
    program = PROGRAMS[name]
    return fxopt.capture(model, program.inputs(0), dynamic_shapes=program.dynamic_shapes)


@captured_once
def graph_of(name: str) -> fxopt.CapturedModule:
    """Return a graph of ``model_of(name)``."""
    return captured(name, model_of(name))


def same(a: Any, b: Any) -> bool:
    """Return whether two outputs are equal: tensors bit for bit, numbers in type and value."""
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def control_flow(gm: fxopt.CapturedModule) -> list[Any]:
    nodes = [node for module in graph_modules(gm) for node in module.graph.nodes]
    return [node for node in nodes if node.target in (COND, WHILE_LOOP)]


@pytest.mark.parametrize("name", programs())
def test_graph_equals_eager_bit_for_bit_on_every_way(name: str) -> None:
    model = model_of(name)
    gm = graph_of(name)
    assert control_flow(gm)
    distinct = set()
    for seed in range(SEEDS):
        inputs = PROGRAMS[name].inputs(seed)
        want = pytree.tree_leaves(model(*inputs))
        got = pytree.tree_leaves(gm(*inputs))
        assert all(same(a, b) for a, b in zip(want, got, strict=True)), f"seed {seed}"
        distinct.add(float(want[0].double().sum()))
    assert len(distinct) > 10


@pytest.mark.parametrize("name", programs())
def test_torch_export_refuses_what_is_captured_here(name: str) -> None:
    program = PROGRAMS[name]
    model, shapes = model_of(name), {0: torch.export.Dim("batch")}
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever it raises; that it cannot is the point)
        torch.export.export(
            model, program.inputs(0), dynamic_shapes=(shapes, *[None] * (len(program.inputs(0)) - 1)), strict=False
        )


@pytest.mark.parametrize("name", programs())
def test_gradients_are_those_of_the_way_taken(name: str) -> None:
    model = model_of(name)
    if not list(model.parameters()) or name == "decoding loop":
        pytest.skip("nothing to train")
    gm = graph_of(name)
    for seed in range(9):
        inputs = PROGRAMS[name].inputs(seed)
        for net in (model, gm):
            net.zero_grad()
            differentiable = [leaf.sum() for leaf in pytree.tree_leaves(net(*inputs)) if leaf.requires_grad]
            if differentiable:  # a way without any layer has none
                torch.stack(differentiable).sum().backward()
        for (key, want), (_, got) in zip(model.named_parameters(), gm.named_parameters(), strict=True):
            assert (want.grad is None) == (got.grad is None), key
            assert want.grad is None or torch.equal(want.grad, got.grad), key


@pytest.mark.ort
@pytest.mark.parametrize("name", programs(STATEFUL))
def test_onnx_runtime_takes_the_same_ways(name: str, tmp_path: Any) -> None:
    from fxopt.export import Session, to_onnx

    model = model_of(name)
    gm = graph_of(name)
    file = to_onnx(gm, tmp_path / "program.onnx")
    assert file.validation is not None
    sessions = [Session(tmp_path / "program.onnx", optimization=level) for level in ("none", "all")]
    for seed in range(SEEDS):
        inputs = PROGRAMS[name].inputs(seed)
        want = pytree.tree_leaves(model(*inputs))
        for session in sessions:
            got = session.run([leaf for leaf in inputs if isinstance(leaf, torch.Tensor)])
            for a, b in zip(want, got, strict=True):
                a = a if isinstance(a, torch.Tensor) else torch.tensor(a)
                torch.testing.assert_close(
                    b, a, rtol=1e-4, atol=1e-5, msg=lambda text, seed=seed: f"seed {seed}: {text}"
                )


def test_textbook_net_trains_as_in_eager_through_both_sides() -> None:
    model = model_of("textbook").train()
    gm = captured("textbook", copy.deepcopy(model)).train()
    losses = []
    for net in (model, gm):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses.append([])
        for seed in range(20):
            (x,) = PROGRAMS["textbook"].inputs(seed)
            loss = (net(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), gm.parameters(), strict=True))


@pytest.mark.ort
def test_textbook_net_in_onnx_runtime_on_a_thousand_inputs(tmp_path: Any) -> None:
    from fxopt.export import Session, to_onnx

    model = model_of("textbook")
    for seed in range(20):  # train it first, through both sides
        (x,) = PROGRAMS["textbook"].inputs(seed)
        model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    to_onnx(captured("textbook", model), tmp_path / "net.onnx")
    sessions = [Session(tmp_path / "net.onnx", optimization=level) for level in ("none", "all")]
    generator = torch.Generator().manual_seed(0)
    taken = {True: 0, False: 0}
    for number in range(1000):
        scale = 10 ** float(torch.empty(()).uniform_(-2, 1, generator=generator))
        x = torch.randn((1, 3, 8)[number % 3], 10, generator=generator) * scale
        taken[bool(x.norm() > 1)] += 1
        for session in sessions:
            torch.testing.assert_close(session.run([x])[0], model(x), rtol=1e-5, atol=1e-6)
    assert min(taken.values()) > 200


def test_statistics_and_dropout_follow_the_side_taken_in_training() -> None:
    model = model_of("dropout on one side").train()
    gm = captured("dropout on one side", copy.deepcopy(model)).train()
    for seed in range(12):
        (x,) = PROGRAMS["dropout on one side"].inputs(seed)
        outputs = []
        for net in (model, gm):
            torch.manual_seed(seed)
            outputs.append(net(x))
        assert torch.equal(*outputs)
    for (key, want), (_, got) in zip(model.named_buffers(), gm.named_buffers(), strict=True):
        assert torch.equal(want, got), key


@pytest.mark.parametrize("name", ["batch norm on one side", "dropout on one side"])
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_one_graph_serves_both_modes(name: str, training: bool) -> None:
    model = model_of(name).train(training)
    gm = captured(name, copy.deepcopy(model))
    assert gm.modes == "both"
    for seed in range(24):
        (x,) = PROGRAMS[name].inputs(seed)
        outputs = []
        for net in (model, gm):
            net.train(seed % 3 != 0)
            torch.manual_seed(seed)
            outputs.append(net(x))
        assert torch.equal(*outputs)
    for (key, want), (_, got) in zip(model.named_buffers(), gm.named_buffers(), strict=True):
        assert torch.equal(want, got), key


def test_buffer_written_on_one_side_counts_that_side() -> None:
    model = model_of("counts in a buffer")
    gm = graph_of("counts in a buffer")
    for seed in range(10):
        (x,) = PROGRAMS["counts in a buffer"].inputs(seed)
        assert torch.equal(model(x), gm(x))
    assert 0 < float(gm.taken) < 10
    assert torch.equal(model.taken, gm.taken)


def test_every_branch_knows_its_line() -> None:
    gm = graph_of("helper function")
    lines = [fxopt.source_line(node) for node in control_flow(gm)]
    assert len(lines) == 2
    assert all("branching.py" in line and "in helper_scaled: if size > limit:" in line for line in lines)


def test_saved_graph_branches_in_a_fresh_object(tmp_path: Any) -> None:
    for name in ("elif", "while with a counter", "loops in a loop"):
        gm = graph_of(name)
        fxopt.save(gm, tmp_path / "net.fxopt")
        loaded = fxopt.load(tmp_path / "net.fxopt")
        for copy_ in (loaded, copy.deepcopy(gm), gm.clone()):
            for seed in range(6):
                inputs = PROGRAMS[name].inputs(seed)
                got, want = pytree.tree_leaves(copy_(*inputs)), pytree.tree_leaves(gm(*inputs))
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "name", ["elif", "early return", "for in range(int(t))", "writes in place", "mixture of experts"]
)
def test_cleanup_passes_keep_every_way(name: str) -> None:
    model = model_of(name)
    program = PROGRAMS[name]
    samples = [program.inputs(seed) for seed in (0, 1)]
    small = fxopt.optimize(fxopt.capture(model, samples[0], dynamic_shapes=program.dynamic_shapes), strict=True)
    for seed in range(SEEDS):
        inputs = program.inputs(seed)
        assert torch.equal(model(*inputs), small(*inputs))


def test_model_is_left_as_it_was() -> None:
    model = model_of("sets an attribute")
    code = type(model).forward.__code__
    captured("sets an attribute", model)
    assert type(model).forward.__code__ is code
    assert "__fxopt__" not in type(model).forward.__globals__
    assert type(model.last) is torch.Tensor  # what eager left there, not what the trace did


def test_functions_of_a_program_that_froze_its_objects_are_found() -> None:
    """Programs that serve models call gc.freeze(), and gc.get_referrers tells nothing of what is frozen."""
    model = model_of("textbook")
    gc.collect()
    gc.freeze()
    try:
        gm = captured("textbook", model)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert control_flow(gm)
