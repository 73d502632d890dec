"""Masks while training: nothing moves a masked weight, pruners follow their schedule, processes agree."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.passes import Cubic, Iterative, MaskPlan, OneShot, Prune, Pruner, ShrinkMasked, fine_tune
from fxopt.passes.prune.schedule import Schedule
from tests.distributed.launch import run_in_processes
from tests.passes.prune.nets import net

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (8,), generator=torch.Generator().manual_seed(2))


def conv_net() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.scale(self.mix(x)).relu().mean((2, 3))
        return self.head(self.layer(self.hidden(x)))  # type: ignore[no-any-return]

    return net(
        forward,
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
        mix=nn.Conv2d(8, 8, 3, bias=False),
        scale=nn.GroupNorm(2, 8),
        hidden=nn.Linear(8, 12),
        layer=nn.LayerNorm(12),
        head=nn.Linear(12, 4),
    )


@functools.cache
def _captured() -> fxopt.CapturedModule:
    torch.manual_seed(0)
    return fxopt.capture(conv_net(), (X,), dynamic_shapes=({0: "batch"},))


def graph() -> fxopt.CapturedModule:
    """A graph with tensors of its own, in training."""
    return _captured().clone(copy_tensors=True).train()


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    model: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    pruner: Pruner | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
) -> None:
    """The plain loop of anybody."""
    given = list(batches) or [(X, Y)]
    for number in range(steps):
        optimizer.zero_grad()
        loss_of(model, given[number % len(given)]).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam with weight decay": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1, amsgrad=True),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-3, nesterov=True),
}


def assert_masked(gm: fxopt.CapturedModule, plan: MaskPlan) -> None:
    """Check that every masked weight is 0, the parameter itself and what the graph computes with."""
    values: dict[str, Tensor] = {}

    class Reading(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = found = super().run_node(n)
            return found

    with torch.no_grad():
        Reading(gm.clone().eval()).run(X, enable_io_processing=False)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in plan:
            mask = plan[node.target]
            (product,) = node.users
            assert torch.equal(values[node.name] != 0, mask), node.target  # unmasked ones are not 0 by chance
            assert torch.equal(values[product.name] != 0, mask), node.target


# ---- masks hold


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("granularity", ["channels", "weights"])
def test_masked_weights_are_exactly_zero_after_200_steps_and_the_others_moved(kind: str, granularity: str) -> None:
    gm = Prune(0.5, granularity, min_sqnr_db=-1000.0)(graph()).gm
    plan, before = MaskPlan.of(gm), {name: p.detach().clone() for name, p in gm.named_parameters()}
    train(gm, OPTIMIZERS[kind](gm.parameters()), 200)
    assert MaskPlan.of(gm) == plan
    assert_masked(gm, plan)
    for name, mask in plan.items():
        assert (gm.get_parameter(name) != before[name])[mask].float().mean() > 0.99, name


def test_masked_channels_stay_removable_after_training() -> None:
    gm = Prune(0.5, min_sqnr_db=-1000.0)(graph()).gm
    train(gm, torch.optim.AdamW(gm.parameters(), lr=1e-2), 20)
    gm.eval()
    small = ShrinkMasked()(gm).gm
    assert small.get_parameter("mix.weight").shape == (4, 4, 3, 3)
    assert small.get_parameter("head.weight").shape == (4, 6)
    torch.testing.assert_close(small(X), gm(X), rtol=1e-4, atol=1e-4)


# ---- pruners

SCHEDULES: dict[str, Schedule] = {
    "one shot": OneShot(0.5),
    "iterative": Iterative(0.5, rounds=3, every=4),
    "cubic": Cubic(0.5, begin=2, end=12, every=2),
}


@pytest.mark.parametrize("granularity", ["channels", "weights", "block:4x1"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_pruner_masks_by_its_schedule_in_place_and_never_unmasks(schedule: Schedule, granularity: str) -> None:
    gm = graph()
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2, weight_decay=1e-2)
    pruner = Pruner(gm, Prune(0.9, granularity), schedule, optimizer)
    tensors = {name: id(tensor) for name, tensor in pruner.gm.state_dict(keep_vars=True).items()}
    assert pruner.plan.kept == 1.0
    for step in range(1, 15):
        before = pruner.plan
        train(pruner.gm, optimizer, 1, pruner=pruner)
        plan, fraction = pruner.plan, schedule.fraction_at(step)
        assert pruner.steps == step
        assert pruner.fraction == fraction
        assert all(not (plan[name] & ~before[name]).any() for name in plan)
        if granularity == "weights":
            assert plan.kept == pytest.approx(1 - fraction, abs=0.01)
        elif granularity == "channels":
            assert int(plan["conv.bias"].sum()) == 8 - round(8 * fraction)
            assert int(plan["hidden.bias"].sum()) == 12 - round(12 * fraction)
            assert plan.channels["layer_norm"].equal(plan["hidden.bias"])
    assert {name: id(tensor) for name, tensor in pruner.gm.state_dict(keep_vars=True).items()} == tensors
    assert_masked(pruner.gm, pruner.plan)


def test_norms_are_masked_with_their_channels_and_the_net_shrinks_at_the_end() -> None:
    gm = graph()
    pruner = Pruner(gm, Prune(0.5), Iterative(0.5, 2, 2))
    train(pruner.gm, torch.optim.SGD(pruner.gm.parameters(), lr=1e-2), 6, pruner=pruner)
    assert pruner.plan.channels["group_norm"].reshape(2, 4).sum(dim=1).tolist() == [2, 2]
    pruner.gm.eval()
    small = ShrinkMasked()(pruner.gm).gm
    assert small.get_parameter("hidden.weight").shape == (6, 4)
    torch.testing.assert_close(small(X), pruner.gm(X), rtol=1e-4, atol=1e-4)


def test_whole_masks_change_nothing_and_share_the_parameters() -> None:
    gm = graph()
    pruner = Pruner(gm, Prune(0.5), OneShot(0.5))
    torch.testing.assert_close(pruner.gm(X), gm(X), rtol=1e-4, atol=1e-5)  # norms add up in another order
    for name, parameter in gm.named_parameters():
        assert pruner.gm.get_parameter(name) is parameter


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_forgets_what_is_masked(kind: str) -> None:
    gm = graph()
    optimizer = OPTIMIZERS[kind](gm.parameters())
    pruner = Pruner(gm, Prune(0.5, "weights"), Cubic(0.5, begin=5, end=9, every=2, initial=0.2), optimizer)
    train(pruner.gm, optimizer, 9, pruner=pruner)
    seen = 0
    for name, mask in pruner.plan.items():
        for held in optimizer.state[pruner.gm.get_parameter(name)].values():
            if isinstance(held, Tensor) and held.shape == mask.shape:
                assert not held[~mask].any()
                assert held[mask].any()
                seen += 1
    assert seen >= len(pruner.plan)
    train(pruner.gm, optimizer, 5)  # nothing that it remembers moves a masked weight
    assert_masked(pruner.gm, pruner.plan)


def test_masks_are_chosen_by_the_weights_of_the_moment() -> None:
    gm = graph()
    pruner = Pruner(gm, Prune(0.5, "weights"), OneShot(0.5))
    with torch.no_grad():
        weight = pruner.gm.get_parameter("head.weight")
        weight.copy_(torch.arange(1, 49).reshape(4, 12))
    pruner.step()
    assert torch.equal(pruner.plan["head.weight"], torch.arange(1, 49).reshape(4, 12) > 24)


def test_pattern_is_masked_at_the_first_step_of_its_schedule() -> None:
    pruner = Pruner(graph(), Prune(granularity="2:4"), OneShot(0.5))
    assert pruner.plan.kept == 1.0
    assert pruner.step()
    assert pruner.plan["hidden.weight"].unflatten(1, (-1, 4)).sum(dim=-1).unique().tolist() == [2]
    assert not pruner.step()


def test_masked_graph_is_pruned_further_from_where_it_is() -> None:
    first = Prune(0.25, "weights", min_sqnr_db=-1000.0)(graph()).gm
    before = MaskPlan.of(first)
    pruner = Pruner(first, Prune(0.5, "weights"), OneShot(0.5))
    assert pruner.plan == before
    pruner.step()
    assert pruner.plan.kept == pytest.approx(0.5, abs=0.01)
    assert all(not (pruner.plan[name] & ~mask).any() for name, mask in before.items())


def test_taylor_importance_uses_the_data_and_the_loss_of_the_user() -> None:
    seen = []

    def counted(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch)
        return loss_of(model, batch)

    pruner = Pruner(graph(), Prune(0.5, importance="taylor", loss=counted), OneShot(0.5), data=[(X, Y)] * 3)
    pruner.step()
    assert len(seen) == 3
    assert int(pruner.plan["conv.bias"].sum()) == 4


def test_training_that_was_stopped_goes_on_as_if_it_was_not(tmp_path: pathlib.Path) -> None:
    def start() -> tuple[Pruner, torch.optim.Optimizer]:
        gm = graph()
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
        return Pruner(gm, Prune(0.5, "weights"), Cubic(0.6, begin=0, end=12, every=3), optimizer), optimizer

    straight, optimizer = start()
    train(straight.gm, optimizer, 7, pruner=straight)
    torch.save([each.state_dict() for each in (straight.gm, optimizer, straight)], tmp_path / "state.pt")
    train(straight.gm, optimizer, 7, pruner=straight)

    resumed, optimizer = start()
    for each, state in zip(
        (resumed.gm, optimizer, resumed), torch.load(tmp_path / "state.pt", weights_only=True), strict=True
    ):
        each.load_state_dict(state)
    assert (resumed.steps, resumed.fraction) == (7, straight._schedule.fraction_at(7))
    train(resumed.gm, optimizer, 7, pruner=resumed)
    assert resumed.plan == straight.plan
    for name, tensor in straight.gm.state_dict().items():
        assert torch.equal(tensor, resumed.gm.state_dict()[name]), name


def test_fine_tuning_trains_prunes_and_returns_to_the_mode() -> None:
    pruner = Pruner(graph().eval(), Prune(0.5), Iterative(0.5, 2, 5))  # type: ignore[arg-type]  # eval() returns itself
    losses = fine_tune(pruner.gm, [(X, Y)] * 5, loss_of, epochs=8, pruner=pruner)
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    assert pruner.steps == 40
    assert int(pruner.plan["conv.bias"].sum()) == 4
    assert not pruner.gm.training
    assert_masked(pruner.gm, pruner.plan)


# ---- several processes


def _worker(rank: int, world: int, folder: pathlib.Path) -> None:
    gm = fxopt.load(folder / "net.fxopt").train()
    outcome = {}
    for granularity in ("channels", "weights"):
        copied = gm.clone(copy_tensors=True)
        optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-2)
        own = [(X[rank::world], Y[rank::world])]  # by its data alone, each process would choose other masks
        schedule = Iterative(0.5, rounds=2, every=10)
        pruner = Pruner(
            copied, Prune(0.5, granularity, importance="taylor", loss=loss_of), schedule, optimizer, data=own
        )
        parallel = nn.parallel.DistributedDataParallel(pruner.gm)
        train(parallel, optimizer, 30, pruner=pruner, batches=own)
        assert_masked(pruner.gm, pruner.plan)
        outcome[granularity] = pruner.gm.state_dict()
    torch.save(outcome, folder / f"{rank}.pt")


def test_two_processes_have_the_same_masks_and_weights(tmp_path: pathlib.Path) -> None:
    fxopt.save(graph(), tmp_path / "net.fxopt")
    run_in_processes(_worker, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for granularity, state in first.items():
        masks = [name for name in state if name.endswith(("_mask", "_channels"))]
        assert masks
        assert any(not state[name].all() for name in masks)
        for name, tensor in state.items():
            if "running" not in name:  # statistics of the batch, of which each process has its own
                assert torch.equal(tensor, second[granularity][name]), name
