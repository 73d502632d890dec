"""Pruning to a budget: what is predicted is what the shrunk graph costs, and options that make no sense are refused."""

import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxopt
from fxopt import PassError
from fxopt.attributes import get_path
from fxopt.passes.prune import InsertMasks, Prune, ShrinkMasked
from fxopt.passes.prune.budget import Budget, group_losses
from fxopt.passes.prune.costs import byte_terms, mac_terms, parameter_terms, total
from fxopt.passes.prune.plan import channel_plan, prunable
from fxopt.passes.prune.regions import RUN, latency_terms, regions_of
from fxopt.passes.prune.widths import Widths, sample_shapes, width_options
from tests.passes.prune.nets import assert_equal, captured, net, randomized

IMAGES = torch.randn(2, 3, 8, 8)


def plain():
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU()
    return randomized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 36, 5))), IMAGES


def residual():
    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        return self.last(x)

    parts = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 16, 3, padding=1), nn.Conv2d(16, 10, 3, padding=1), nn.Conv2d(10, 4, 1)
    return net(forward, **dict(zip(("stem", "first", "second", "last"), parts, strict=True))), IMAGES


def dense():
    """Concatenations of two to four families, of which the last layer but one reads four."""

    def forward(self, x):
        for layer in (self.a, self.b, self.c):
            x = torch.cat([x, layer(x).relu()], dim=1)
        return self.last(self.joint(x).relu())

    parts = {"a": nn.Conv2d(6, 7, 3, padding=1), "b": nn.Conv2d(13, 8, 3, padding=1), "c": nn.Conv2d(21, 9, 1)}
    model = net(forward, **parts, joint=nn.Conv2d(30, 10, 1), last=nn.Conv2d(10, 2, 1))
    return randomized(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), model)), IMAGES


def depthwise():
    layers = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(), nn.Conv2d(12, 8, 1)
    grouped = nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.ConvTranspose2d(16, 6, 2, stride=2), nn.ReLU()
    return randomized(nn.Sequential(*layers, *grouped, nn.Conv2d(6, 2, 1))), IMAGES


def attention():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(x)))

    return randomized(Block()), torch.randn(2, 5, 16)


NETS = [plain, residual, dense, depthwise, attention]


def widths_of(gm, *, heads=False, min_kept=1, multiple=1):
    found = prunable(gm, heads=heads)
    scores = {family.name: torch.rand(len(family.groups)) for family in found.families}
    return found, Widths(found.structure, found.families, scores, min_kept=min_kept, multiple=multiple)


def shrunk_by(gm, found, widths, choice):
    masked = InsertMasks(channel_plan(gm, found.structure, widths.gone(choice)))(gm).gm
    return ShrinkMasked()(masked).gm


def counted_macs(gm, x):
    math_alone = sdpa_kernel(SDPBackend.MATH)  # the counter knows no fused attention of a CPU
    with torch.no_grad(), math_alone, FlopCounterMode(display=False) as counter:
        gm(x)
    return counter.get_total_flops() // 2


