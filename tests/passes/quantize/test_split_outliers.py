"""Channels that dwarf all others: which are taken out, that the function stays, and what it brings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.numerics import measure
from fxopt.passes import Quantize, SplitOutliers
from fxopt.passes.quantize import split_outliers
from fxopt.passes.quantize.calibrate import calibrate
from fxopt.passes.quantize.observations import Observations
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.split_outliers import inputs_of_wide_layers, outlier_channels
from fxopt.testing import check_pass


class Massive(nn.Module):
    """Two layers with a hidden unit that is 50 times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            self.up.bias[7] = 60.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


X = torch.randn(3, 16, 64)


def prepared(net):
    return fxopt.optimize(net.eval(), PREPARATION, (X,), strict=True)


@pytest.mark.parametrize(("largest", "want"), [
    ([1, 1, 50, 1], [2]), ([40, 1, 50, 1], [0, 2]), ([1, 1, 1.9, 1], []), ([50, 49, 48, 1], []), ([5, 5, 5, 5], []),
    ([0, 0, 3, 0], [2]), ([7], []), ([100, 95, 1, 1], [0, 1]),
])  # fmt: skip
def test_the_fewest_channels_that_halve_the_range(largest, want):
    assert outlier_channels(torch.tensor(largest, dtype=torch.float32), 2, 2.0) == want


def test_the_function_stays_and_the_range_shrinks():
    gm = prepared(Massive())
    result = check_pass(SplitOutliers(), gm)
    result.gm.recompile()
    assert bool((result.gm.get_parameter("down.weight")[:, 7] == 0).all())
    plans = [Quantize(recipe="fast").make_plan(graph) for graph in (gm, result.gm)]
    before, after = (plan["gelu"].range[1] for plan in plans)
    assert after < before / 10  # the channel that no weight multiplies does not count


def test_what_was_seen_before_is_not_calibrated_again(monkeypatch):
    gm = prepared(Massive())
    names = inputs_of_wide_layers(gm)
    assert names == {"x", "gelu"}
    seen = Observations(calibrate(gm, names, gm.samples, channels=dict.fromkeys(names, -1)))
    want = SplitOutliers()(gm).gm
    monkeypatch.setattr(split_outliers, "calibrate", lambda *args, **options: pytest.fail("it was calibrated again"))
    found = SplitOutliers(seen=seen)(gm).gm
    for graph in (want, found):
        graph.recompile()
    assert torch.equal(want(X), found(X))


def test_the_hidden_unit_is_computed_from_the_floats_in_front():
    gm = SplitOutliers()(prepared(Massive())).gm
    gm.recompile()
    small = fxopt.optimize(gm, [Quantize(recipe="fast")], strict=True)
    plain = fxopt.optimize(prepared(Massive()), [Quantize(recipe="fast")], strict=True)
    assert measure(gm(X), small(X)).sqnr_db > 30
    assert len([node for node in small.graph.nodes if node.target is torch.ops.aten.gelu.default]) == 2
    assert len([node for node in plain.graph.nodes if node.target is torch.ops.aten.gelu.default]) == 1


class TwoMassive(nn.Module):
    """A layer of whose input two channels are 80 and 60 times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(64), nn.Linear(64, 128)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[9] = 80.0, 60.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.norm(x))


def test_two_channels_are_one_product_of_floats():
    gm = prepared(TwoMassive())
    result = check_pass(SplitOutliers(), gm)
    result.gm.recompile()
    assert bool((result.gm.get_parameter("up.weight")[:, [3, 9]] == 0).all())
    products = [node for node in result.gm.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [node.args[1].meta["val"].shape[1] for node in products] == [2, 64]
    plan = Quantize(recipe="fast").make_plan(result.gm)
    assert plan.notes[products[0].name] == "each number is the sum of 2 products alone"
    small = fxopt.optimize(result.gm, [Quantize(recipe="fast")], strict=True)
    plain = fxopt.optimize(gm, [Quantize(recipe="fast")], strict=True)
    assert measure(gm(X), small(X)).sqnr_db > 10 + measure(gm(X), plain(X)).sqnr_db


def test_even_channels_are_left_alone():
    gm = prepared(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)))
    assert not SplitOutliers()(gm).modified


def test_the_recipe_takes_it_where_it_helps():
    small = fxopt.optimize(prepared(Massive()), ["quantize"], calibration=[(X,), (X.flip(0),)], strict=True)
    assert any(note.startswith("split-outliers: ") and note.endswith("kept") for note in small.report.steps[0].notes)


@pytest.mark.parametrize(("options", "why"), [({"most": 0}, "most is 0"), ({"ratio": 1.0}, "ratio is 1.0")])
def test_options_that_make_no_sense_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        SplitOutliers(**options)
