"""``torch.cond`` and ``torch.while_loop`` in a model's code: captured as the ``if`` and ``while`` they stand for."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, cond, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.utils import _pytree as pytree

import fxopt
from fxopt.eager_control_flow import observing
from fxopt.graph_module import graph_modules
from fxopt.regions import COND, WHILE_LOOP
from tests.core.control_flow.once import captured_once
from tests.models.control_flow import batched

# torch's own cond looks at the gradients of what is in a closure when it runs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SEEDS = 12  # every scale with every batch size, twice
BATCH = ({0: "batch"},)
X = torch.linspace(-2, 2, 20).reshape(2, 10)


class Two(nn.Module):
    """Two layers, a dropout and a batch norm to choose between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(10, 10), nn.Linear(10, 10)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(10)
        self.limit = nn.Buffer(torch.tensor(0.5))


class Plain(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: self.other(x), (x,))


class PlainInPython(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.other(x)


class Modules(Two):
    """Modules, bound methods and partial functions in the place of functions; the operator by another name."""

    def scaled(self, x: Tensor, *, by: float) -> Tensor:
        return self.other(x) * by

    def forward(self, x: Tensor) -> Tensor:
        y = cond(x.sum() > 0, self.layer, functools.partial(self.scaled, by=2.0), (x,))
        return cond(y.mean() > self.limit, self.norm, self.drop, (y * 1,))


class OuterTensor(Two):
    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.layer(x), x.std()
        return torch.cond(x.sum() > 0, lambda t: y * scale + t, lambda t: self.other(t) - y, (x,)) + y


class Nested(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)

        def inner(t: Tensor) -> Tensor:
            return torch.cond(t.max() > 1, lambda u: self.other(u) + y, lambda u: u * y, (t,))

        return torch.cond(x.sum() > 0, inner, lambda t: inner(-t) - y, (x,))


class InPythonIf(Two):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            y = torch.cond(x.max() > 1, self.layer, self.other, (x,))
        elif x.max() > 0.2:
            y = x * 2
        else:
            return torch.cond(x.mean() > -0.1, lambda x: x + self.limit, lambda x: x - self.limit, (x,))
        return y + 1


class SizeDecides(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.shape[0] > 2, lambda t: self.layer(t), lambda t: self.other(t) + 1, (x,))


class Structured(Two):
    def forward(self, x: Tensor) -> Any:
        def side(t: dict[str, Tensor]) -> Any:
            return {"a": self.layer(t["x"]), "b": [t["x"].sum(0), t["y"] + 1]}

        def other(t: dict[str, Tensor]) -> Any:
            return {"a": self.other(t["x"]), "b": [t["x"].mean(0), t["y"] * 2]}

        return torch.cond(x.sum() > 0, side, other, ({"x": x, "y": x.max()},))


class KnownPredicate(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.ndim == 2, self.layer, self.other, (x,))
        return torch.cond(y.sum() > 0, self.other, self.layer, (y,))


class Loop(Two):
    def forward(self, x: Tensor) -> Any:
        turns = x.abs().sum().long() % 4
        return while_loop(lambda i, t: i < turns, lambda i, t: (i + 1, self.layer(t)), (torch.tensor(0), x))


class LoopOnValues(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x)
        (t,) = while_loop(lambda t: t.abs().max() > self.limit, lambda t: (t / 2 + y * 0.01,), (x,))
        return t


class LoopOfNumbers(Two):
    def forward(self, x: Tensor) -> Any:
        return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, self.layer(t) * i), (0, x))


class LoopOfContainers(Two):
    def forward(self, x: Tensor) -> Any:
        start = (torch.tensor(0), {"x": x, "sum": x.sum()})

        def turn(i: Tensor, c: dict[str, Tensor]) -> Any:
            return i + 1, {"x": self.layer(c["x"]), "sum": c["sum"] + c["x"].sum()}

        return while_loop(lambda i, c: (i < 4) & (c["sum"] < 9), turn, start)


class BranchInLoop(Two):
    def forward(self, x: Tensor) -> Any:
        def turn(i: Tensor, t: Tensor) -> Any:
            return i + 1, torch.cond(t.sum() > i, self.layer, lambda t: self.other(t) * 2, (t,))

        return while_loop(lambda i, t: i < 3, turn, (torch.tensor(0), x))


class LoopInBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        def side(t: Tensor) -> Tensor:
            return while_loop(lambda i, t: i < 2, lambda i, t: (i + 1, self.layer(t)), (torch.tensor(0), t))[1]

        return torch.cond(x.sum() > 0, side, self.other, (x,))


PROGRAMS: dict[str, type[Two]] = {
    "closures over modules": Plain,
    "modules and bound methods": Modules,
    "closures over traced tensors": OuterTensor,
    "cond in cond": Nested,
    "cond in a Python if": InPythonIf,
    "a size decides": SizeDecides,
    "dicts in and out": Structured,
    "a predicate that is known": KnownPredicate,
    "while_loop": Loop,
    "while_loop on values": LoopOnValues,
    "while_loop of a number": LoopOfNumbers,
    "while_loop of containers": LoopOfContainers,
    "cond in while_loop": BranchInLoop,
    "while_loop in cond": LoopInBranch,
}


