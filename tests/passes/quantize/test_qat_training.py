"""Training with quantizers: batch norm right in both modes, gradients, and state that survives."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.passes import PrepareQat
from fxopt.quantized_ops import FAKE_QUANTIZE
from fxopt.training_ops import LEARNED_SCALE, NORM_BIAS
from tests.models.base import settle

aten = torch.ops.aten


def graph_of(net: nn.Module, x: Any, *, training: bool = True) -> fxopt.CapturedModule:
    settle(net)
    return fxopt.capture(net.train(training), x)


def prepared(gm: fxopt.CapturedModule, **options: Any) -> fxopt.CapturedModule:
    return fxopt.optimize(gm, [PrepareQat(**options)], strict=True)


def fake_quantizers(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target is FAKE_QUANTIZE]


# ---- batch norm, against the published formula in float64

LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d, (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d, (5, 4, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d, (4, 2, 5, 4, 4)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d, (5, 4, 9, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d, (5, 4, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d, (5, 6, 9, 7)),
    "linear": (lambda: nn.Linear(8, 6), nn.BatchNorm1d, (7, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), nn.BatchNorm1d, (7, 8)),
}


def pair(name: str, *, affine: bool = True, **options: Any) -> tuple[nn.Sequential, fxopt.CapturedModule, Tensor]:
    layer, norm, size = LAYERS[name]
    net = nn.Sequential(layer(), norm(6, eps=1e-3, momentum=0.3, affine=False) if not affine else norm(6, eps=1e-3))
    if affine:
        settle(net)
    x = torch.randn(size)
    return net, prepared(fxopt.capture(net.eval(), x), weight_bits=4, **options), x


def quantized_like(gm: fxopt.CapturedModule, x: Tensor, net: nn.Sequential) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the quantized input, the folded and quantized weight, the factor and the scale of both, in float64."""
    scale, zero_point = gm.get_buffer("input_1_scale").double(), gm.get_buffer("input_1_zero_point").double()
    inputs = ((x.double() / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
    norm = net[1]
    gamma = torch.ones(6) if norm.weight is None else norm.weight.detach()
    factor = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    shape = (-1, *[1] * (net[0].weight.ndim - 1))
    steps = gm.get_buffer("0.weight_scale").double() * factor.abs()
    folded = net[0].weight.detach().double() * factor.reshape(shape)
    weight = (folded / steps.reshape(shape)).round().clamp(-7, 7) * steps.reshape(shape)
    return inputs, weight, factor, scale * steps


def run_layer(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    twin = copy.deepcopy(layer).double()
    twin.weight = nn.Parameter(weight)
    twin.bias = None if bias is None else nn.Parameter(bias)
    return twin(x).detach()


@pytest.mark.parametrize(
    ("name", "affine"), [*((name, True) for name in LAYERS), ("conv2d", False), ("same", False), ("linear", False)]
)
def test_in_evaluation_it_is_the_folded_layer(name: str, affine: bool) -> None:
    net, gm, x = pair(name, affine=affine)
    inputs, weight, factor, step = quantized_like(gm, x, net)
    norm, bias = net[1], 0.0 if net[0].bias is None else net[0].bias.detach().double()
    beta = 0.0 if norm.bias is None else norm.bias.detach().double()
    folded = beta + (bias - norm.running_mean.double()) * factor
    want = run_layer(net[0], inputs, weight, (folded / step).round() * step)
    # The last layer of the net: a linear one yields floats, a convolution is quantized behind the batch norm.
    last = [node for node in fake_quantizers(gm) if fxopt.tensor_arg(node, "x").target is aten.batch_norm.default]
    if last:
        scale = gm.get_buffer(str(fxopt.tensor_arg(last[0], "scale").target)).double()
        zero = gm.get_buffer(str(fxopt.tensor_arg(last[0], "zero_point").target)).double()
        near = ((want / scale) % 1 - 0.5).abs() < 1e-3  # float32 may round a tie to the other side
        want = ((want / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        found = gm(x).double()
        assert float(near.double().mean()) < 0.02
        assert bool(((found - want)[near].abs() < 1.01 * scale).all())
        want = torch.where(near, found, want)
    torch.testing.assert_close(gm(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_in_training_the_batch_normalizes_and_statistics_run_as_they_did(name: str) -> None:
    net, gm, x = pair(name)
    inputs, weight, factor, _ = quantized_like(gm, x, net)
    gm.train()
    raw = run_layer(net[0], inputs, weight, None)
    shape = (1, -1, *[1] * (raw.ndim - 2))
    raw = raw / factor.reshape(shape)  # Krishnamoorthi 2018: folded to be quantized, and taken back behind the layer
    if net[0].bias is not None:
        raw = raw + net[0].bias.detach().double().reshape(shape)
    twin = copy.deepcopy(net[1]).double().train()
    norm_bias = [node for node in gm.graph.nodes if node.target is NORM_BIAS]
    assert len(norm_bias) == 1
    node = next(node for node in gm.graph.nodes if node.target is aten.batch_norm.default)
    interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
    interpreter.run(x)
    value = {n: interpreter.env[n] for n in (node, norm_bias[0])}
    twin.bias = nn.Parameter(value[norm_bias[0]].detach().double())
    want = twin(raw)
    torch.testing.assert_close(value[node].double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gm.get_buffer("1.running_mean").double(), twin.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gm.get_buffer("1.running_var").double(), twin.running_var, rtol=1e-5, atol=1e-5)
    assert gm.get_buffer("1.num_batches_tracked") == 1
    assert fxopt.arg(node, "eps") == 1e-3


def test_a_channel_with_gamma_zero_can_be_trained() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    nn.init.zeros_(net[1].weight)
    nn.init.ones_(net[1].bias)  # or the relu would let no gradient through
    gm = prepared(fxopt.capture(net.train(), torch.randn(4, 2, 6, 6)), weight_bits=4, learn_scales=True)
    gm(torch.randn(4, 2, 6, 6)).square().sum().backward()
    gradients = [parameter.grad for parameter in gm.parameters() if parameter.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert bool((gm.get_parameter("1.weight").grad != 0).any())


# ---- gradients


def test_the_gradient_goes_straight_through_inside_the_range() -> None:
    gm = prepared(fxopt.capture(nn.Linear(3, 2, bias=False).train(), torch.randn(64, 3)), method="minmax")
    x = torch.tensor([[0.1, -0.2, 99.0]], requires_grad=True).expand(64, 3)
    x.retain_grad()
    gm(x).sum().backward()
    weight = fxopt.tensor_arg(next(n for n in gm.graph.nodes if n.target is aten.linear.default), "weight")
    seen = FAKE_QUANTIZE(
        gm.get_parameter("weight"), *(gm.get_buffer(str(node.target)) for node in weight.args[1:3]), 0, -127, 127
    )
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, :2], seen.sum(0)[:2].detach())
    assert x.grad[0, 2] == 0


@pytest.mark.parametrize("zero_point", [0, 3])
def test_what_rounds_to_an_end_of_the_range_gets_the_whole_gradient(zero_point: int) -> None:
    weight = torch.randn(50, 16)
    weight[:, 3] = 3 + torch.rand(50)  # the largest of each channel
    scale = weight.abs().amax(1) / (127 - zero_point)  # by which it becomes the last integer, or a hair more than that
    weight.requires_grad_()
    offsets = torch.full((50,), zero_point, dtype=torch.int8)
    FAKE_QUANTIZE(weight, scale, offsets, 0, -127, 127).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.ones(50, 16))


def test_a_learned_scale_gets_the_gradient_of_the_paper() -> None:
    scale, growth = torch.tensor(0.25), nn.Parameter(torch.zeros(()))
    x = torch.tensor([0.1, 0.3, -0.6, 9.0, -9.0])
    factor = 1 / math.sqrt(5 * 7)
    step = LEARNED_SCALE(scale, growth, factor)
    assert step.item() == 0.25
    out = FAKE_QUANTIZE(x, step, torch.tensor(0, dtype=torch.int8), 0, -7, 7)
    out.backward(weights := torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    v = x / 0.25  # the gradient is small enough not to be cut off
    paper = torch.where(v <= -7, -7.0, torch.where(v >= 7, 7.0, v.round() - v))  # Esser et al. 2020, equation 3
    # A descent step changes growth by lr * grad, and so the scale by scale * lr * grad: the paper's share of it.
    assert growth.grad is not None
    torch.testing.assert_close(growth.grad * 0.25, (paper * weights).sum() * factor)


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_any_optimizer_trains(optimizer: Any, learn_scales: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(64, 6)
    target = x[:, :1].sin() + x[:, 1:2]
    gm = prepared(fxopt.capture(net.train(), x), weight_bits=3, learn_scales=learn_scales)
    chosen = optimizer(gm.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        chosen.zero_grad()
        loss = F.mse_loss(gm(x), target)
        loss.backward()
        chosen.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    grown = [name for name, _ in gm.named_parameters() if name.endswith("_growth")]
    assert bool(grown) is learn_scales
    assert all(bool((gm.get_parameter(name) != 0).any()) for name in grown)


def test_one_step_changes_a_scale_by_the_learning_rate_at_most() -> None:
    growth = nn.Parameter(torch.zeros(2))
    LEARNED_SCALE(torch.tensor([0.01, 0.01]), growth, 1.0).backward(torch.tensor([5.0, -5.0]))
    assert growth.grad is not None
    assert growth.grad.tolist() == [1, -1]


def test_a_scale_survives_a_wild_optimizer() -> None:
    gm = prepared(fxopt.capture(nn.Linear(4, 4).train(), torch.randn(8, 4)), learn_scales=True)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.endswith("_growth"):
                parameter.fill_(-1e6)
    out = gm(torch.randn(8, 4))
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in gm.parameters() if p.grad is not None)


# ---- state


def trained(gm: fxopt.CapturedModule, steps: int, x: Tensor) -> fxopt.CapturedModule:
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(gm.train().parameters(), lr=0.01, momentum=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        gm(x).square().mean().backward()
        optimizer.step()
    return gm


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.drop, self.head = nn.Dropout(0.15), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3))))


def test_a_hundred_switches_change_nothing() -> None:
    x = torch.randn(4, 2, 6, 6)
    gm = trained(prepared(graph_of(WithDropout(), x), weight_bits=4, learn_scales=True), 2, x)
    rows = fxopt.graph_text(gm)
    state = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    gm.eval()
    want = gm(x)
    for _ in range(100):
        gm.train()
        gm.eval()
    assert torch.equal(gm(x), want)
    gm.train()
    assert fxopt.graph_text(gm) == rows
    assert "0.15, True" in rows
    assert "True, 0.03, 0.001" in rows
    assert all(torch.equal(state[name], tensor) for name, tensor in gm.state_dict().items())
    assert set(state) == set(gm.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save", "state_dict"])
def test_training_goes_on_after_a_copy(way: str, tmp_path: Path) -> None:
    x = torch.randn(4, 2, 6, 6)
    start = prepared(graph_of(WithDropout(), x), weight_bits=4, learn_scales=True)
    gm = trained(start.clone(copy_tensors=True), 2, x)
    if way == "deepcopy":
        twin = copy.deepcopy(gm)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(gm))
    elif way == "save":
        fxopt.save(gm, tmp_path / "net.fxopt")
        twin = fxopt.load(tmp_path / "net.fxopt")
    else:
        twin = start.clone(copy_tensors=True)
        twin.load_state_dict(gm.state_dict())
    for graph in (gm, twin):
        trained(graph, 2, x)
    assert {name for name, _ in twin.named_parameters()} == {name for name, _ in gm.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(gm.state_dict().values(), twin.state_dict().values(), strict=True))
    assert torch.equal(gm.eval()(x), twin.eval()(x))


def test_it_trains_in_ddp(tmp_path: Path) -> None:
    x = torch.randn(4, 2, 6, 6)
    gm = prepared(graph_of(WithDropout(), x), weight_bits=4, learn_scales=True)
    alone = trained(gm.clone(copy_tensors=True), 3, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(gm)
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(wrapped.train().parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(x).square().mean().backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), gm.state_dict().values(), strict=True))
