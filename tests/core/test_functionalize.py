"""In-place ops and mutated views become a functional graph with the same bits, or are refused by name and line."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.functionalize import fake_call, is_in_place
from tests.models import RunningMean, SliceWriter


def zero_column(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0
    return y


def relu_then_old_alias(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x - 0.5
    z = y.relu_()
    z.add_(1)
    return y, z


def add_to_slice(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 1:5] += 3
    return y


def strided_slice(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 1::2].mul_(-2)
    return y


def negative_bounds(x: Tensor) -> Tensor:
    y = x + 1
    y[:, -3:-1].mul_(-2)
    y[:, -1].sub_(5)
    return y


def nested_views(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    view = y.view(-1, 2, 3)
    view[:, 1][:, :2].transpose(0, 1)[0] = 7
    return y, view


def transposed(x: Tensor) -> Tensor:
    y = x + 1
    y.t()[2].mul_(10)
    y.transpose(0, 1)[0] += 4
    return y


def permuted(x: Tensor) -> Tensor:
    y = (x + 1).view(-1, 2, 3)
    y.permute(2, 0, 1)[1] = -1
    return y


def moved(x: Tensor) -> Tensor:
    y = (x + 1).view(-1, 2, 3)
    y.movedim(2, 0)[1] = -1
    return y


def viewed(x: Tensor) -> Tensor:
    y = x + 1
    y.view(-1, 3)[1] = 9
    y.flatten()[5:8].neg_()
    return y


def squeezed(x: Tensor) -> Tensor:
    y = x + 1
    y.unsqueeze(1)[:, 0, 2] = 9
    y[:, 3:4].squeeze(1).exp_()
    return y


def diagonal(x: Tensor) -> Tensor:
    y = x + 1
    y.diagonal().fill_(3)
    y.diagonal(offset=1).mul_(2)
    return y


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    first, second = y.split([2, 4], dim=1)
    second.mul_(3)
    first[:, 0] = 5
    return y, second


def chunk(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    a, b, c = y.chunk(3, dim=1)
    b += a
    c.copy_(b)
    return y, c


def unbind(x: Tensor) -> Tensor:
    y = x + 1
    columns = y.unbind(1)
    columns[4].zero_()
    columns[1].add_(columns[2])
    return y


def copy_broadcast(x: Tensor) -> Tensor:
    y = x + 1
    y.copy_(x[0])
    y[:, 2:4].copy_(x[:, :1])
    return y


def copy_other_dtype(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 1] = (x[:, 0] > 0).long()
    return y


def masked_fill(x: Tensor) -> Tensor:
    y = x + 1
    y[:, :3].masked_fill_(x[:, :3] > 0, -9.0)
    return y


def index_put(x: Tensor) -> Tensor:
    y = x + 1
    y.index_put_((torch.tensor([0, 2]), torch.tensor([1, 3])), torch.tensor([5.0, 6.0]))
    y[x > 0.3] = 0.25
    return y


def accumulate(x: Tensor) -> Tensor:
    y = x + 1
    y.index_put_((torch.tensor([0, 0]), torch.tensor([1, 1])), torch.tensor([5.0, 6.0]), accumulate=True)
    y.scatter_add_(1, torch.zeros_like(x).long(), x)
    return y


def stale_views(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A view read between two writes into its base keeps what it held in what was computed from it."""
    y = x + 1
    row = y[1]
    before = row * 1
    y += 1
    between = row * 1
    row.zero_()
    return before, between, y


def clone_is_no_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    kept = y.clone()
    y.zero_()
    return kept, y


def fresh_tensor(x: Tensor) -> Tensor:
    y = torch.zeros(4, 6)
    y[1:3] = x[1:3]
    y[0].fill_(2.0)
    return y + x


def integer_ops(x: Tensor) -> Tensor:
    y = (x * 10).long()
    y[:, 0] |= 1
    y[:, 1] &= 3
    y[:, 2:4] ^= 5
    y //= 2
    y[:, 5] <<= 2
    y[:, 4] >>= 1
    return y


def powers(x: Tensor) -> Tensor:
    y = x.abs() + 1
    y **= x.abs()
    y[:, 0].pow_(2)
    y //= 0.5
    return y


FUNCTIONS = [
    zero_column, relu_then_old_alias, add_to_slice, strided_slice, negative_bounds, nested_views, transposed, permuted,
    moved, viewed, squeezed, diagonal, split, chunk, unbind, copy_broadcast, copy_other_dtype, masked_fill, index_put,
    accumulate, stale_views, clone_is_no_view, fresh_tensor, integer_ops, powers,
]  # fmt: skip

# Eager itself refuses these with gradients: a part of several may not be written, a value that backward needs neither.
WITHOUT_GRADIENT = [relu_then_old_alias, split, chunk, unbind, powers]


