"""One graph for both modes: training it equals training the model, bit for bit, however often it is switched."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.models import NETS, RunningMean, StochasticDepth

aten = torch.ops.aten


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=2e-3, momentum=0.3)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(y))


class Averaging(nn.Module):
    """BatchNorm with statistics, and one without, which uses those of the batch in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain = nn.BatchNorm1d(4, momentum=0.9), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.norm(x)))


def assert_trains_alike(model: nn.Module, gm: fxopt.CapturedModule, shape: tuple[int, ...], steps: int = 3) -> None:
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (model, gm)]
    for step in range(steps):
        x = torch.randn(shape)
        losses = []
        for module, optimizer in zip((model, gm), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            losses.append(module(x).square().sum())
            losses[-1].backward()
        assert torch.equal(*losses)
        grads = {name: p.grad for name, p in gm.named_parameters()}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, grads[name]), name
        for optimizer in optimizers:
            optimizer.step()
        want, got = model.state_dict(), gm.state_dict()
        assert list(want) == list(got)
        for name in want:
            assert torch.equal(want[name], got[name]), name


@pytest.mark.parametrize("captured_in", ["eval", "train"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(Classifier, (4, 3, 6, 6)), (Averaging, (4, 4)), (StochasticDepth, (4, 3, 6, 6))],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_training_equals_the_model_bit_for_bit(make: type[nn.Module], shape: tuple[int, ...], captured_in: str) -> None:
    model = make()
    twin = copy.deepcopy(model).train(captured_in == "train")
    gm = fxopt.capture(twin, (torch.randn(shape),))
    assert gm.modes == "both"
    assert gm.training is (captured_in == "train")
    assert_trains_alike(model.train(), gm.train(), shape)
    x = torch.randn(shape)
    assert torch.equal(model.eval()(x), gm.eval()(x))
    if isinstance(model, Classifier):
        assert int(gm.get_buffer("norm.num_batches_tracked")) == 3


def flags(gm: fxopt.CapturedModule) -> list[tuple[object, ...]]:
    norms = [n for n in gm.graph.nodes if n.target is aten.batch_norm.default]
    drops = [n for n in gm.graph.nodes if n.target is aten.dropout.default]
    assert len(norms) == len(drops) == 1
    found: list[tuple[object, ...]] = [tuple(fxopt.arg(norms[0], name) for name in ("training", "momentum", "eps"))]
    return [*found, tuple(fxopt.arg(drops[0], name) for name in ("train", "p"))]


def test_a_hundred_switches_keep_every_option() -> None:
    model = Classifier().eval()
    gm = fxopt.capture(model, (torch.randn(2, 3, 6, 6),))
    for _ in range(50):
        assert flags(gm.train()) == [(True, 0.3, 2e-3), (True, 0.3)]
        assert flags(gm.eval()) == [(False, 0.3, 2e-3), (False, 0.3)]
    x = torch.randn(3, 3, 6, 6)
    gm = fxopt.capture(model, (x,))
    assert torch.equal(gm.train().eval()(x), model(x))


def test_the_flag_of_torch_follows() -> None:
    gm = fxopt.capture(Classifier().eval(), (torch.randn(2, 3, 6, 6),))
    assert not gm.training
    assert gm.train() is gm
    assert gm.training
    assert not gm.train(False).training


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary, self.main = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.training:
            y = y + self.auxiliary(torch.tanh(x))
        else:
            y = y.clamp(-0.5, 0.5)
        return y * (0.25 if self.training else 2.0)


def test_a_branch_on_training_is_taken_as_the_model_does() -> None:
    model = Branches().eval()
    gm = fxopt.capture(model, (torch.randn(3, 4),), dynamic_shapes={"x": {0: "batch"}})
    for training in (True, False, True):
        for batch in (1, 2, 5):
            x = torch.randn(batch, 4)
            assert torch.equal(model.train(training)(x), gm.train(training)(x))
    assert_trains_alike(copy.deepcopy(model).train(), fxopt.capture(copy.deepcopy(model), (x,)).train(), (5, 4))


def test_an_average_is_written_in_training_alone() -> None:
    model = RunningMean().eval()
    gm = fxopt.capture(copy.deepcopy(model), model.example().args)
    for training in (False, True, True, False):
        x = torch.randn(2, 4)
        assert torch.equal(model.train(training)(x), gm.train(training)(x))
        assert torch.equal(model.mean, gm.get_buffer("mean"))
        assert torch.equal(model.calls, gm.get_buffer("calls"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [Classifier, Branches, StochasticDepth, RunningMean], ids=lambda make: make.__name__)
def test_a_frozen_graph_holds_one_mode(make: type[nn.Module], training: bool) -> None:
    from fxopt.freeze import frozen

    model = make()
    x = torch.randn(4, 4) if make in (Branches, RunningMean) else torch.randn(4, 3, 6, 6)
    gm = fxopt.capture(model.eval(), (x,)).train(training)
    before = fxopt.graph_text(gm)
    fixed = frozen(gm)
    assert fxopt.graph_text(gm) == before
    assert fixed.modes == ("train" if training else "eval")
    assert [node for node in fixed.graph.nodes if "modes" in node.meta or "select_mode" in str(node.target)] == []
    inactive = [n for n in fixed.graph.nodes if n.target is torch.ops.fxopt.update_buffer.default and not n.args[2]]
    assert inactive == []
    with pytest.raises(fxopt.ModeError, match=f"valid in {fixed.modes} mode only"):
        fixed.train(not training)
    fixed.train(training)
    torch.manual_seed(5)
    want = copy.deepcopy(gm)(x)
    torch.manual_seed(5)
    assert torch.equal(want, copy.deepcopy(fixed)(x))


def test_what_only_training_needs_is_frozen_away() -> None:
    from fxopt.freeze import frozen

    gm = fxopt.capture(Branches().eval(), (torch.randn(3, 4),))
    fixed = frozen(gm)
    targets = [node.target for node in fixed.graph.nodes]
    assert targets.count(aten.linear.default) == 1
    assert aten.tanh.default not in targets


def test_optimize_traces_the_current_mode_alone_if_asked() -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval(), torch.randn(2, 3)
    assert fxopt.optimize(net, [], x).modes == "both"
    graph = fxopt.optimize(net, [], x, modes="current")
    assert graph.modes == "eval"
    with pytest.raises(fxopt.ModeError, match="captured with modes='current'"):
        graph.train()


@pytest.mark.parametrize("training", [True, False])
def test_the_current_mode_alone(training: bool) -> None:
    model = Classifier().train(training)
    x = torch.randn(3, 3, 6, 6)
    gm = fxopt.capture(model, (x,), modes="current")
    here, there = ("train", "eval") if training else ("eval", "train")
    assert gm.modes == here
    gm.train(training)
    with pytest.raises(fxopt.ModeError) as caught:
        gm.train(not training)
    text = str(caught.value)
    assert f"valid in {here} mode only, and cannot be switched to {there} mode" in text
    assert "captured with modes='current'" in text
    assert f"after model.{there}()" in text
    assert gm.training is training


def test_a_model_that_cannot_merge_says_why() -> None:
    class TwoOutputs(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x + 1, x + 2) if self.training else (x + 1,)

    gm = fxopt.capture(TwoOutputs().eval(), (torch.randn(2),))
    assert gm.modes == "eval"
    with pytest.raises(fxopt.ModeError, match="returns 1 values in one mode and 2 in the other"):
        gm.train()


def test_a_model_without_modes_has_both() -> None:
    gm = fxopt.capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (torch.randn(2, 3),))
    assert gm.modes == "both"
    gm.train().eval()
    assert not any("modes" in node.meta for node in gm.graph.nodes)


def test_capture_leaves_the_mode_of_every_module() -> None:
    model = Classifier().train()
    model.norm.eval()
    gm = fxopt.capture(model, (torch.randn(2, 3, 6, 6),))
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert flags(gm) == [(False, 0.3, 2e-3), (True, 0.3)]


def test_modes_are_checked() -> None:
    with pytest.raises(ValueError, match="modes is 'train'; wanted 'both' or 'current'"):
        fxopt.capture(NETS["Mlp"](), NETS["Mlp"]().example().args, modes="train")
