"""Convolutions of integers whose results stay floats: which they are, and that a recipe pays for accuracy only."""

import dataclasses

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import coverage, to_onnx
from fxopt.passes import InsertQdq, Quantize
from fxopt.passes.quantize.float_results import results_for_floats
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.target import GENERIC, ORT_CPU
from tests.models.randomized import randomized

IMAGES = torch.randn(8, 16, 12, 12, generator=torch.Generator().manual_seed(0))


def net(*behind, groups=1):
    return nn.Sequential(nn.Conv2d(16, 16, 3, groups=groups), *behind, nn.Conv2d(16, 8, 3))


def prepared(model):
    gm = fxopt.optimize(randomized(model).eval(), PREPARATION, example_inputs=(IMAGES,))
    gm.calibration = [(IMAGES,)]
    return gm


def found_in(model, target=ORT_CPU):
    gm = prepared(model)
    return results_for_floats(gm, Quantize(recipe="fast", target=target.name).make_plan(gm), target)


@pytest.mark.parametrize("behind", [nn.PReLU(16), nn.GELU(), nn.Mish(), nn.ELU(), nn.LayerNorm([16, 10, 10])])
def test_what_a_function_without_integers_reads_is_one_and_so_is_what_the_user_gets(behind):
    assert found_in(net(behind)) == ["conv2d", "conv2d_1"]


@pytest.mark.parametrize("behind", [nn.ReLU(), nn.MaxPool2d(2), nn.SiLU(), nn.LeakyReLU(), nn.Identity()])
def test_what_integers_read_is_none(behind):
    assert found_in(net(behind)) == ["conv2d_1"]


def test_what_integers_and_floats_read_is_none():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)

        def forward(self, x):
            y = self.first(x)
            return nn.functional.gelu(y), self.second(y).relu()

    assert found_in(Both()) == ["relu"]


def test_groups_have_no_such_kernel_and_neither_has_another_runtime():
    assert found_in(net(nn.GELU(), groups=2)) == ["conv2d_1"]
    assert found_in(net(nn.GELU()), GENERIC) == []


def test_windows_of_few_channels_take_longer_than_floats():
    few = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
    assert found_in(few) == []


@pytest.mark.parametrize("groups", [1, 2])
def test_a_plan_may_leave_the_result_out_where_there_is_such_a_kernel(groups):
    gm = prepared(net(nn.GELU(), groups=groups))
    plan = Quantize(recipe="fast").make_plan(gm).without("conv2d")
    result = InsertQdq(plan)(gm)
    refused = ["its result is not in the plan, and the kernel needs it in integers"]
    assert [skip.why for skip in result.skips] == (refused if groups == 2 else [])
    result.gm.recompile()
    assert coverage(to_onnx(result.gm)).kernels["conv"] == (2 if groups == 1 else 1, 2)


class Spread(nn.Module):
    """Channels whose size differs by a factor in front of PReLU, and counts the same behind it.

    Below 0 the slopes make all channels equal, so that only what stands in front of the PReLU has one scale too few.
    """

    def __init__(self, factor):
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(16, 16, 3), nn.PReLU(16), nn.Conv2d(16, 8, 3, groups=2)
        randomized(self)
        sizes = torch.logspace(0, 1, 16) ** torch.log10(torch.tensor(factor))
        with torch.no_grad():
            self.first.weight *= sizes[:, None, None, None]
            self.first.bias.fill_(0).sub_(8 * sizes)  # nearly everything is negative
            self.act.weight.copy_(1 / sizes)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize(("factor", "kept"), [(1.0, False), (200.0, True)])
def test_a_recipe_keeps_them_where_that_is_more_exact(factor, kept):
    gm = fxopt.optimize(
        Spread(factor).eval(), [Quantize(min_sqnr_db=-100.0)], example_inputs=(IMAGES,), calibration=[(IMAGES,)]
    )
    (step,) = gm.report.steps
    notes = [note for note in step.notes if note.startswith("float results of conv2d")]
    assert len(notes) == 1
    assert notes[0].endswith(", kept") is kept
    file = to_onnx(gm)
    assert coverage(file).kernels["conv"] == (2, 2)
    assert [node.op_type for node in file.model.graph].count("MatMulIntegerToFloat") == int(kept)


def test_a_budget_keeps_what_the_recipe_chose():
    model = Spread(200.0).eval()
    want = model(IMAGES)
    quantize = Quantize(metric=lambda net: -float((net(IMAGES) - want).abs().max()), max_drop=1.0)
    kwargs = {"example_inputs": (IMAGES,), "calibration": [(IMAGES,)], "strict": True}
    chosen = fxopt.optimize(model, [quantize], **kwargs)
    fast = fxopt.optimize(model, [dataclasses.replace(quantize, recipe="fast")], **kwargs)
    products = [
        [node.op_type for node in to_onnx(gm).model.graph].count("MatMulIntegerToFloat") for gm in (chosen, fast)
    ]
    assert products == [1, 0]