def leaves(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def assert_functional(gm: fxopt.CapturedModule) -> None:
    assert [node.name for node in gm.graph.nodes if node.op == "call_function" and is_in_place(node.target)] == []


def same(want: Tensor | tuple[Tensor, ...], got: Tensor | tuple[Tensor, ...]) -> bool:
    pairs = zip(leaves(want), leaves(got), strict=True)
    return all(torch.equal(w, g) and w.dtype == g.dtype for w, g in pairs)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_writes_equal_eager_bit_for_bit(function: Callable[[Tensor], Tensor]) -> None:
    gm = fxopt.capture(function, (torch.randn(4, 6),))
    assert_functional(gm)
    x = torch.randn(4, 6)
    kept = x.clone()
    assert same(function(x), gm(x))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "function",
    [function for function in FUNCTIONS if function not in WITHOUT_GRADIENT and function is not integer_ops],
    ids=lambda function: function.__name__,
)
def test_gradients_equal_eager_bit_for_bit(function: Callable[[Tensor], Tensor]) -> None:
    gm = fxopt.capture(function, (torch.randn(4, 6),))
    x = torch.randn(4, 6, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    want, got = leaves(function(x)), leaves(gm(twin))
    # Products, so that a gradient that misses a write differs. A result of zeros alone may have no gradient at all.
    weights = [torch.randn_like(w) for w in want]
    torch.stack([(w * v).sum() for w, v in zip(want, weights, strict=True)]).sum().backward()
    torch.stack([(g * v).sum() for g, v in zip(got, weights, strict=True)]).sum().backward()
    assert x.grad.abs().max() > 0
    assert torch.equal(x.grad, twin.grad)


def test_the_functional_form_is_a_scatter() -> None:
    gm = fxopt.capture(add_to_slice, (torch.randn(4, 6),))
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(torch.ops.aten.slice_scatter.default) >= 1
    assert torch.ops.aten.add_.Tensor not in targets


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_writes_hold_for_other_batch_sizes(batch: int) -> None:
    net = SliceWriter()
    gm = fxopt.capture(net, net.example(3).args, dynamic_shapes={"x": {0: "batch"}})
    assert_functional(gm)
    x = net.example(batch).args[0]
    assert all(torch.equal(w, g) for w, g in zip(net(x), gm(x), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_buffers_follow_the_model_over_several_calls(training: bool) -> None:
    net = RunningMean().train(training)
    twin = copy.deepcopy(net)
    gm = fxopt.capture(net, net.example(3).args)
    assert int(net.calls) == 3, "capture leaves the buffers of the model as they were"
    for _ in range(4):
        x = torch.randn(3, 4)
        assert torch.equal(twin(x), gm(x))
        assert torch.equal(twin.mean, gm.get_buffer("mean"))
        assert torch.equal(twin.calls, gm.get_buffer("calls"))
    assert int(gm.get_buffer("calls")) == 7


class BufferSlice(nn.Module):
    """A ring buffer: a write through a view of a buffer, then a read of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.cache[1:] = self.cache[:-1].clone()
        self.cache[0].copy_(x)
        return self.cache.sum(0)


def test_a_view_of_a_buffer_is_written() -> None:
    net = BufferSlice()
    twin = copy.deepcopy(net)
    gm = fxopt.capture(net, (torch.randn(4),))
    for _ in range(4):
        x = torch.randn(4)
        assert torch.equal(twin(x), gm(x))
        assert torch.equal(twin.cache, gm.get_buffer("cache"))
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.fxopt.update_buffer.default)) == 1


class WritesParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.mul_(0.5)
        return x * self.weight


class WritesAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(1)
        return x + self.state


class WritesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[0].mul_(2)
        return x + 1


class WritesExpanded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sum().view(1, 1).expand(1, 4)
        y[:, 0:1].add_(1.0)
        return y + 1


def assert_refused(net: nn.Module, x: Tensor, *, op: str, at: tuple[str, ...], because: str) -> None:
    """Capture a model that writes in place what it must not, and look for the call, its place and the reason."""
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(net, (x,))
    text = str(caught.value)
    for part in (f"in-place op {op!r}", *at, because, "x.clone()"):
        assert part in text


@pytest.mark.parametrize(
    ("net", "op", "line", "reason"),
    [
        (WritesInput, "mul_", "x[0].mul_(2)", "writes into the model's input 'x'"),
        (WritesParameter, "mul_", "self.weight.mul_(0.5)", "writes into the parameter 'weight'"),
        (WritesAttribute, "add_", "self.state.add_(1)", "register it as a buffer"),
        (WritesExpanded, "add_", "y[:, 0:1].add_(1.0)", "aten.expand.default, which has no inverse"),
    ],
)
def test_refusals_name_the_op_and_the_line(net: type[nn.Module], op: str, line: str, reason: str) -> None:
    assert_refused(net(), torch.randn(4), op=op, at=("test_functionalize.py:", line), because=reason)


def test_fake_value_of_a_pad_leaves_a_dynamic_size_dynamic():
    class Padded(nn.Module):
        def forward(self, x):
            return F.pad(x, (1, 1)).relu()

    gm = fxopt.capture(Padded(), (torch.randn(3, 4),), dynamic_shapes=({0: "batch"},))
    (pad,) = (node for node in gm.graph.nodes if "pad" in str(node.target))
    size = fake_call(pad.target, (pad.args[0], [2, 3]), {}).shape[0]  # other amounts: the trace's value is not cached
    assert isinstance(size, torch.SymInt)
    assert str(size) == str(gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0])


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_random_masks_are_drawn_with_the_share_that_was_meant(keep):
    """0.5 is what ``bernoulli_`` takes if it is given nothing, and export leaves such arguments out."""

    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.new_empty((x.shape[0], 1)).bernoulli_(keep) if self.training else x

    gm = fxopt.capture(DropPath(), (torch.ones(4000, 1),)).train()
    torch.manual_seed(0)
    kept = gm(torch.ones(4000, 1))
    assert kept.unique().tolist() == [0.0, 1.0]
    assert abs(float(kept.mean()) - keep) < 0.05
    assert torch.equal(gm.eval()(torch.ones(4000, 1)), torch.ones(4000, 1))