def model_of(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = cls().eval()
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]:
        torch.nn.init.normal_(norm.running_mean)
    return model


@captured_once
def graph_of(name: str) -> fxopt.CapturedModule:
    """Return a graph of ``model_of(PROGRAMS[name])``."""
    return fxopt.capture(model_of(PROGRAMS[name]), batched(0), dynamic_shapes=BATCH)


def control_flow(gm: fxopt.CapturedModule) -> list[Any]:
    nodes = [node for module in graph_modules(gm) for node in module.graph.nodes]
    return [node for node in nodes if node.target in (COND, WHILE_LOOP)]


def assert_equal(got: Any, want: Any) -> None:
    """Compare outputs bit for bit, structure and types of numbers included."""
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else (type(a), a) == (type(b), b)


@pytest.mark.parametrize("name", PROGRAMS)
@torch.no_grad()
def test_graph_equals_eager_bit_for_bit_on_every_side(name: str) -> None:
    model, gm = model_of(PROGRAMS[name]), graph_of(name)
    assert control_flow(gm)
    taken: set[tuple[int, bool]] = set()
    for seed in range(SEEDS):
        (x,) = batched(seed)
        want = model(x)
        with observing(lambda side, answer: taken.add((id(side), answer))):
            assert_equal(gm(x), want)
    branches = [node for node in control_flow(gm) if node.target is COND]
    assert {answer for _, answer in taken} == ({True, False} if branches else set())


@pytest.mark.ort
@pytest.mark.parametrize("name", PROGRAMS)
@torch.no_grad()
def test_onnx_runtime_takes_the_same_sides(name: str, tmp_path: Any) -> None:
    from fxopt.export import Session, to_onnx

    model = model_of(PROGRAMS[name])
    to_onnx(graph_of(name), tmp_path / "program.onnx")
    sessions = [Session(tmp_path / "program.onnx", optimization=level) for level in ("none", "all")]
    for seed in range(SEEDS):
        (x,) = batched(seed)
        want = [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(model(x))]
        for session in sessions:
            for a, b in zip(session.run([x]), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_graph_is_that_of_the_python_form() -> None:
    graphs = [fxopt.capture(model_of(cls), X, dynamic_shapes=BATCH) for cls in (Plain, PlainInPython)]
    first, second = (fxopt.graph_text(gm) for gm in graphs)
    assert first == second
    assert "true_graph_0" in first


def test_branch_knows_the_line_of_its_call() -> None:
    (node,) = control_flow(fxopt.capture(model_of(Plain), X))
    assert "test_operators.py" in (fxopt.source_line(node) or "")
    assert "in forward: return torch.cond(x.sum() > 0, lambda x: self.layer(x)" in (fxopt.source_line(node) or "")


@pytest.mark.parametrize("name", ["closures over modules", "closures over traced tensors", "cond in cond"])
def test_gradients_are_those_of_eager(name: str) -> None:
    model, gm = model_of(PROGRAMS[name]), graph_of(name)
    for seed in range(4):
        for net in (model, gm):
            net.zero_grad()
            net(*batched(seed)).square().sum().backward()
        for (key, want), (_, got) in zip(model.named_parameters(), gm.named_parameters(), strict=True):
            # torch gives zeros to the side that is not taken.
            zeros = torch.zeros_like(want)
            a, b = (zeros if tensor.grad is None else tensor.grad for tensor in (got, want))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)


class Dropped(Two):
    """Layers with two modes on both sides, in a function that has the flag in its closure."""

    def forward(self, x: Tensor) -> Tensor:
        training = self.training

        def side(t: Tensor) -> Tensor:
            return F.dropout(t, 0.5, training) * 1

        return torch.cond(x.sum() > 0, side, lambda t: self.drop(self.layer(t)), (x,))


class Normed(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda t: self.norm(self.layer(t)), lambda t: self.drop(t) * 2, (x,))
        if y.max() > 1:
            y = torch.cond(y.min() < -1, lambda t: self.drop(self.other(t)), lambda t: self.norm(t) + x, (y,))
        return y


class DroppedInLoop(Two):
    def forward(self, x: Tensor) -> Any:
        return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, self.drop(self.layer(t))), (torch.tensor(0), x))


@pytest.mark.parametrize("cls", [Dropped, Normed, DroppedInLoop])
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
@torch.no_grad()  # torch runs batch norm on one side without gradients only
def test_one_graph_serves_both_modes(cls: type[Two], training: bool) -> None:
    model = model_of(cls).train(training)
    gm = fxopt.capture(copy.deepcopy(model), batched(0), dynamic_shapes=BATCH)
    assert gm.modes == "both", gm.modes_reason
    for seed in range(SEEDS):
        outputs = []
        for net in (model, gm):
            net.train(seed % 3 != 0)
            torch.manual_seed(seed)
            outputs.append(net(*batched(seed)))
        assert_equal(outputs[1], outputs[0])
    buffers = dict(gm.named_buffers())
    for key, want in model.named_buffers():
        assert torch.equal(want, buffers[key]), key
