"""Prune: what is planned, masked and reported, and what the smaller graph is then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fxopt
from fxopt.passes import BakeMasks, InsertMasks, MaskPlan, Prune, ShrinkMasked
from fxopt.testing import check_pass
from tests.passes.prune.nets import net, randomized

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
FLOOR = -1000.0  # dB: nets with random weights are another function once they are pruned


def residual_net() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        return self.head(self.scale(x).mean((2, 3)))  # type: ignore[no-any-return]

    return net(
        forward,
        stem=nn.Conv2d(3, 16, 3),
        norm=nn.BatchNorm2d(16),
        first=nn.Conv2d(16, 12, 3, padding=1),
        second=nn.Conv2d(12, 16, 3, padding=1),
        scale=nn.GroupNorm(4, 16),
        head=nn.Linear(16, 5),
    )


def mixed_net() -> nn.Module:
    """Attention, a layer norm, an embedding, a matrix product and a transposed convolution."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 16)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.norm = nn.LayerNorm(16)
            self.up = nn.ConvTranspose1d(16, 8, 2)
            self.product = nn.Parameter(torch.randn(8, 12))
            self.head = nn.Linear(12, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
            x = self.up(x.transpose(1, 2)).relu().transpose(1, 2)
            return self.head((x @ self.product).relu())  # type: ignore[no-any-return]

    return randomized(Net())


TOKENS = torch.arange(10).reshape(2, 5) % 9


def oracle(model: nn.Module, plan: MaskPlan, *args: Tensor) -> Tensor:
    """Eager torch with weight * mask; norms that leave channels out are not part of it."""
    weights = {name: p.detach() * plan[name] if name in plan else p.detach() for name, p in model.named_parameters()}
    found: Tensor = functional_call(model, weights, args)
    return found


def rows_kept(plan: MaskPlan, name: str, dim: int = 0) -> int:
    return int(plan[name].movedim(dim, 0).flatten(1).any(dim=1).sum())


@pytest.fixture(scope="module")
def gm() -> fxopt.CapturedModule:
    torch.manual_seed(5)
    return fxopt.capture(residual_net(), (X,), dynamic_shapes=({0: "batch"},))


@pytest.fixture(scope="module")
def mixed() -> fxopt.CapturedModule:
    torch.manual_seed(6)
    return fxopt.capture(mixed_net(), (TOKENS,))


# ---- what a pass owes


@pytest.mark.parametrize("granularity", ["channels", "weights", "2:4", "block:4x1"])
def test_pruning_keeps_what_a_pass_owes_and_a_second_run_changes_nothing(
    gm: fxopt.CapturedModule, granularity: str
) -> None:
    fraction = None if granularity == "2:4" else 0.5
    result = check_pass(Prune(fraction, granularity, min_sqnr_db=FLOOR), gm)
    assert result.modified


def test_pruned_graph_is_the_net_with_its_weights_times_the_masks() -> None:
    model = mixed_net()
    gm = fxopt.capture(model, (TOKENS,))
    plan = Prune(0.6, "weights").make_plan(gm)
    pruned = fxopt.optimize(gm, [Prune(plan=plan, min_sqnr_db=FLOOR)], strict=True)
    torch.testing.assert_close(pruned(TOKENS), oracle(model, plan, TOKENS), rtol=1e-4, atol=1e-4)
    assert plan.kept == pytest.approx(0.4, abs=0.01)


# ---- channels


def test_half_of_the_channels_of_every_family_go_together(gm: fxopt.CapturedModule) -> None:
    plan = Prune(0.5).make_plan(gm)
    assert rows_kept(plan, "stem.weight") == rows_kept(plan, "second.weight") == 8
    assert torch.equal(plan["stem.bias"], plan["second.bias"])
    assert torch.equal(plan["norm.weight"], plan["stem.bias"])
    assert torch.equal(plan["head.weight"].any(dim=0), plan["stem.bias"])
    assert rows_kept(plan, "first.weight") == 6
    assert plan.channels["group_norm"].equal(plan["stem.bias"])
    assert plan.notes == {"head.weight": "its outputs stay: it is an output of the model"}


def test_norm_groups_are_left_with_equal_numbers_of_channels(gm: fxopt.CapturedModule) -> None:
    per_group = Prune(0.5).make_plan(gm).channels["group_norm"].reshape(4, 4)
    assert per_group.sum(dim=1).unique().numel() == 1 or set(per_group.sum(dim=1).tolist()) == {0, 4}


def test_shrunk_graph_has_the_planned_sizes_and_computes_the_same(gm: fxopt.CapturedModule) -> None:
    pruned = fxopt.optimize(gm, [Prune(0.5, min_sqnr_db=FLOOR)], strict=True).eval()
    small = fxopt.optimize(pruned, [ShrinkMasked()], strict=True)
    assert small.get_parameter("stem.weight").shape == (8, 3, 3, 3)
    assert small.get_parameter("first.weight").shape == (6, 8, 3, 3)
    assert small.get_parameter("head.weight").shape == (5, 8)
    torch.testing.assert_close(small(X), pruned(X), rtol=1e-4, atol=1e-4)


def test_more_is_pruned_from_a_masked_graph_as_from_the_whole_one(gm: fxopt.CapturedModule) -> None:
    steps = [Prune(0.25, min_sqnr_db=FLOOR), Prune(0.5, min_sqnr_db=FLOOR)]
    first = steps[0](gm).gm
    twice = steps[1](first).gm
    before, after = MaskPlan.of(first), MaskPlan.of(twice)
    assert all(not (after[name] & ~before[name]).any() for name in before)
    assert rows_kept(after, "stem.weight") == 8
    assert rows_kept(after, "first.weight") == 6
    assert after.channels["group_norm"].equal(after["stem.bias"])


@pytest.mark.parametrize("granularity", ["channels", "weights", "block:4x1"])
@pytest.mark.parametrize("importance", ["l2", "random"])
def test_share_that_is_masked_already_counts(gm: fxopt.CapturedModule, granularity: str, importance: str) -> None:
    once = Prune(0.5, granularity, importance=importance, min_sqnr_db=FLOOR)(gm).gm
    other = Prune(0.5, granularity, importance=importance, seed=7).make_plan(once)
    assert other == MaskPlan.of(once)


def test_skipped_parameters_stay_whole(gm: fxopt.CapturedModule) -> None:
    plan = Prune(0.5, skip=("first.bias",)).make_plan(gm)
    assert "first.bias" not in plan
    assert rows_kept(plan, "first.weight") == 12
    assert rows_kept(plan, "stem.weight") == 8
    assert "first.weight" not in Prune(0.5, "weights", skip=("first.*",)).make_plan(gm)


def test_at_least_so_many_channels_stay_and_a_multiple(gm: fxopt.CapturedModule) -> None:
    plan = Prune(0.9, min_kept=5).make_plan(gm)
    assert rows_kept(plan, "first.weight") == 5
    assert rows_kept(Prune(0.6, multiple=8).make_plan(gm), "first.weight") == 8


def test_threshold_takes_what_scores_below_it(gm: fxopt.CapturedModule) -> None:
    norms = (
        torch.cat(
            [
                gm.get_parameter("first.weight").flatten(1),
                gm.get_parameter("first.bias")[:, None],
                gm.get_parameter("second.weight").transpose(0, 1).flatten(1),
            ],
            dim=1,
        )
        .detach()
        .norm(dim=1)
    )
    threshold = float(norms.sort().values[4:6].mean())
    plan = Prune(threshold=threshold, skip=("stem.bias",)).make_plan(gm)
    assert torch.equal(plan["first.bias"], norms >= threshold)


def test_heads_are_pruned_where_heads_are_asked_for(mixed: fxopt.CapturedModule) -> None:
    plan = Prune(0.5, "heads").make_plan(mixed)
    rows = plan["attention.in_proj_weight"].any(dim=1).reshape(3, 4, 4)
    assert torch.equal(rows.any(dim=2), rows.all(dim=2))
    assert rows.any(dim=2).sum(dim=1).tolist() == [2, 2, 2]
    small = ShrinkMasked()(Prune(plan=plan, min_sqnr_db=FLOOR)(mixed).gm.eval()).gm
    assert small.get_parameter("attention.in_proj_weight").shape == (24, 16)


def test_plan_can_be_edited_and_applied(gm: fxopt.CapturedModule) -> None:
    plan = Prune(0.5).make_plan(gm)
    mask = torch.ones(5, 16, dtype=torch.bool)
    mask[:, :8] = False
    pruned = Prune(plan=plan.with_masks({"head.weight": mask}), min_sqnr_db=FLOOR)(gm).gm
    assert torch.equal(pruned.get_parameter("head.weight") != 0, mask)


def test_plan_that_masks_all_channels_is_applied_and_shrinking_keeps_one_and_says_so(gm: fxopt.CapturedModule) -> None:
    none = {name: torch.zeros_like(gm.get_parameter(name), dtype=torch.bool) for name in ("first.weight", "first.bias")}
    masked = InsertMasks(MaskPlan(none), min_sqnr_db=FLOOR)(gm).gm.eval()
    result = ShrinkMasked()(masked)
    assert result.gm.get_parameter("first.weight").shape == (1, 16, 3, 3)
    torch.testing.assert_close(result.gm(X), masked(X), rtol=1e-4, atol=1e-4)
    reasons = [skip.why for skip in result.skips if skip.node == "first_weight"]
    assert "1 of 12 masked rows stay: all of its axis could go, and one has to stay" in reasons


def test_pruned_share_and_reasons_are_in_the_report(gm: fxopt.CapturedModule) -> None:
    step = fxopt.optimize(gm, [Prune(0.5, min_sqnr_db=FLOOR)], strict=True).report.steps[0]  # type: ignore[union-attr]  # it has one
    assert ("head.weight", "its outputs stay: it is an output of the model") in [(s.node, s.why) for s in step.skips]
    assert any("of the weights of 11 masked parameters are kept" in note for note in step.notes), step.notes


# ---- single weights


def test_two_of_four_inputs_stay_along_the_axis_that_the_layer_sums_over(mixed: fxopt.CapturedModule) -> None:
    plan = Prune(granularity="2:4").make_plan(mixed)
    axes = {
        "attention.in_proj_weight": 1,
        "attention.out_proj.weight": 1,
        "up.weight": 0,
        "product": 0,
        "head.weight": 1,
    }
    assert set(plan) == set(axes)
    for name, axis in axes.items():
        counts = plan[name].movedim(axis, -1).unflatten(-1, (-1, 4)).sum(dim=-1)
        assert counts.unique().tolist() == [2], name
    assert plan.notes == {"embed.weight": "no layer sums over one of its axes alone"}


def test_inputs_of_a_weight_in_a_branch_and_of_a_transposed_one_are_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 6)
            self.turned = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x) if x.sum() > 0 else F.linear(x, self.inner.weight)
            return x @ self.turned.t() + x[:, :4]

    plan = Prune(granularity="1:2").make_plan(fxopt.capture(Net(), (torch.rand(3, 8),)))
    assert plan["inner.weight"].unflatten(1, (-1, 2)).sum(dim=-1).unique().tolist() == [1]
    assert plan["turned"].unflatten(1, (-1, 2)).sum(dim=-1).unique().tolist() == [1]


