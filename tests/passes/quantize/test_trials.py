"""Trials of ways to quantize: what they learn of and are measured on, and that all inputs give the scales."""

import dataclasses

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import CalibrationError
from fxopt.numerics import measure
from fxopt.passes import Quantize, SmoothQuant, SplitOutliers
from fxopt.passes.quantize import recipe as recipe_module
from fxopt.passes.quantize import resolve as resolve_module
from fxopt.passes.quantize import smooth_quant, split_outliers
from fxopt.passes.quantize.calibrate import calibrate
from fxopt.passes.quantize.correct_bias import channel_means
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.simulate import run_by_node
from fxopt.passes.quantize.target import ORT_CPU
from fxopt.passes.quantize.trials import Trials, _rows_to_try
from fxopt.quantized_ops import QUANTIZE

IMAGES = torch.randn(100, 3, 8, 8)
LATE = torch.cat([IMAGES[:80], 50 * IMAGES[80:]])  # what comes late is larger


def prepared(net, *, x=IMAGES, dims={0: "batch"}):  # noqa: B006  # read alone
    gm = fxopt.capture(net.eval(), (x[:2],), dynamic_shapes=(dims,), modes="current")
    return fxopt.optimize(gm, PREPARATION, strict=True)


def convolutions():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))


class Counted:
    """A loader that counts how many of its items are read."""

    def __init__(self, items):
        self.items, self.read = items, 0

    def __iter__(self):
        for item in self.items:
            self.read += 1
            yield item


def quantized(gm, items, **options):
    return fxopt.optimize(gm, [Quantize(min_sqnr_db=-99, **options)], calibration=items, strict=True)


def first_scale(gm):
    node = next(node for node in gm.graph.nodes if node.target is QUANTIZE)
    return float(gm.get_buffer(str(node.args[1].target)))


def test_scales_come_from_all_inputs_and_trials_from_the_first():
    small = quantized(prepared(convolutions()), [(rows,) for rows in LATE.split(5)], method="minmax")
    assert first_scale(small) * 255 == pytest.approx(float(LATE.max() - LATE.min()), rel=1e-6)
    assert any(note.startswith("minmax of all calibration inputs: ") for note in small.report.steps[0].notes)


def test_inputs_that_all_are_tried_on_are_not_calibrated_again():
    loader = Counted([(rows,) for rows in IMAGES[:64].split(4)])
    small = quantized(prepared(convolutions()), loader)
    assert not any("of all calibration inputs" in note for note in small.report.steps[0].notes)
    assert loader.read == 16


def test_many_inputs_are_read_once_from_end_to_end():
    loader = Counted([(rows,) for rows in IMAGES.repeat(5, 1, 1, 1).split(5)])
    quantized(prepared(convolutions()), loader)
    assert 100 <= loader.read <= 100 + 20  # and those of the trials before that


@pytest.mark.parametrize("images", [LATE, LATE.flip(0)], ids=["large last", "large first"])
def test_a_generator_gives_all_it_has(images):
    small = quantized(prepared(convolutions()), ((rows,) for rows in images.split(5)), method="minmax")
    assert first_scale(small) * 255 == pytest.approx(float(LATE.max() - LATE.min()), rel=1e-6)


def test_a_budget_reads_what_a_generator_gave():
    small = quantized(prepared(convolutions()), ((rows,) for rows in IMAGES.split(5)), metric=lambda model: 1.0)
    assert any(note.startswith("try 1: ") for note in small.report.steps[0].notes)


@pytest.mark.parametrize("number", [3, 17])
def test_an_input_that_overflows_is_named_as_the_user_counts(number):
    items = [(rows.clone(),) for rows in IMAGES.split(5)]
    items[number][0].fill_(3e38)  # finite, and the sums of a convolution are not
    net = convolutions()
    nn.init.constant_(net[0].weight, 1.0)
    with pytest.raises(CalibrationError, match=f"item {number} of the calibration data: relu"):
        Quantize()(with_calibration(prepared(net), items))


def with_calibration(gm, items):
    gm.calibration = items
    return gm


def test_calibration_goes_on_after_a_crash(tmp_path):
    gm, path = prepared(convolutions()), tmp_path / "state"
    items = [(rows,) for rows in LATE.split(5)]

    class Crashing:
        def __iter__(self):
            yield from items[:19]
            raise ConnectionError("the disk is gone")

    patched = pytest.MonkeyPatch()
    patched.setattr("fxopt.passes.quantize.calibrate.calibrate.__kwdefaults__", {
        **calibrate.__kwdefaults__, "checkpoint_seconds": 0
    })  # fmt: skip
    with patched.context(), pytest.raises(ConnectionError):
        Quantize(checkpoint=str(path))(with_calibration(gm, Crashing()))
    patched.undo()
    assert path.exists()
    again = quantized(gm, items, checkpoint=str(path))
    assert not path.exists()
    assert first_scale(again) == first_scale(quantized(gm, items))


