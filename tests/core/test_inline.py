import pytest
import torch
from torch import nn

import fxopt
from fxopt.checks import verify
from fxopt.export import to_onnx
from fxopt.graph_module import graph_modules
from fxopt.inline import inline
from fxopt.interface import output_tree
from fxopt.rewriter import Rewriter

BATCH = {0: "batch"}


def host(dynamic: bool = True, width: int = 4) -> fxopt.CapturedModule:
    """Return x to tanh(x), [batch, width]."""
    return fxopt.capture(nn.Tanh(), (torch.randn(3, width),), dynamic_shapes=(BATCH,) if dynamic else None)


def inner(model, *inputs, dynamic: bool = True) -> fxopt.CapturedModule:
    """Capture the graph to be inlined."""
    shapes = tuple(BATCH for _ in inputs) if dynamic else None
    return fxopt.capture(model.eval() if isinstance(model, nn.Module) else model, inputs, dynamic_shapes=shapes)


def joined(outer: fxopt.CapturedModule, graph: fxopt.CapturedModule, *values: str, **options) -> fxopt.CapturedModule:
    """Return ``outer`` with one more output: that of ``graph``, run on its values of these names."""
    rw = Rewriter(outer.clone(), "join")
    output = rw.gm.graph.output_node()
    nodes = {node.name: node for node in rw.gm.graph.nodes}
    arguments = dict(zip((spec.name for spec in graph.inputs), (nodes[name] for name in values), strict=True))
    found = inline(rw, graph, arguments, before=output, prefix="part", why="to test it", **options)
    rw.set_outputs({"old": output_tree(rw.gm), "new": found.outputs[0]}, outer.output_names, why="to test it")
    rw.finish()
    verify(rw.gm)
    return rw.gm


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(4, 2), nn.Linear(4, 2)
        self.register_buffer("limit", torch.tensor(0.0))

    def forward(self, x):
        if x.sum() > self.limit:
            return self.small(x)
        return self.large(x * 2)


def halving(x):
    while x.abs().max() > 0.1:
        x = x / 2
    return x


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.second(self.first(x)) + self.shift


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 2), Branching(), halving, Tied()], ids=["linear", "cond", "while", "tied"]
)
def test_inlined_graph_computes_what_it_did_at_every_size(model):
    graph = joined(host(), inner(model, torch.randn(3, 4)), "tanh")
    for count in (1, 2, 5):
        for sign in (1, -1):
            x = torch.rand(count, 4) * sign
            found = graph(x)
            torch.testing.assert_close(found["old"], torch.tanh(x), rtol=0, atol=0)
            torch.testing.assert_close(found["new"], model(torch.tanh(x)), rtol=0, atol=0)


@pytest.mark.parametrize("model", [Branching(), halving], ids=["cond", "while"])
def test_sizes_are_those_of_the_graph_around(model):
    graph = joined(host(), inner(model, torch.randn(3, 4)), "tanh")
    (symbol,) = {dimension.symbol for dimension in graph.dims.values()}
    values = [node.meta.get("val") for module in graph_modules(graph) for node in module.graph.nodes]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    assert {str(size) for size in sizes if not isinstance(size, int)} == {symbol}


@pytest.mark.parametrize("model", [Branching(), halving, Tied()], ids=["cond", "while", "tied"])
def test_inlined_graph_is_saved_and_copied(model, tmp_path):
    graph = joined(host(), inner(model, torch.randn(3, 4)), "tanh")
    fxopt.save(graph, tmp_path / "graph.fxopt")
    x = torch.randn(2, 4)
    for other in (fxopt.load(tmp_path / "graph.fxopt"), graph.clone(copy_tensors=True)):
        torch.testing.assert_close(other(x)["new"], graph(x)["new"], rtol=0, atol=0)


@pytest.mark.ort
def test_inlined_branch_is_exported(tmp_path):
    to_onnx(joined(host(), inner(Branching(), torch.randn(3, 4)), "tanh"), tmp_path / "graph.onnx")