def test_global_share_of_single_weights_takes_the_smallest_of_all(gm: fxopt.CapturedModule) -> None:
    plan = Prune(0.7, "weights", scope="global").make_plan(gm)
    weights = {name: gm.get_parameter(name).detach().abs() for name in plan}
    lost = torch.cat([weights[name][~plan[name]] for name in plan])
    kept = torch.cat([weights[name][plan[name]] for name in plan])
    assert len(lost) == round(0.7 * (len(lost) + len(kept)))
    assert lost.max() <= kept.min()


def test_threshold_of_single_weights_is_one_of_magnitudes(gm: fxopt.CapturedModule) -> None:
    for importance in ("l1", "l2"):
        plan = Prune(granularity="weights", threshold=0.5, importance=importance).make_plan(gm)
        assert torch.equal(plan["stem.weight"], gm.get_parameter("stem.weight").abs() >= 0.5)


def test_vectors_and_what_the_graph_does_not_read_are_left_alone() -> None:
    model = net(lambda self, x: self.used(x), used=nn.Linear(6, 4), unused=nn.Linear(6, 4))
    plan = Prune(0.5, "weights").make_plan(fxopt.capture(model, (torch.randn(2, 6),)))
    assert list(plan) == ["used.weight"]


def test_masks_of_single_weights_outlive_the_shrinking_of_channels(gm: fxopt.CapturedModule) -> None:
    sparse = Prune(0.5, "weights", min_sqnr_db=FLOOR)(gm).gm
    both = Prune(0.5, min_sqnr_db=FLOOR)(sparse).gm.eval()
    small = ShrinkMasked()(both).gm
    assert small.get_buffer("first.weight_mask").shape == small.get_parameter("first.weight").shape == (6, 8, 3, 3)
    torch.testing.assert_close(BakeMasks()(small).gm(X), both(X), rtol=1e-4, atol=1e-4)