def counted_bytes(gm):
    tensors = {id(t): t for node in gm.graph.nodes if node.op == "get_attr" for t in [get_path(gm, str(node.target))]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# ---- the model is exact


@pytest.mark.parametrize("made", NETS, ids=lambda made: made.__name__)
def test_predictions_are_what_the_shrunk_graph_counts(made):
    model, x = made()
    gm = captured(model, x)
    found, widths = widths_of(gm)
    assert len(widths.families) >= 2
    draw = random.Random(0)
    terms = mac_terms(widths, sample_shapes(gm)), parameter_terms(gm, widths), byte_terms(gm, widths)
    random_choice = tuple(draw.randrange(len(options)) for options in widths.options)
    for choice in (widths.full, random_choice, (0,) * len(widths.options)):
        small = shrunk_by(gm, found, widths, choice)
        want = counted_macs(small, x), sum(p.numel() for p in small.parameters()), counted_bytes(small)
        assert tuple(total(each, choice) for each in terms) == want
    assert want[0] < 0.5 * counted_macs(gm, x)


def test_predictions_of_heads_are_exact():
    model, x = attention()
    gm = captured(model, x)
    found, widths = widths_of(gm, heads=True)
    small = shrunk_by(gm, found, widths, (1,))
    assert widths.options == ((1, 2, 3, 4),)
    assert total(mac_terms(widths, sample_shapes(gm)), (1,)) == counted_macs(small, x) < counted_macs(gm, x)


def test_a_recurrent_layer_counts_both_products_of_each_step():
    def forward(self, x):
        return self.last(self.lstm(self.first(x))[0])

    model = net(forward, first=nn.Linear(5, 8), lstm=nn.LSTM(8, 6, batch_first=True), last=nn.Linear(6, 2))
    x = torch.randn(3, 7, 5)
    gm = captured(model, x)
    found, widths = widths_of(gm)
    assert {family.name.split(".")[0] for family in widths.families} == {"first", "lstm"}
    by_name = dict(zip((f.name for f in widths.families), widths.options, strict=True))
    choice = tuple(options.index(4) for options in by_name.values())
    steps, wide, units = 3 * 7, 4, 4
    want = steps * (5 * wide + 4 * units * (wide + units) + units * 2)
    assert total(mac_terms(widths, sample_shapes(gm)), choice) == want
    small = shrunk_by(gm, found, widths, choice)
    assert total(parameter_terms(gm, widths), choice) == sum(p.numel() for p in small.parameters())


def test_matrix_products_and_einsum_count_each_letter_once():
    def forward(self, x):
        return torch.einsum("...td,...sd->...ts", self.a(x), self.b(x)), self.a(x) @ self.b(x).transpose(1, 2)

    x = torch.randn(2, 5, 6)
    gm = captured(net(forward, a=nn.Linear(6, 8), b=nn.Linear(6, 8)), x)
    _, widths = widths_of(gm)
    assert total(mac_terms(widths, sample_shapes(gm)), widths.full) == 4 * 2 * 5 * 6 * 8 + 2 * 2 * 5 * 5 * 8


def test_dynamic_sizes_are_those_of_the_first_sample():
    model, x = plain()
    gm = captured(model, x, dynamic=({0: "batch"},))
    _, widths = widths_of(gm)
    assert total(mac_terms(widths, sample_shapes(gm)), widths.full) == counted_macs(gm, x)


@pytest.mark.parametrize(("total_groups", "min_kept", "multiple", "want"), [
    (64, 1, 1, (8, 16, 24, 32, 40, 48, 56, 64)),
    (10, 1, 1, (1, 2, 3, 4, 5, 7, 8, 9, 10)),
    (10, 4, 3, (6, 9, 10)),
    (33, 17, 1, (24, 32, 33)),
    (6, 9, 1, (6,)),
    (96, 1, 12, (24, 48, 72, 96)),
])  # fmt: skip
def test_widths_to_choose_from(total_groups, min_kept, multiple, want):
    assert width_options(total_groups, min_kept=min_kept, multiple=multiple) == want


# ---- losses


def test_a_loss_is_lamp_by_squares_of_norms_and_taylor_scores_are_added():
    model, x = plain()
    _, widths = widths_of(captured(model, x))
    first = widths.families[0]
    scores = {family.name: torch.arange(1.0, len(family.groups) + 1) for family in widths.families}
    squares = [value**2 for value in range(1, len(first.groups) + 1)]
    lamp = [square / sum(squares[at:]) for at, square in enumerate(squares)]
    gone = [len(first.groups) - width for width in widths.options[0]]
    assert group_losses(widths, scores, "l2")[0] == pytest.approx([sum(lamp[:count]) for count in gone])
    assert group_losses(widths, scores, "taylor")[0] == pytest.approx([count * (count + 1) / 2 for count in gone])
    assert group_losses(widths, scores, "l2")[0][-1] == 0


def test_what_is_masked_already_costs_no_loss():
    model, x = plain()
    _, widths = widths_of(captured(model, x))
    scores = {family.name: torch.full((len(family.groups),), -torch.inf) for family in widths.families}
    for family in widths.families:
        scores[family.name][-1] = 1.0
    for importance in ("l2", "l1", "taylor"):
        for row in group_losses(widths, scores, importance):
            assert all(loss == 0 for loss in row)


# ---- the pass


@pytest.mark.parametrize(("made", "budget"), [
    (plain, "bytes:0.3"), (residual, "params:0.4"), (dense, "macs:0.5"), (depthwise, "macs:0.3"),
    (attention, "bytes:0.8"),
])  # fmt: skip
def test_the_shrunk_graph_is_within_the_budget_and_computes_what_the_masked_one_does(made, budget):
    model, x = made()
    gm = captured(model, x)
    masked = Prune(budget=budget, min_sqnr_db=-60.0)(gm)
    small = ShrinkMasked()(masked.gm).gm
    counts = {"macs": lambda of: counted_macs(of, x), "bytes": counted_bytes}
    count = counts.get(budget.split(":")[0], lambda of: sum(p.numel() for p in of.parameters()))
    assert count(small) <= float(budget.split(":")[1]) * count(gm)
    assert_equal(masked.gm, small, x)
    told = "\n".join(masked.notes)
    assert f": {count(gm):,} " in told
    assert f", {count(small):,} when shrunk" in told
    assert "solver HiGHS, gap 0.0" in told


def made_up_times(gm, regions):
    """Time that is all in the linear layer: 3 us a channel that it reads."""
    assert [region.name for region in regions if not region.nodes] == [RUN]
    return {
        region.name: {point: 3.0 * point[0] if region.name == "linear" else 0.0 for point in region.shapes}
        for region in regions
    }


def test_a_budget_of_latency_follows_the_times_that_it_is_given():
    model, x = plain()
    gm = captured(model, x)
    masked = Prune(budget="latency:0.5", costs=made_up_times, min_sqnr_db=-60.0)(gm)
    small = ShrinkMasked()(masked.gm).gm
    assert small.get_parameter("0.weight").shape[0] == 16
    assert small.get_parameter("3.weight").shape[0] == 6
    assert "budget latency:0.5: 36 time, 18 when shrunk (50.0%)" in masked.notes[0]


def test_times_can_be_handed_over_as_a_table():
    model, x = plain()
    gm = captured(model, x)
    kept = {}

    def keep(graph, regions):
        kept.update(made_up_times(graph, regions))
        return kept

    first = Prune(budget="latency:0.5", costs=keep).make_plan(gm)
    assert Prune(budget="latency:0.5", costs=kept).make_plan(gm) == first


def test_regions_take_in_what_is_fused_and_leave_nothing_out_twice():
    model, x = residual()
    gm = captured(model, x)
    _, widths = widths_of(gm)
    regions = regions_of(widths, sample_shapes(gm))
    nodes = [name for region in regions for name in region.nodes]
    assert sorted(nodes) == sorted({n.name for n in gm.graph.nodes if n.op == "call_function"})
    assert [region.nodes for region in regions if "conv2d_2" in region.nodes] == [("conv2d_2", "add", "relu_2")]
    wide = next(region for region in regions if region.name == "conv2d_2")
    assert len(wide.coordinates) == 2
    shapes = wide.shapes[min(wide.shapes)]
    assert shapes["conv2d_2"] == shapes["relu"] == (2, 1, 8, 8)


def test_padding_before_a_convolution_is_measured_with_it():
    def forward(self, x):
        return self.last(self.second(F.pad(self.first(x), (2, 1, 0, 3))).relu())

    model = net(forward, first=nn.Conv2d(3, 6, 1), second=nn.Conv2d(6, 5, 3), last=nn.Conv2d(5, 2, 1))
    gm = captured(model, IMAGES)
    _, widths = widths_of(gm)
    region = next(each for each in regions_of(widths, sample_shapes(gm)) if each.name == "conv2d_1")
    assert region.nodes == ("pad", "conv2d_1", "relu")
    assert region.shapes[6, 5]["pad"] == (2, 6, 11, 11)


def test_regions_of_concatenations_have_shapes_that_fit_each_other():
    model, x = dense()
    gm = captured(model, x)
    _, widths = widths_of(gm)
    for region in regions_of(widths, sample_shapes(gm)):
        for shapes in region.shapes.values():
            if region.name.startswith("conv"):
                node = next(n for n in gm.graph.nodes if n.name == region.name)
                assert shapes[node.args[0].name][1] == shapes[node.args[1].name][1]
                assert shapes[node.name][1] == shapes[node.args[1].name][0]
    terms = latency_terms(
        regions := regions_of(widths, sample_shapes(gm)),
        {region.name: {point: float(sum(point)) for point in region.shapes} for region in regions},
        widths,
    )
    assert total(terms, widths.full) > total(terms, (0,) * len(widths.options))


def test_min_kept_and_multiple_hold():
    model, x = plain()
    small = ShrinkMasked()(Prune(budget="params:0.5", min_kept=3, multiple=3)(captured(model, x)).gm).gm
    for name in ("0.weight", "3.weight"):
        assert small.get_parameter(name).shape[0] in (3, 6, 9, 12, 15, 16)


def test_a_budget_is_met_together_with_other_passes():
    model, x = plain()
    small = fxopt.optimize(model, [Prune(budget="macs:0.6", min_sqnr_db=-60.0), ShrinkMasked()], example_inputs=(x,))
    assert counted_macs(small, x) <= 0.6 * counted_macs(captured(model, x), x)


# ---- refusals


def test_a_budget_that_cannot_be_met_names_the_smallest_share_and_what_limits_it():
    model, x = plain()
    gm = captured(model, x)
    _, widths = widths_of(gm, min_kept=8)
    terms = mac_terms(widths, sample_shapes(gm))
    least = total(terms, (0,) * len(widths.options)) / total(terms, widths.full)
    with pytest.raises(PassError, match=re.escape("the budget macs:0.05 cannot be met")) as caught:
        Prune(budget="macs:0.05", min_kept=8).make_plan(gm)
    text = str(caught.value)
    assert f"{least:.4f} of the multiply-accumulates at the narrowest widths; most of it is conv2d" in text
    assert "5.weight cannot be pruned: " in text.replace("6.weight", "5.weight")
    reachable = re.search(r"budget='(macs:[\d.]+)'", text)
    assert reachable is not None
    assert math.isclose(Budget.parse(reachable[1]).share, least, abs_tol=2e-3)
    Prune(budget=reachable[1], min_kept=8).make_plan(gm)


@pytest.mark.parametrize(
    "budget", ["", "macs", "macs:", "macs:1", "macs:0", "macs:nan", "time:0.5", "0.5", 0.5, "macs:half", "macs:-1"]
)
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(
        ValueError, match=re.escape(f"budget is {budget!r}; wanted one of macs, params, bytes, latency")
    ):
        Prune(budget=budget)


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="got fraction and budget"):
        Prune(0.5, budget="macs:0.5")
    with pytest.raises(ValueError, match="granularity is 'weights', and a budget chooses how many channels or heads"):
        Prune(budget="macs:0.5", granularity="weights")
    with pytest.raises(ValueError, match=r"a budget of latency needs costs=fxopt\.export\.width_costs"):
        Prune(budget="latency:0.5")
    with pytest.raises(ValueError, match=r"costs are for a budget of latency, and the budget is 'macs:0.5'"):
        Prune(budget="macs:0.5", costs={})
    with pytest.raises(ValueError, match="costs are for a budget of latency"):
        Prune(0.5, costs={})
    with pytest.raises(ValueError, match=r"costs is a int; wanted fxopt\.export\.width_costs"):
        Prune(budget="latency:0.5", costs=3)


def test_times_that_do_not_fit_are_refused():
    model, x = plain()
    gm = captured(model, x)
    with pytest.raises(PassError, match=re.escape("costs has no time of (run), conv2d")):
        Prune(budget="latency:0.5", costs={}).make_plan(gm)

    def negative(graph, regions):
        return {region.name: dict.fromkeys(region.shapes, -1.0) for region in regions}

    with pytest.raises(PassError, match=re.escape("the cost of (run) at () is -1.0; wanted a finite number")):
        Prune(budget="latency:0.5", costs=negative).make_plan(gm)