def test_tensors_stay_the_same_objects_and_tied_ones_are_one_attribute():
    model = Tied()
    graph = joined(host(), inner(model, torch.randn(3, 4)), "tanh")
    names = [name for name, p in graph.named_parameters(remove_duplicate=False) if p is model.first.weight]
    assert names in (["part.first.weight"], ["part.second.weight"])
    assert "part.shift" not in graph.state_dict()
    assert graph.get_buffer("part.shift") is model.shift


def test_gradients_flow_into_inlined_branches():
    model = Branching()
    graph = joined(host(), inner(model, torch.randn(3, 4)), "tanh")
    graph(torch.ones(2, 4))["new"].sum().backward()
    assert model.small.weight.grad is not None
    assert model.large.weight.grad is None


def test_names_do_not_clash():
    graph = inner(nn.Linear(4, 4), torch.randn(3, 4))
    twice = joined(joined(host(), graph, "tanh"), graph, "part_linear", tensors="part")
    assert {name for name, _ in twice.named_parameters(remove_duplicate=False)} == {
        "part.weight",
        "part.bias",
        "part.weight_1",
        "part.bias_1",
    }
    assert "part_linear_1" in {node.name for node in twice.graph.nodes}


def test_nodes_keep_their_line_module_and_origin():
    graph = joined(host(), inner(Branching(), torch.randn(3, 4)), "tanh")
    node = next(node for node in graph.graph.nodes if node.name == "part_sum_1")
    assert fxopt.source_line(node).startswith("test_inline.py:")
    assert fxopt.module_path(node) == "part"
    assert node.meta["fxopt"] == fxopt.Provenance("join", ("sum_1",))


def test_the_inlined_graph_is_left_alone():
    graph = inner(Branching(), torch.randn(3, 4))
    before = fxopt.graph_text(graph)
    joined(host(), graph, "tanh")
    joined(host(False), graph, "tanh")
    assert fxopt.graph_text(graph) == before


def add(a, b):
    return a + b


def sine(x):
    return x.sin()


def two_sizes() -> fxopt.CapturedModule:
    inputs = torch.randn(3, 4), torch.randn(5, 4)
    return fxopt.capture(lambda x, y: (x * 2, y * 2), inputs, dynamic_shapes=({0: "n"}, {0: "m"}))


def at_sizes(count: int, sizes: str) -> fxopt.CapturedModule:
    return fxopt.capture(sine, (torch.randn(count, 4),), dynamic_shapes=({0: sizes},))


@pytest.mark.parametrize(
    ("outer", "graph", "values", "message"),
    [
        (host, lambda: inner(sine, torch.randn(3, 4), dynamic=False), ["tanh"], "a dynamic size instead of 3"),
        (host, lambda: inner(sine, torch.randn(3, 5)), ["tanh"], "size 4 instead of 5"),
        (host, lambda: inner(sine, torch.randn(3, 4).double()), ["tanh"], "another element type"),
        (host, lambda: inner(sine, torch.randn(3, 4, 2)), ["tanh"], "rank 2 instead of 3"),
        (host, lambda: at_sizes(3, "batch<=8"), ["tanh"], "batch is wider than batch<=8"),
        (lambda: host(False), lambda: at_sizes(4, "4<=n<=8"), ["tanh"], "3 is outside 4<=n<=8"),
        (
            two_sizes,
            lambda: inner(add, torch.randn(3, 4), torch.randn(3, 4)),
            ["mul", "mul_1"],
            "batch is .* in one place and .* in another",
        ),
    ],
    ids=["static", "size", "dtype", "rank", "range", "bounds", "two"],
)
def test_argument_that_does_not_fit_is_refused(outer, graph, values, message):
    with pytest.raises(fxopt.PassError, match=f"does not fit input '.*': .*{message}"):
        joined(outer(), graph(), *values)


def test_call_that_runs_graphs_of_its_own_is_refused():
    from functorch.experimental.control_flow import map as torch_map

    def scan(x):
        return torch_map(lambda row: row.sin(), x)

    with pytest.raises(fxopt.PassError, match=r"cannot take a call of map.* into another graph"):
        joined(host(False), fxopt.capture(scan, (torch.randn(3, 4),)), "tanh")
