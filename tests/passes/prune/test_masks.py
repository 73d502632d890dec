"""Masks in a graph: a plan that can be printed, edited and saved; put in, joined, baked, stored and exported."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fxopt
from fxopt.export import to_onnx
from fxopt.passes import BakeMasks, InsertMasks, MaskPlan, Prune, ShrinkMasked
from fxopt.passes.prune.masks import is_masked
from fxopt.testing import check_pass
from tests.passes.prune.nets import net

X = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def conv_net() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.last(x).relu().mean((2, 3)))  # type: ignore[no-any-return]

    return net(
        forward,
        first=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
        last=nn.Conv2d(8, 6, 3),
        head=nn.Linear(6, 4),
    )


def random_masks(model: nn.Module, *, share: float = 0.6) -> dict[str, Tensor]:
    return {name: torch.rand(parameter.shape) < share for name, parameter in model.named_parameters()}


def masked_by_torch(model: nn.Module, masks: dict[str, Tensor], *args: Tensor) -> Tensor:
    """The oracle: eager torch with ``weight * mask`` in place of every weight."""
    weights = {name: p.detach() * masks[name] if name in masks else p.detach() for name, p in model.named_parameters()}
    found: Tensor = functional_call(model, weights, args)
    return found


def captured(model: Callable[..., Any], *args: Any, **options: Any) -> fxopt.CapturedModule:
    return fxopt.capture(model, args, **options)


def masked(gm: fxopt.CapturedModule, masks: dict[str, Tensor]) -> fxopt.CapturedModule:
    return InsertMasks(MaskPlan(masks), min_sqnr_db=-1000.0)(gm).gm


def products(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if is_masked(node)]


# ---- what they compute


def test_masked_graph_computes_weight_times_mask() -> None:
    model = conv_net()
    masks = random_masks(model)
    gm = masked(captured(model, X), masks)
    torch.testing.assert_close(gm(X), masked_by_torch(model, masks, X), rtol=0, atol=0)
    assert len(products(gm)) == len(masks)


def test_masked_weights_are_zero_in_the_parameter_itself() -> None:
    model = conv_net()
    masks = random_masks(model)
    for name, parameter in masked(captured(model, X), masks).named_parameters():
        assert torch.equal(parameter != 0, masks[name]), name


def test_inserting_keeps_what_a_pass_owes_and_a_second_run_changes_nothing() -> None:
    model = conv_net()
    result = check_pass(InsertMasks(MaskPlan(random_masks(model)), min_sqnr_db=-1000.0), captured(model, X))
    assert result.modified


def test_users_module_is_never_written() -> None:
    model = conv_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    gm = captured(model, X)
    after = masked(gm, random_masks(model))
    assert after.get_parameter("first.weight") is not parameters["first.weight"]
    assert gm.get_parameter("first.weight") is parameters["first.weight"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_parameter_with_nothing_to_mask_keeps_its_identity() -> None:
    model = conv_net()
    whole = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    gm = masked(captured(model, X), whole)
    for name, parameter in model.named_parameters():
        assert gm.get_parameter(name) is parameter


def test_infinity_under_a_mask_becomes_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    after = masked(captured(model, torch.ones(1, 2)), {"weight": torch.tensor([[False, True], [True, True]])})
    assert after.get_parameter("weight")[0, 0] == 0
    assert after(torch.ones(1, 2)).isfinite().all()


def test_masks_join_and_never_unmask() -> None:
    model = conv_net()
    gm = captured(model, X)
    first, second = random_masks(model), random_masks(model)
    twice = masked(masked(gm, first), second)
    both = {name: mask & second[name] for name, mask in first.items()}
    assert MaskPlan.of(twice) == MaskPlan(both)
    assert len(products(twice)) == len(both)
    torch.testing.assert_close(twice(X), masked_by_torch(model, both, X), rtol=0, atol=0)
    assert not InsertMasks(MaskPlan(first), min_sqnr_db=-1000.0)(twice).modified


# ---- one parameter read twice


class Tied(nn.Module):
    """An embedding whose weight, under another name, is that of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_tied_weight_gets_one_mask_and_stays_tied(name: str) -> None:
    tokens = torch.arange(6).reshape(2, 3)
    model = Tied()
    gm = captured(model, tokens)
    mask = torch.rand(7, 4) < 0.5
    after = masked(gm, {name: mask})
    names = dict(after.named_parameters(remove_duplicate=False))
    assert names["embed.weight"] is names["head.weight"]
    assert len(products(after)) == 1
    want = masked_by_torch(model, {"embed.weight": mask}, tokens)
    torch.testing.assert_close(after(tokens), want, rtol=0, atol=0)


def test_masks_for_both_names_of_a_tied_weight_are_joined() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    model = Tied()
    first, second = torch.rand(7, 4) < 0.7, torch.rand(7, 4) < 0.7
    after = masked(captured(model, tokens), {"embed.weight": first, "head.weight": second})
    assert MaskPlan.of(after) == MaskPlan({"embed.weight": first & second})
    want = masked_by_torch(model, {"embed.weight": first & second}, tokens)
    torch.testing.assert_close(after(tokens), want, rtol=0, atol=0)


