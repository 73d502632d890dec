"""A planted wrong rewrite is cut out of the model: few nodes, the same error, only the tensors that they read."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.contracts import Contract
from fxopt.reduce import difference, reduce, size_in_nodes
from tests.bench.synthetic_graph import build
from tests.core.planted import Spoil, bisected, check_is_minimal, graph_of, is_float, residual_net
from tests.models.sequence import FrameworkEncoder, MaskedEncoder

aten = torch.ops.aten


@pytest.fixture(scope="module")
def resnet():
    return residual_net()


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    net = FrameworkEncoder().eval()
    example = net.example()
    return fxopt.capture(net, example.args, dynamic_shapes=example.dynamic_shapes)


@pytest.mark.parametrize(
    ("wrong", "behind", "value"),
    [
        ("conv2d_7", False, "conv2d_7"),
        ("batch_norm_5", False, "add_2"),  # a batch norm stays, for its statistics
        ("relu_4", True, "conv2d_5"),  # a residual: two calls read it
        ("add_2", True, "relu_6"),
    ],
)
def test_one_place_of_a_residual_net(resnet, wrong, behind, value):
    cut = check_is_minimal(bisected(resnet, wrong, behind=behind), most=3)
    assert (cut.value, cut.note) == (value, "")


@pytest.mark.slow
def test_places_of_a_transformer(transformer):
    wrong = [node.name for node in transformer.graph.nodes if is_float(node)]
    names = [name for name in wrong if "attention" in name or "linear" in name or "norm" in name or "gelu" in name]
    assert len(names) > 8
    for name in names[::5]:
        check_is_minimal(bisected(transformer, name))


def test_mask_and_dynamic_length():
    torch.manual_seed(0)
    net = MaskedEncoder().eval()
    example = net.example()
    gm = fxopt.capture(net, example.args, dynamic_shapes=example.dynamic_shapes)
    name = next(node.name for node in gm.graph.nodes if node.target is aten.scaled_dot_product_attention.default)
    check_is_minimal(bisected(gm, name))


def test_dynamic_sizes_stay_dynamic(resnet):
    cut = bisected(resnet, "relu_4").reduced
    assert list(cut.after.dims) == ["batch"]
    (x,) = cut.after.samples[0].args
    assert cut.after(x.repeat(3, 1, 1, 1)).shape[0] == 6


def test_results_of_one_call_are_cut_with_it():
    def forward(x):
        a, b = torch.sin(x).split(2, dim=1)
        values, places = torch.relu(a * b).topk(1, dim=1)
        return torch.cos(values) + places.float()

    gm = graph_of(forward, torch.rand(3, 4))
    part = next(node.name for node in gm.graph.nodes if str(node.target) == "<built-in function getitem>")
    assert check_is_minimal(bisected(gm, part), most=4).value == part
    assert check_is_minimal(bisected(gm, "relu"), most=3).value == "relu"


def test_a_value_that_is_meant_to_differ_is_no_end():
    """The factor behind a linear goes into its weight, wrongly: the linear itself yields something else on purpose."""

    @dataclasses.dataclass(frozen=True)
    class FoldFactor(fxopt.Pass):
        name: ClassVar[str] = "fold-factor"

        def run(self, rw):
            for factor in rw.calls(aten.mul.Tensor):
                linear = factor.args[0]
                weight = linear.args[1]
                rw.set_tensor(weight, rw.tensor(weight).detach() * 3.1, why="folded")
                rw.replace_value(factor, linear, why="folded")

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(torch.tanh(torch.sigmoid(self.first(torch.cos(x)) * 3.0)))

    found = fxopt.bisect(graph_of(Scaled, torch.randn(2, 4)), [FoldFactor()])
    assert found.reduced.value == "sigmoid"
    assert check_is_minimal(found, most=3).note == ""


def test_a_tied_weight_ends_at_its_first_reader():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(5):
                x = torch.tanh(self.linear(x))
            return x

    @dataclasses.dataclass(frozen=True)
    class Retouch(fxopt.Pass):
        name: ClassVar[str] = "retouch"

        def run(self, rw):
            for call in list(rw.calls(aten.linear.default))[:1]:
                rw.set_tensor(call.args[1], rw.tensor(call.args[1]).detach() * 1.1, why="planted")

    cut = fxopt.bisect(graph_of(Tied, torch.randn(2, 4)), [Retouch()]).reduced
    assert (cut.value, cut.nodes) == ("linear", 1)


def test_the_body_of_a_branch_stays_whole():
    def forward(x):
        x = torch.sigmoid(torch.tanh(x))
        if x.sum() > 0:
            y = torch.sin(torch.cos(x))
        else:
            y = torch.relu(x)
        return torch.exp(torch.sin(y))

    gm = graph_of(forward, torch.rand(3, 4) + 1)
    body = next(node.target for node in gm.graph.nodes if node.op == "get_attr")
    inner = next(node.name for node in getattr(gm, body).graph.nodes if node.target is aten.cos.default)

    @dataclasses.dataclass(frozen=True)
    class InBranch(fxopt.Pass):
        name: ClassVar[str] = "in-branch"

        def run(self, rw):
            for node in rw.calls(aten.cos.default):
                assert node.name == inner
                rw.replace_call(node, aten.tan.default, node.args, why="planted")

    found = fxopt.bisect(gm, [InBranch()])
    cut = check_is_minimal(found, most=6)
    assert cut.note == "the rewrite is inside a branch or a loop, which is kept whole"
    assert not any(node.target is aten.exp.default for node in cut.after.graph.nodes)
    assert bisected(gm, "sigmoid").reduced.note == ""  # before the branch


def test_a_value_that_agrees_by_chance_is_as_good_as_one_that_the_rewrite_does_not_reach():
    def forward(x):
        y = torch.sigmoid(x)
        return torch.tanh(torch.relu(y - 5.0) + torch.exp(torch.sin(y)))

    gm = graph_of(forward, torch.rand(4))
    cut = reduce(gm, Spoil(wrong=("sigmoid", "exp"))(gm).gm)
    assert (cut.value, cut.nodes, cut.note) == ("exp", 5, "")  # of what follows, only the relu is reached otherwise
    cut = reduce(gm, Spoil(wrong=("sigmoid", "add"))(gm).gm)
    assert (cut.value, [spec.name for spec in cut.after.inputs]) == ("add", ["x", "relu"])  # the relu is 0 in both


@pytest.fixture(scope="module")
def synthetic():
    return build(80).eval()


@settings(max_examples=12)
@given(data=st.data())
def test_any_planted_fault_is_cut_out(synthetic, data):
    live = [node for node in synthetic.graph.nodes if is_float(node) and reaches_output(node)]
    wrong = data.draw(st.sampled_from([node.name for node in live]))
    behind, factor = data.draw(st.booleans()), data.draw(st.sampled_from([1.001, 0.5, -1.0, 3.0]))
    after = Spoil(wrong=(wrong,), factor=factor, behind=behind)(synthetic).gm
    cut = reduce(synthetic, after)
    for part, whole in ((cut.before, synthetic), (cut.after, after)):
        assert size_in_nodes(part) <= size_in_nodes(whole)
    told = difference(synthetic, after, Contract.ROUNDING)
    assert (cut.contract is None) <= (told is None)
    if cut.contract is not None:
        assert difference(cut.before, cut.after, Contract.ROUNDING) is not None
        assert cut.nodes <= 12


def reaches_output(node):
    seen, waiting = {node}, [node]
    while waiting:
        users = set(waiting.pop().users) - seen
        seen |= users
        waiting += users
    return any(each.op == "output" for each in seen)
