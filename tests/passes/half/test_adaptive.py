"""Precision that adapts: what overflows moves to float32, what is calm moves back, and nothing else is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.passes import AdaptivePrecision, MixedPrecision, PrecisionPlan

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(2))
CALM = torch.ones(())


class Scaled(nn.Module):
    """A layer whose operand is as large as the second input says."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.dropout(self.norm(self.first(x)).relu())
        z = self.second(y * scale)
        return self.third(z / scale)


class Steep(nn.Module):
    """Values stay small; gradients grow by 1000 in the second of two products that read the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.first(x)
        calm = y * 0.5
        steep = y * 1000.0
        return self.second(calm + (steep - steep.detach()))


class Gated(nn.Module):
    """A branch, one side of which overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.first(x)
        if scale.max() > 1:
            y = self.first(x) * 30000.0 * 30.0
            y = y / 30000.0 / 30.0
        return self.second(y)


class Infinite(Scaled):
    """Infinities of its own come before what overflows."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.first(x)
        logarithm = y.detach().relu().log()  # -inf where it is 0
        y = y.masked_fill(logarithm.isinf(), float("-inf")).relu()
        return self.third(self.second(y * scale) / scale)


def captured(net: nn.Module) -> fxopt.CapturedModule:
    torch.manual_seed(0)
    return fxopt.capture(net.train(), (X, CALM), dynamic_shapes=({0: "batch"}, None))


def loss_of(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, scale, y = batch
    return F.cross_entropy(model(x, scale), y)


class Loop:
    """The plain loop with a scaler, one step at a time."""

    def __init__(self, gm: fxopt.CapturedModule, *, scale: float = 2.0**8, **options: Any) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
        self.adaptive = AdaptivePrecision(gm, loss_of, scaler=self.scaler, **options)
        self.optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
        self.losses: list[float] = []

    def step(self, scale: float = 1.0) -> bool:
        batch = (X, torch.tensor(scale), Y)
        self.optimizer.zero_grad()
        loss = loss_of(self.adaptive.gm, batch)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.append(loss.item())
        return self.adaptive.step(batch)

    def overflow(self) -> None:
        """Train with values that are too large until they are in float32."""
        for _ in range(10):
            if not self.step(1e6):
                return
        raise AssertionError(f"it overflows still: {self.moves()}")

    def moves(self) -> list[tuple[int, str, str]]:
        return [(m.step, m.node, str(m.after).removeprefix("torch.")) for m in self.adaptive.log]


# ---- to float32


def test_the_first_node_whose_value_overflows_moves_and_the_step_is_skipped() -> None:
    loop = Loop(captured(Scaled()))
    before = {name: p.detach().clone() for name, p in loop.adaptive.gm.named_parameters()}
    assert loop.step(1e6)
    assert all(torch.equal(before[name], p) for name, p in loop.adaptive.gm.named_parameters())
    assert loop.moves() == [(1, "linear_1", "float32")]
    assert str(loop.adaptive.log[0]).startswith("step 1: linear_1 (test_adaptive.py:")
    assert "z = self.second(y * scale)" in str(loop.adaptive.log[0])
    assert str(loop.adaptive.log[0]).endswith("float16 -> float32: its value is not finite in float16")


def test_infinities_of_the_model_itself_are_nobodys_fault() -> None:
    loop = Loop(captured(Infinite()))
    assert not loop.step(1.0)
    assert loop.step(1e6)
    assert loop.moves() == [(2, "linear_1", "float32")]


def test_training_recovers_once_all_that_overflow_have_moved() -> None:
    loop = Loop(captured(Scaled()))
    overflowed = [loop.step(1e6) for _ in range(30)]
    moved = overflowed.index(False)
    assert not any(overflowed[moved:])
    assert len(loop.moves()) == moved > 0
    assert loop.losses[-1] < loop.losses[moved]


def test_a_gradient_that_overflows_moves_the_node_whose_backward_made_it() -> None:
    # The loss is scaled so that gradients reach some thousands; behind the factor 1000 they do not fit.
    loop = Loop(captured(Steep()), scale=2.0**16)
    assert loop.step()
    (move,) = loop.adaptive.log
    assert move.node == "mul_1"
    assert "its gradient is not finite in float16, with the loss times 65536" in str(move)
    assert not loop.adaptive.gm.first.weight.grad.isfinite().all()  # type: ignore[union-attr]  # it overflowed


def test_an_overflow_that_half_precision_is_not_at_fault_for_moves_nothing() -> None:
    loop = Loop(captured(Scaled()))
    loop.optimizer.zero_grad()
    with torch.no_grad():
        loop.adaptive.gm.first.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]  # a parameter
    assert loop.step()
    assert [move.node for move in loop.adaptive.log] == [""]
    assert "no node in float16 is at fault" in str(loop.adaptive.log[0])


def test_a_node_inside_a_branch_moves() -> None:
    loop = Loop(captured(Gated()))
    for _ in range(8):
        if not loop.step(2.0):
            break
    assert not loop.step(2.0)
    assert loop.moves()
    assert all("/" in node for _, node, _ in loop.moves())
    assert not loop.step(0.5)


# ---- back to half


def test_a_node_that_stays_calm_for_long_enough_moves_back() -> None:
    loop = Loop(captured(Scaled()), every=5, patience=2)
    loop.overflow()
    moved = {node for _, node, _ in loop.moves()}
    start = loop.adaptive.steps
    for _ in range(20):
        assert not loop.step(1.0)
    back = [(step, node) for step, node, to in loop.moves() if to == "float16"]
    assert {node for _, node in back} == moved
    first = 5 * (start // 5 + 1)
    assert {step for step, _ in back} == {first + 5}  # the second look
    assert "values and gradients were up to" in str(loop.adaptive.log[-1])
    assert loop.adaptive.plan == MixedPrecision("float16").make_plan(captured(Scaled()))


def test_a_node_whose_values_are_close_to_the_limit_stays() -> None:
    loop = Loop(captured(Scaled()), every=2, patience=1, headroom=4.0)
    loop.overflow()
    for _ in range(8):
        loop.step(1e4)  # up to some ten thousands: below the limit, not below a quarter of it
    assert all(to == "float32" for _, _, to in loop.moves())


def test_each_return_makes_the_next_wait_twice_as_long() -> None:
    loop = Loop(captured(Scaled()), every=1, patience=2)
    waits = []
    for _ in range(3):
        loop.overflow()
        moved = loop.adaptive.steps
        while loop.adaptive.plan["linear_1"] is torch.float32:
            loop.step(1.0)
        waits.append(loop.adaptive.steps - moved)
    assert waits[1] >= 2 * waits[0]
    assert waits[2] >= 2 * waits[1]


# ---- in place, with nothing left behind


def test_module_and_parameters_stay_the_same_objects_and_the_given_graph_stays_float32() -> None:
    gm = captured(Scaled())
    code = gm.code
    loop = Loop(gm)
    module, parameters = loop.adaptive.gm, list(loop.adaptive.gm.parameters())
    kept = module.forward
    loop.overflow()
    assert loop.adaptive.gm is module
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert all(a is b for a, b in zip(gm.parameters(), module.parameters(), strict=True))
    assert gm.code == code
    assert kept(X, torch.tensor(1e6)).isfinite().all()  # what others kept runs the new graph
    fxopt.optimize(gm.eval(), ["cast-half{dtype=bfloat16,min_sqnr_db=10}"], strict=True)


def test_a_probe_leaves_buffers_gradients_and_random_numbers_alone() -> None:
    trained, watched = (Loop(captured(Scaled(dropout=0.5)), every=every) for every in (10_000, 1))
    for loop in (trained, watched):
        torch.manual_seed(7)
        loop.adaptive._calm["linear"] = 0  # as if it had moved: it is looked at
        loop.adaptive._waits["linear"] = 10_000
        for _ in range(4):
            loop.step()
    assert trained.losses == watched.losses
    for name, tensor in trained.adaptive.gm.state_dict().items():
        assert torch.equal(tensor, watched.adaptive.gm.state_dict()[name]), name
    assert watched.adaptive._calm["linear"] == 4
    assert trained.adaptive._calm["linear"] == 0


def test_a_probe_draws_the_random_numbers_of_the_step_that_it_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = captured(Scaled(dropout=0.5))
    seen: list[float] = []

    def loss(model: Any, batch: Any) -> Tensor:
        found = loss_of(model, batch)
        seen.append(found.item())
        return found

    adaptive = AdaptivePrecision(gm, loss, every=1)
    adaptive._calm["linear"], adaptive._waits["linear"] = 0, 100
    batch = (X, CALM, Y)
    for _ in range(3):
        value = loss_of(adaptive.gm, batch)
        value.backward()
        torch.rand(5)
        adaptive.step(batch)
        assert seen[-1] == value.item()


def test_modes_switch_behind_a_move() -> None:
    loop = Loop(captured(Scaled(dropout=0.5)))
    loop.overflow()
    scale = torch.tensor(1e6)
    gm = loop.adaptive.gm
    assert gm.training
    assert not torch.equal(gm(X, scale), gm(X, scale))
    assert torch.equal(gm.eval()(X, scale), gm(X, scale))


def test_without_a_scaler_gradients_tell_of_an_overflow() -> None:
    adaptive = AdaptivePrecision(captured(Scaled()), loss_of, dtype="float16")
    batch = (X, torch.tensor(1e6), Y)
    loss_of(adaptive.gm, batch).backward()
    assert adaptive.step(batch)
    assert [move.node for move in adaptive.log] == ["linear_1"]


def test_a_saved_state_goes_on_with_the_same_moves() -> None:
    straight = Loop(captured(Scaled()), every=3, patience=2)
    for _ in range(4):
        straight.step(1e6)
    gm = captured(Scaled())
    resumed = Loop(gm, every=3, patience=2)
    gm.load_state_dict(straight.adaptive.gm.state_dict())
    resumed.scaler.load_state_dict(straight.scaler.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    resumed.adaptive.load_state_dict(straight.adaptive.state_dict())
    already = len(straight.adaptive.log)
    assert already
    for loop in (straight, resumed):
        loop.losses.clear()
        for _ in range(12):
            loop.step(1.0)
    assert resumed.losses == straight.losses
    assert resumed.moves() == straight.moves()[already:]
    assert resumed.moves()


# ---- refusals


@pytest.mark.parametrize("options", [{"every": 0}, {"patience": 0}, {"headroom": 0.5}, {"headroom": float("nan")}])
def test_refuses_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted 1 or more, and finite"):
        AdaptivePrecision(captured(Scaled()), loss_of, **options)


def test_refuses_what_is_no_graph_and_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match="gm is a Scaled; wanted a captured graph"):
        AdaptivePrecision(Scaled(), loss_of)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(TypeError, match="loss is a float; wanted a function"):
        AdaptivePrecision(captured(Scaled()), 0.5)  # type: ignore[arg-type]  # that is the point


def test_refuses_a_plan_of_another_graph() -> None:
    with pytest.raises(fxopt.PassError, match="the plan names 'elsewhere'"):
        AdaptivePrecision(captured(Scaled()), loss_of, plan=PrecisionPlan({"elsewhere": torch.float16}))