def test_weight_that_two_layers_read_gets_one_product() -> None:
    model = net(lambda self, x: F.linear(F.linear(x, self.w).tanh(), self.w), w=torch.ones(4, 4))
    x, mask = torch.randn(3, 4), torch.rand(4, 4) < 0.5
    after = masked(captured(model, x), {"w": mask})
    assert len(products(after)) == 1
    torch.testing.assert_close(after(x), masked_by_torch(model, {"w": mask}, x), rtol=0, atol=0)


# ---- branches


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if x.sum() > 0:
            h = self.inner(h)
        else:
            h = F.linear(h, self.inner.weight) - 1
        return self.last(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sign", [1, -1])
def test_weight_inside_the_sides_of_a_branch_is_masked_in_both(sign: int) -> None:
    model, x = Branching(), torch.rand(2, 4) + 0.1
    mask = {"inner.weight": torch.rand(8, 8) < 0.5}
    after = masked(captured(model, x), mask)
    torch.testing.assert_close(after(sign * x), masked_by_torch(model, mask, sign * x))
    assert MaskPlan.of(after) == MaskPlan(mask)
    baked = BakeMasks()(after).gm
    assert MaskPlan.of(baked) == MaskPlan({})
    torch.testing.assert_close(baked(sign * x), after(sign * x), rtol=0, atol=0)


# ---- baking


def test_baking_is_exact_and_idempotent() -> None:
    model = conv_net()
    gm = masked(captured(model, X), random_masks(model))
    result = check_pass(BakeMasks(), gm)
    assert products(result.gm) == []
    assert torch.equal(result.gm(X), gm(X))
    assert not [name for name, _ in result.gm.named_buffers() if "mask" in name]


def test_baking_after_weights_moved_under_their_masks_is_exact() -> None:
    model = conv_net()
    gm = masked(captured(model, X), random_masks(model)).clone(copy_tensors=True)
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(1.0)
    baked = BakeMasks()(gm).gm
    assert products(baked) == []
    assert torch.equal(baked(X), gm(X))


def test_weight_that_is_also_read_without_its_mask_is_not_baked() -> None:
    model = net(lambda self, x: F.linear(x, self.w * self.m) + F.linear(x, self.w), w=torch.ones(4, 4))
    model.register_buffer("m", torch.rand(4, 4) < 0.5)
    check_pass(
        BakeMasks(),
        model,
        torch.randn(2, 4),
        skips=["linear_1 reads the same weight, and not with this mask"],
        changes=0,
    )


def test_weight_with_two_masks_is_not_baked() -> None:
    model = net(lambda self, x: F.linear(x, self.w * self.m) + F.linear(x, self.w * self.n), w=torch.ones(4, 4))
    model.register_buffer("m", torch.eye(4) > 0)
    model.register_buffer("n", torch.eye(4) < 1)
    result = check_pass(BakeMasks(), model, torch.randn(2, 4), changes=0)
    assert len(result.skips) == 2


def test_weight_with_the_same_mask_twice_is_baked() -> None:
    model = net(lambda self, x: F.linear(x, self.w * self.m) - (self.w * self.m).sum(), w=torch.ones(4, 4))
    model.register_buffer("m", torch.rand(4, 4) < 0.5)
    result = check_pass(BakeMasks(), model, torch.randn(2, 4), skips=[])
    assert products(result.gm) == []


def test_buffer_of_bool_that_the_graph_writes_is_no_mask() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.w * self.m)
        self.m.logical_not_()
        return y

    model = net(forward, w=torch.ones(4, 4))
    model.register_buffer("m", torch.rand(4, 4) < 0.5)
    assert products(captured(model, torch.randn(2, 4))) == []


def test_mask_that_is_broadcast_is_none() -> None:
    model = net(lambda self, x: F.linear(x, self.w * self.m), w=torch.ones(4, 4))
    model.register_buffer("m", torch.rand(1, 4) < 0.5)
    assert products(captured(model, torch.randn(2, 4))) == []


# ---- stored and exported


def test_masks_are_in_the_state_dict_and_survive_saving(tmp_path: pathlib.Path) -> None:
    model = conv_net()
    masks = random_masks(model)
    gm = masked(captured(model, X), masks)
    assert torch.equal(gm.state_dict()["first.weight_mask"], masks["first.weight"])
    fxopt.save(gm, tmp_path / "net.fxopt")
    loaded = fxopt.load(tmp_path / "net.fxopt")
    assert MaskPlan.of(loaded) == MaskPlan(masks)
    assert torch.equal(loaded(X), gm(X))


def test_state_of_a_masked_graph_loads_into_another_one() -> None:
    model = conv_net()
    gm = masked(captured(model, X), random_masks(model))
    other = masked(captured(conv_net(), X), random_masks(model)).clone(copy_tensors=True)
    other.load_state_dict(gm.state_dict())
    assert torch.equal(other(X), gm(X))


