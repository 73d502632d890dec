"""Attention of several heads becomes one call: the same numbers, the same gradients, one kernel of ORT."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxopt
from fxopt.attention_ops import MULTI_HEAD_ATTENTION
from fxopt.export import to_onnx
from fxopt.export.session import Session
from fxopt.passes import FuseAttention
from fxopt.testing import check_pass

N, L, S, HEADS, E = 3, 5, 7, 4, 8
X, MEMORY = torch.randn(N, L, HEADS * E), torch.randn(N, S, HEADS * E)
SEEN = torch.rand(N, 1, L, S) > 0.3
SEEN[1, 0, 2] = False  # a query that sees nothing


class Attention(nn.Module):
    """Attention as models write it."""

    def __init__(self, *, width=HEADS * E, back="reshape", **options):
        super().__init__()
        self.query, self.key = nn.Linear(HEADS * E, HEADS * E), nn.Linear(HEADS * E, HEADS * E)
        self.value, self.out = nn.Linear(HEADS * E, width), nn.Linear(width, 6)
        self.back, self.options = back, options

    def forward(self, x, memory, mask=None):
        def split(y):
            return y.view(y.shape[0], y.shape[1], HEADS, -1).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(memory)), split(self.value(memory))
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        if self.back == "reshape":
            return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        if self.back == "flatten":
            return self.out(y.permute(0, 2, 1, 3).contiguous().flatten(2))
        if self.back == "twice":
            return self.out(y.transpose(1, 2).flatten(2) + y.mean())
        return self.out(y.transpose(0, 1).reshape(*x.shape[:2], -1))


DYNAMIC = {"x": {0: "batch", 1: "rows"}, "memory": {0: "batch", 1: "columns"}}


def captured(model, *inputs, dynamic=True):
    shapes = dict(DYNAMIC) if dynamic else {}
    if dynamic and len(inputs) == 3:
        sizes = {0: "batch", 2: "rows", 3: "columns"} if inputs[2].ndim == 4 else {0: "rows", 1: "columns"}
        shapes["mask"] = {axis: name for axis, name in sizes.items() if inputs[2].shape[axis] > 1}
    return fxopt.capture(model.eval(), inputs, dynamic_shapes=shapes or None)


def fused(gm):
    found = FuseAttention()(gm)
    assert found.modified, found.skips
    found.gm.recompile()
    return found.gm


CASES = {
    "no mask": (Attention(), (X, MEMORY)),
    "scale": (Attention(scale=0.3, back="flatten"), (X, MEMORY)),
    "causal": (Attention(is_causal=True), (X, MEMORY)),
    "values of another width": (Attention(width=24), (X, MEMORY)),
    "bool": (Attention(), (X, MEMORY, SEEN)),
    "bool, one row": (Attention(), (X, MEMORY, SEEN[:, :, 1:2])),
    "bool of two axes": (Attention(), (X, MEMORY, SEEN[1, 0])),
    "floats": (Attention(), (X, MEMORY, torch.randn(N, 1, L, S))),
    "infinite floats": (Attention(), (X, MEMORY, torch.zeros(N, 1, L, S).masked_fill(~SEEN, -torch.inf))),
}


@pytest.mark.parametrize(("model", "inputs"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
def test_the_same_numbers_in_eager_and_in_ort(model, inputs, dynamic):
    if dynamic and len(inputs) == 3 and inputs[2].shape[-2] == 1:
        pytest.skip("torch fixes the number of columns where a mask has one row")
    gm = captured(model, *inputs, dynamic=dynamic)
    check_pass(FuseAttention(), gm, *inputs, skips=[])
    graph = fused(gm)
    assert [n.target for n in graph.graph.nodes if "attention" in str(n.target)] == [MULTI_HEAD_ATTENTION]
    assert torch.equal(graph(*inputs), gm(*inputs))
    file = to_onnx(graph)
    (node,) = [node for node in file.model.graph if node.op_type == "MultiHeadAttention"]
    assert node.attributes["num_heads"].as_int() == HEADS
    for optimization in ("none", "all"):
        (have,) = Session(file.to_bytes(), optimization=optimization).run(inputs)
        torch.testing.assert_close(have, model(*inputs), rtol=1e-5, atol=1e-5)


def test_other_lengths_than_those_of_the_example():
    model = Attention()
    file = to_onnx(fused(captured(model, X, MEMORY, SEEN)))
    inputs = torch.randn(1, 9, HEADS * E), torch.randn(1, 2, HEADS * E), torch.rand(1, 1, 9, 2) > 0.5
    (have,) = Session(file.to_bytes()).run(inputs)
    torch.testing.assert_close(have, model(*inputs), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_calls_in_a_row():
    model = Attention().eval()
    twin = copy.deepcopy(model)
    graph = fused(captured(twin, X, MEMORY, SEEN))
    model(X, MEMORY, SEEN).square().sum().backward()
    graph(X, MEMORY, SEEN).square().sum().backward()
    for want, have in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(have.grad, want.grad)


def test_a_fused_graph_is_saved_and_loaded(tmp_path):
    graph = fused(captured(Attention(), X, MEMORY))
    fxopt.save(graph, tmp_path / "attention.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "attention.fxopt")(X, MEMORY), graph(X, MEMORY))


class Grouped(nn.Module):
    def forward(self, q, k):
        q = q.view(N, L, HEADS, E).transpose(1, 2)
        k = k.view(N, S, 2, 2 * E)[..., :E].transpose(1, 2)
        y = scaled_dot_product_attention(q, k, k, enable_gqa=True)
        return y.transpose(1, 2).reshape(N, L, -1)


@pytest.mark.parametrize(("model", "inputs", "why"), [
    (Attention(back="wrong"), (X, MEMORY), "its result is not transposed back"),
    (Attention(back="twice"), (X, MEMORY), "has more than one reader"),
    (Attention(), (X, MEMORY, SEEN.expand(N, HEADS, L, S)), "its mask tells heads apart"),
    (Grouped(), (X, MEMORY), "several heads of the query share one of the keys"),
    (Attention().double(), (X.double(), MEMORY.double()), "it computes in torch.float64"),
    (Attention(dropout_p=0.5), (X, MEMORY), "dropout is active"),
], ids=["not joined", "read twice", "a mask for each head", "grouped", "float64", "dropout"])  # fmt: skip
def test_leaves_alone_and_says_why(model, inputs, why):
    found = FuseAttention()(captured(model, *inputs, dynamic=False))
    assert not found.modified
    assert any(why in skip.why for skip in found.skips)