class Sided(nn.Module):
    """Goes another way for large inputs, which come late."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        if x.abs().max() > 20:
            return self.large(x)
        return self.small(x)


def test_a_side_that_only_late_inputs_take_is_quantized():
    gm = fxopt.capture(Sided().eval(), (IMAGES[:2],))
    small = quantized(gm, [(rows,) for rows in LATE.split(2)])
    sides = [module for module in small.modules() if isinstance(module, torch.fx.GraphModule) and module is not small]
    counts = [sum(node.target is QUANTIZE for node in side.graph.nodes) for side in sides]
    assert len(counts) == 2
    assert all(counts)


def test_what_is_gathered_in_one_run_is_what_runs_by_node_give():
    gm = prepared(convolutions())
    trials = Trials(gm, [(rows,) for rows in IMAGES.split(4)], ORT_CPU, no_saturation=True)
    assert [len(item.args[0]) for item in trials.items] == [32, 32]
    assert trials.more
    found = trials.tried(gm, Quantize(recipe="fast")._plan(gm), ("minmax",))
    want = channel_means(gm, ORT_CPU, trials.items[:1])
    assert found.means.keys() == want.keys()
    for name, mean in want.items():
        torch.testing.assert_close(found.means[name], mean)
    (outputs,) = run_by_node(gm, trials.items[1:])
    torch.testing.assert_close(trials._want[0], outputs)


@pytest.mark.parametrize(
    ("size", "rows", "together"), [(8, 64, 32), (720, 64, 4), (840, 47, 2), (1024, 32, 2), (2048, 32, 1)]
)
def test_fewer_rows_of_what_is_large(size, rows, together):
    net, x = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU()), torch.zeros(2, 1, size, size)  # 32 * size**2 bytes a row
    gm = fxopt.capture(net.eval(), (x,), dynamic_shapes=({0: "batch"},), modes="current", verify=False)
    assert _rows_to_try(gm) == (rows, together)


@pytest.mark.parametrize(("count", "sizes", "more"), [(1, [1], False), (7, [4, 3], False), (100, [32, 32], True)])
def test_one_input_of_many_rows_is_halved(count, sizes, more):
    trials = Trials(prepared(convolutions()), [(IMAGES[:count],)], ORT_CPU, no_saturation=True)
    assert [len(item.args[0]) for item in trials.items] == sizes
    assert trials.more is more
    assert torch.equal(torch.cat([item.args[0] for item in trials.items]), IMAGES[: sum(sizes)])


def test_one_input_of_many_rows_gives_all_scales():
    small = quantized(prepared(convolutions()), [(LATE,)], method="minmax")
    assert first_scale(small) * 255 == pytest.approx(float(LATE.max() - LATE.min()), rel=1e-6)


def test_one_input_of_a_fixed_batch_is_tried_on_as_a_whole():
    gm = fxopt.optimize(fxopt.capture(convolutions().eval(), (IMAGES,)), PREPARATION, strict=True)
    trials = Trials(gm, [(IMAGES,)], ORT_CPU, no_saturation=True)
    assert [len(item.args[0]) for item in trials.items] == [100]


@pytest.mark.parametrize(("sizes", "left"), [
    ((100,), [*range(32)]), ((64, 36), [*range(32), *range(64, 100)]), ((10,) * 10, [*range(40), *range(70, 100)]),
])  # fmt: skip
def test_what_is_measured_on_is_not_learned_from(sizes, left):
    numbered = IMAGES.clone()
    numbered[:, 0, 0, 0] = torch.arange(100.0)
    gm = prepared(convolutions())
    trials = Trials(gm, [(rows,) for rows in numbered.split(sizes)], ORT_CPU, no_saturation=True)
    found = torch.cat([sample.args[0] for sample in trials.not_measured()])
    assert found[:, 0, 0, 0].tolist() == left


def test_another_plan_of_the_same_graph_needs_no_run():
    gm = prepared(convolutions())
    trials = Trials(gm, [(rows,) for rows in IMAGES.split(4)], ORT_CPU, no_saturation=True)
    runs = []
    seen = lambda done, total: runs.append(done)  # noqa: E731
    plan = Quantize(recipe="fast")._plan(gm)
    trials.tried(gm, plan, ("minmax",), progress=seen)
    assert runs == [1, 2]
    fewer = Quantize(recipe="fast", skip=("conv2d",))._plan(gm)
    again = trials.tried(gm, fewer, ("minmax",), progress=seen)
    assert runs == [1, 2]
    assert (
        again.plan
        == Trials(gm, [(rows,) for rows in IMAGES.split(4)], ORT_CPU, no_saturation=True)
        .tried(gm, fewer, ("minmax",))
        .plan
    )
    trials.tried(gm.clone(), plan, ("minmax",), progress=seen)
    assert runs == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("item", "module"),
    [
        (SmoothQuant(alpha=None), smooth_quant),
        (SmoothQuant(alpha=0.5), smooth_quant),
        (SplitOutliers(), split_outliers),
    ],
)
def test_what_one_run_saw_serves_the_passes_that_are_tried(item, module, monkeypatch):
    tokens = torch.randn(40, 5, 64)
    norm = nn.LayerNorm(64)
    with torch.no_grad():
        norm.weight[3] = 40.0
    gm = prepared(nn.Sequential(norm, nn.Linear(64, 8)), x=tokens)
    trials = Trials(gm, [(rows,) for rows in tokens.split(5)], ORT_CPU, no_saturation=True)
    gm.calibration = trials.items
    want = item(gm)
    trials.tried(gm, Quantize(recipe="fast")._plan(gm), ("minmax",))
    monkeypatch.setattr(module, "calibrate", lambda *args, **options: pytest.fail("it was calibrated again"))
    found = dataclasses.replace(item, seen=trials.seen_of(gm))(gm)
    assert found.modified
    for changed in (want, found):
        changed.gm.recompile()
    assert torch.equal(found.gm(tokens), want.gm(tokens))
    other = dataclasses.replace(item, seen=trials.seen_of(gm.clone()))
    with pytest.raises(pytest.fail.Exception):
        other(gm)


class Viewed(nn.Module):
    """Asks how what a convolution yields lies in memory."""

    def __init__(self, *, copied):
        super().__init__()
        self.conv, self.head, self.copied = nn.Conv2d(3, 8, 3), nn.Linear(288, 4), copied

    def forward(self, x):
        y = self.conv(x)
        y = y.permute(0, 3, 2, 1).contiguous() if self.copied else y
        return self.head(y.view(y.shape[0], 288))


@pytest.mark.parametrize("copied", [True, False])
def test_images_lie_with_the_channels_last_where_nobody_asks(copied):
    gm, items = prepared(Viewed(copied=copied)), [(rows,) for rows in IMAGES.split(4)]
    trials = Trials(gm, items, ORT_CPU, no_saturation=True)
    assert trials.items[0].args[0].is_contiguous(memory_format=torch.channels_last) == copied
    small = quantized(gm, items)
    assert measure(gm(IMAGES), small(IMAGES)).sqnr_db > 30


def test_a_weight_that_no_trial_changes_gets_its_scales_once(monkeypatch):
    seen = []
    computed = resolve_module.channel_scales
    monkeypatch.setattr(resolve_module, "channel_scales", lambda weight, spec: seen.append(1) or computed(weight, spec))
    small = quantized(prepared(convolutions()), [(rows,) for rows in IMAGES.split(4)])
    assert len([note for note in small.report.steps[0].notes if "with correct-bias" in note]) == 2
    assert len(seen) == 3


def test_the_second_trial_takes_the_better_method_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    with torch.no_grad():
        net[0].weight[3] = 60.0
    x = torch.randn(100, 64)
    small = quantized(prepared(net, x=x), [(rows,) for rows in x.split(4)])
    tried = [note.split(":")[0] for note in small.report.steps[0].notes if "with correct-bias" in note]
    assert tried[:2] == ["mse", "minmax"]
    assert len([name for name in tried if name.startswith("split-outliers, ")]) == 1


class Scaled(fxopt.Pass):
    """Changes a weight, and maybe adds a call."""

    name = "scaled"

    def __init__(self, adds):
        self.adds = adds

    def run(self, rw):
        (node, *_) = rw.calls(torch.ops.aten.conv2d.default)
        rw.set_tensor(node.args[1], rw.tensor(node.args[1]) * 1.0, why="as before")
        if self.adds:
            rw.insert_call(torch.ops.aten.mul.Tensor, (node.args[0], 1.0), before=node, why="costs time")


@pytest.mark.parametrize(("adds", "gain", "kept"), [(True, 0.3, False), (True, 0.6, True), (False, 0.3, True)])
def test_what_adds_calls_must_gain_more(monkeypatch, adds, gain, kept):
    tried, results = Trials.tried, iter((30.0, 30.0 + gain))
    monkeypatch.setattr(recipe_module, "_transformations", lambda *_: [Scaled(adds)])
    monkeypatch.setattr(
        Trials, "tried", lambda *args, **kwargs: dataclasses.replace(tried(*args, **kwargs), sqnr_db=next(results))
    )
    small = quantized(prepared(convolutions()), [(rows,) for rows in IMAGES[:64].split(4)])
    (note,) = [note for note in small.report.steps[0].notes if note.startswith("scaled") and "kept" in note]
    assert note.endswith(", kept") is kept


def test_a_watch_sees_every_item_so_no_checkpoint_may_leave_some_out(tmp_path):
    gm = prepared(convolutions())
    with pytest.raises(ValueError, match="watch is to see every item"):
        calibrate(gm, [], [(IMAGES,)], watch=lambda item, node, value: None, checkpoint=tmp_path / "state")