@pytest.mark.ort
def test_masked_baked_and_shrunk_graph_are_equal_in_ort() -> None:
    gm = fxopt.capture(conv_net(), (X,), dynamic_shapes=({0: "batch"},))
    pruned = Prune(0.5)(gm).gm
    graphs = [pruned, BakeMasks()(pruned).gm, ShrinkMasked()(pruned).gm]
    sizes = []
    for graph in graphs:
        file = to_onnx(graph)  # compared with ORT, its optimizer off and on, at several batch sizes
        assert file.validation is not None
        assert file.validation.runs >= 4
        sizes.append(sum(value.const_value.size for value in file.model.graph.initializers.values()))
        torch.testing.assert_close(graph(X), pruned(X), rtol=1e-5, atol=1e-5)
    assert sizes[2] < 0.6 * sizes[1] < sizes[0]


# ---- layer and group norms

NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "layer norm": (lambda: nn.LayerNorm(8), lambda x: F.layer_norm(x, x.shape[-1:])),
    "group norm": (lambda: nn.GroupNorm(2, 8), lambda x: F.group_norm(x, 2)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norm_over_masked_channels_computes_what_the_norm_of_the_others_does(kind: str) -> None:
    make, oracle = NORMS[kind]
    norm, x = make(), torch.randn(3, 8)
    kept = torch.tensor([True, False, True, True, False, True, True, True])
    gm = captured(norm, x)
    name = next(node.name for node in gm.graph.nodes if "norm" in str(node.target))
    after = InsertMasks(MaskPlan({}, {name: kept}), min_sqnr_db=-1000.0)(gm).gm
    torch.testing.assert_close(after(x)[:, kept], oracle(x[:, kept]), rtol=1e-5, atol=1e-5)
    assert after(x)[:, ~kept].abs().max() == 0
    assert MaskPlan.of(after).channels[name].equal(kept)


def test_masks_of_norms_join_and_a_second_run_changes_nothing() -> None:
    gm = captured(nn.LayerNorm(4), torch.randn(2, 4))
    first, second = torch.tensor([True, False, True, True]), torch.tensor([True, True, False, True])
    once = InsertMasks(MaskPlan({}, {"layer_norm": first}), min_sqnr_db=-1000.0)(gm).gm
    twice = InsertMasks(MaskPlan({}, {"layer_norm": second}), min_sqnr_db=-1000.0)(once).gm
    assert MaskPlan.of(twice).channels["layer_norm"].tolist() == [True, False, False, True]
    assert not InsertMasks(MaskPlan({}, {"layer_norm": second}))(twice).modified


# ---- the plan


def plan() -> MaskPlan:
    rows = torch.ones(4, 3, dtype=torch.bool)
    rows[1] = False
    return MaskPlan(
        {"layer.first.weight": rows, "layer.first.bias": rows[:, 0], "head.weight": torch.ones(2, 4, dtype=torch.bool)},
        {"norm": rows[:, 0]},
        {"other.weight": "it is too dear"},
    )


def test_plan_is_printed_with_what_is_kept_whole_rows_and_reasons() -> None:
    assert str(plan()).splitlines() == [
        "layer.first.weight  bool[4, 3]          9 of        12 kept; 1 of 4 rows masked",
        "layer.first.bias    bool[4]             3 of         4 kept",
        "head.weight         bool[2, 4]          8 of         8 kept",
        "norm                bool[4]             3 of         4 kept",
        "not pruned: other.weight: it is too dear",
    ]


def test_plan_is_edited_by_pattern_and_the_first_one_stays_as_it_is() -> None:
    whole = plan()
    assert list(whole.without("layer.*")) == ["head.weight"]
    mask = torch.zeros(2, 4, dtype=torch.bool)
    changed = whole.with_masks({"head.weight": mask})
    assert changed["head.weight"] is mask
    assert whole == plan()
    assert changed != whole
    assert whole.kept == pytest.approx(20 / 24)
    assert MaskPlan({}).kept == 1.0


def test_joined_plan_masks_what_either_does() -> None:
    other = MaskPlan({"layer.first.bias": torch.tensor([False, True, True, True]), "b": torch.tensor([True])})
    joined = plan().joined(other)
    assert joined["layer.first.bias"].tolist() == [False, False, True, True]
    assert set(joined) == {*plan(), "b"}
    assert joined.channels["norm"].equal(plan().channels["norm"])


def test_saved_plan_is_the_same_when_it_is_loaded(tmp_path: pathlib.Path) -> None:
    plan().save(tmp_path / "plan.pt")
    loaded = MaskPlan.load(tmp_path / "plan.pt")
    assert loaded == plan()
    assert loaded.notes == plan().notes


def test_plan_of_a_graph_is_a_copy() -> None:
    gm = masked(captured(nn.Linear(3, 2), torch.ones(1, 3)), {"weight": torch.eye(2, 3) > 0})
    found = MaskPlan.of(gm)
    gm.get_buffer("weight_mask").fill_(False)
    assert found["weight"].equal(torch.eye(2, 3) > 0)
