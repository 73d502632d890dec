"""What pruning refuses, and that the message says what, where, and what to try."""

from __future__ import annotations

import math
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxopt
from fxopt.passes import InsertMasks, MaskPlan, OneShot, Prune, Pruner, Quantize, ShrinkMasked, fine_tune
from fxopt.tools.cli import app
from tests.passes.prune.nets import net
from tests.tools.bad_inputs import inside

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def two_layers() -> nn.Module:
    return net(lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3))


@pytest.fixture(scope="module")
def gm() -> fxopt.CapturedModule:
    torch.manual_seed(2)
    return fxopt.capture(two_layers(), (X,))


def mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


# ---- options

OPTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "fraction 0": (lambda: Prune(0), ValueError, "fraction is 0; wanted a share above 0 and below 1 of what goes"),
    "fraction 1": (lambda: Prune(1), ValueError, "fraction is 1; wanted a share above 0 and below 1"),
    "fraction in percent": (lambda: Prune(50), ValueError, "fraction is 50; wanted a share"),
    "fraction negative": (lambda: Prune(-0.5), ValueError, r"fraction is -0\.5; wanted a share"),
    "fraction NaN": (lambda: Prune(math.nan), ValueError, "fraction is nan; wanted a share"),
    "fraction a text": (lambda: Prune("0.5"), TypeError, r"fraction is '0\.5'; wanted a number, such as 0\.5"),  # type: ignore[arg-type]  # the test's point
    "nothing said": (lambda: Prune(), ValueError, r"exactly one of fraction, threshold.* and plan: .* got none"),
    "two things said": (lambda: Prune(0.5, threshold=0.1), ValueError, "got fraction and threshold"),
    "fraction beside a pattern": (
        lambda: Prune(0.5, "2:4"),
        ValueError,
        "'2:4' says itself what stays; leave fraction",
    ),
    "threshold negative": (lambda: Prune(threshold=-1.0), ValueError, r"threshold is -1\.0; wanted a finite score"),
    "threshold infinite": (lambda: Prune(threshold=math.inf), ValueError, "threshold is inf; wanted a finite score"),
    "granularity unknown": (
        lambda: Prune(0.5, "rows"),
        ValueError,
        "granularity is 'rows'; wanted 'channels', 'heads'",
    ),
    "granularity no text": (lambda: Prune(0.5, 4), TypeError, "granularity is 4; wanted a text"),  # type: ignore[arg-type]  # the test's point
    "pattern of all": (lambda: Prune(granularity="4:4"), ValueError, "granularity is '4:4'; wanted n of m"),
    "pattern of none": (lambda: Prune(granularity="0:4"), ValueError, "granularity is '0:4'; wanted n of m"),
    "block without rows": (lambda: Prune(0.5, "block:0x4"), ValueError, "wanted blocks of one row and one column"),
    "importance unknown": (lambda: Prune(0.5, importance="l3"), ValueError, "importance is 'l3'; wanted one of l1, l2"),
    "importance a number": (lambda: Prune(0.5, importance=2), TypeError, "importance is 2; wanted one of l1, l2"),  # type: ignore[arg-type]  # the test's point
    "scope unknown": (lambda: Prune(0.5, scope="net"), ValueError, "scope is 'net'; wanted one of layer, global"),  # type: ignore[arg-type]  # the test's point
    "none kept": (lambda: Prune(0.5, min_kept=0), ValueError, "min_kept is 0; wanted 1 or more"),
    "half a channel kept": (lambda: Prune(0.5, min_kept=1.5), TypeError, r"min_kept is 1\.5; wanted a whole number"),  # type: ignore[arg-type]  # the test's point
    "multiple of 0": (lambda: Prune(0.5, multiple=0), ValueError, "multiple is 0; wanted 1 or more"),
    "skip one text": (lambda: Prune(0.5, skip="a.*"), TypeError, r"skip is 'a\.\*'; wanted a tuple of patterns"),  # type: ignore[arg-type]  # the test's point
    "plan a dict": (lambda: Prune(plan={}), TypeError, "plan is {}; wanted a MaskPlan"),  # type: ignore[arg-type]  # the test's point
    "masks in a dict": (lambda: InsertMasks({}), TypeError, "plan is a dict; wanted a MaskPlan"),  # type: ignore[arg-type]  # the test's point
}


@pytest.mark.parametrize(("make", "kind", "message"), OPTIONS.values(), ids=OPTIONS)
def test_option_is_refused(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


# ---- masks and plans


def test_mask_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"the mask of 'a\.weight' is f32\[8, 6\]; wanted a tensor of bool, true where"):
        MaskPlan({"a.weight": torch.ones(8, 6)})
    with pytest.raises(TypeError, match=r"the mask of 'a\.weight' is list; wanted a tensor of bool"):
        MaskPlan({"a.weight": [True]})  # type: ignore[dict-item]  # the test's point


def test_mask_of_another_shape_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError) as caught:
        InsertMasks(MaskPlan({"a.weight": mask(6, 8)}))(gm)
    assert str(caught.value).splitlines() == [
        "the mask of 'a.weight' has another shape than the parameter",
        "  got     bool[6, 8]",
        "  wanted  bool[8, 6]",
    ]


def test_mask_of_an_unknown_name_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError) as caught:
        InsertMasks(MaskPlan({"a.wieght": mask(8, 6)}))(gm)
    assert str(caught.value).splitlines() == [
        "the plan masks 'a.wieght', and the graph has no such parameter",
        "  wanted  a.weight, a.bias",
        "  try     make the plan on the graph that it is applied to: Prune(...).make_plan(gm)",
    ]


def test_plan_for_another_graph_is_refused(gm: fxopt.CapturedModule) -> None:
    other = net(lambda self, x: self.d(self.c(x).relu()), c=nn.Linear(6, 8), d=nn.Linear(8, 3))
    plan = Prune(0.5).make_plan(fxopt.capture(other, (X,)))
    with pytest.raises(fxopt.PassError, match=r"the plan masks 'c\.weight', and the graph has no such parameter"):
        fxopt.optimize(gm, [Prune(plan=plan)], strict=True)


def test_mask_of_a_norm_that_is_none_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(
        fxopt.PassError, match="masks channels of 'relu', and no layer norm or group norm has that name"
    ):
        InsertMasks(MaskPlan({}, {"relu": mask(8)}))(gm)


def test_mask_of_a_norm_of_another_size_is_refused() -> None:
    gm = fxopt.capture(nn.LayerNorm(6), (X,))
    with pytest.raises(
        fxopt.PassError, match=r"'layer_norm' has another shape\n\s+got\s+bool\[4\]\n\s+wanted\s+bool\[6\]"
    ):
        InsertMasks(MaskPlan({}, {"layer_norm": mask(4)}))(gm)


def test_pattern_that_no_parameter_of_the_plan_fits_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"no parameter of the plan fits 'c\.\*'\n\s+wanted\s+a\.weight, a\.bias"):
        Prune(0.5).make_plan(gm).without("c.*")


def test_skip_that_fits_no_parameter_is_refused(gm: fxopt.CapturedModule) -> None:
    for granularity in ("channels", "weights"):
        with pytest.raises(fxopt.PassError, match=r"skip names 'c\.\*', and no parameter fits it"):
            Prune(0.5, granularity, skip=("c.*",)).make_plan(gm)


CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "a text": b"no archive",
    "cut off": b"PK\x03\x04 cut off",
    "a pickle": pickle.dumps([1, 2], protocol=2),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_file_that_holds_no_plan_is_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "plan.pt"
    path.write_bytes(content)
    with pytest.raises(fxopt.PassError, match=r"plan\.pt holds no plan of masks"):
        MaskPlan.load(path)


@pytest.mark.parametrize("held", [torch.ones(2), {"masks": {}}, {"masks": 3, "channels": {}, "notes": {}}, 7])
def test_file_of_torch_that_holds_something_else_is_refused(tmp_path: pathlib.Path, held: Any) -> None:
    torch.save(held, tmp_path / "plan.pt")
    with pytest.raises(fxopt.PassError, match=r"holds no plan of masks.*\n.*\n\s+wanted\s+a file that MaskPlan\.save"):
        MaskPlan.load(tmp_path / "plan.pt")


# ---- graphs with nothing to prune


def test_layer_whose_outputs_are_those_of_the_model_is_refused_and_the_reason_said() -> None:
    gm = fxopt.capture(nn.Linear(6, 4), (X,))
    with pytest.raises(fxopt.PassError) as caught:
        Prune(0.5).make_plan(gm)
    assert str(caught.value).splitlines() == [
        "prune finds no channels to prune",
        "  because  weight: its outputs stay: it is an output of the model",
        "  try      another granularity or importance, or fewer patterns in skip",
    ]


def test_layer_whose_outputs_are_those_of_the_model_is_not_offered(gm: fxopt.CapturedModule) -> None:
    result = Prune(0.5, min_sqnr_db=-1000.0)(gm)
    assert [(skip.node, skip.why) for skip in result.skips] == [
        ("b.weight", "its outputs stay: it is an output of the model")
    ]
    assert MaskPlan.of(result.gm)["b.weight"].any(dim=1).all()


def test_asking_only_for_the_last_layer_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"b\.weight: its outputs stay: it is an output of the model"):
        Prune(0.5, skip=("a.*",)).make_plan(gm)


def test_heads_of_a_net_without_attention_are_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError, match=r"finds no heads to prune\n.*the graph computes no attention by heads"):
        Prune(0.5, "heads").make_plan(gm)


def test_pattern_that_divides_no_weight_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(fxopt.PassError) as caught:
        Prune(granularity="3:5").make_plan(gm)
    assert str(caught.value).splitlines()[:2] == [
        "prune finds no 3:5 to prune",
        "  because  a.weight: its 6 inputs are no multiple of 5; b.weight: its 8 inputs are no multiple of 5",
    ]


def test_pattern_that_does_not_divide_one_weight_leaves_it_whole_and_says_so(gm: fxopt.CapturedModule) -> None:
    plan = Prune(granularity="2:4").make_plan(gm)
    assert list(plan) == ["b.weight"]
    assert plan.notes == {"a.weight": "its 6 inputs are no multiple of 4"}


# ---- graphs in another state


@pytest.fixture(scope="module")
def quantized() -> fxopt.CapturedModule:
    torch.manual_seed(2)
    return fxopt.optimize(fxopt.capture(two_layers(), (torch.randn(16, 6),)), [Quantize()], strict=True)


def test_quantized_graph_is_refused(quantized: fxopt.CapturedModule) -> None:
    with pytest.raises(
        fxopt.PreconditionError, match=r"prune works on a graph without quantizers\n\s+got .*, a call of"
    ):
        Prune(0.5).make_plan(quantized)
    with pytest.raises(fxopt.PreconditionError, match="prune first, then quantize"):
        Pruner(quantized, Prune(0.5, "weights"), OneShot(0.5))


@pytest.mark.parametrize("item", [Prune(0.5), InsertMasks(), ShrinkMasked()])
def test_order_that_quantizes_first_is_refused(gm: fxopt.CapturedModule, item: fxopt.Pass) -> None:
    with pytest.raises(fxopt.PassOrderError, match=rf"{item.name} \(step 2\) needs 'no-qdq', but quantize \(step 1\)"):
        fxopt.optimize(gm, [Quantize(), item])


def test_plain_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"prune plans for a captured graph and got a Linear; call fxopt\.capture"):
        Prune(0.5).make_plan(nn.Linear(6, 4))  # type: ignore[arg-type]  # the test's point


# ---- pruners


def pruner(gm: fxopt.CapturedModule, **options: Any) -> Pruner:
    return Pruner(gm.clone(copy_tensors=True), Prune(0.5), OneShot(0.5), **options)


def test_pruner_of_a_plain_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"trains a captured graph and got a Linear; call fxopt\.capture first"):
        Pruner(nn.Linear(6, 4), Prune(0.5), OneShot(0.5))  # type: ignore[arg-type]  # the test's point


def test_pruner_without_a_pass_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(TypeError, match=r"prune is 0\.5; wanted a pass, such as Prune\(0\.5\)"):
        Pruner(gm, 0.5, OneShot(0.5))  # type: ignore[arg-type]  # the test's point


def test_pruner_without_a_schedule_is_refused(gm: fxopt.CapturedModule) -> None:
    with pytest.raises(TypeError, match=r"schedule is 0\.5; wanted one such as OneShot\(0\.5\), with fraction_at"):
        Pruner(gm, Prune(0.5), 0.5)  # type: ignore[arg-type]  # the test's point


@pytest.mark.parametrize("item", [Prune(threshold=0.1), Prune(plan=MaskPlan({}))])
def test_pruner_of_a_pass_without_a_fraction_is_refused(gm: fxopt.CapturedModule, item: Prune) -> None:
    with pytest.raises(ValueError, match="has no fraction, which the schedule is to set"):
        Pruner(gm, item, OneShot(0.5))


def test_schedule_that_gives_no_share_is_refused(gm: fxopt.CapturedModule) -> None:
    class Wrong:
        def fraction_at(self, step: int) -> float:
            return 1.5

    with pytest.raises(ValueError, match=r"the schedule gives 1\.5 at step 1; wanted a share from 0 and below 1"):
        Pruner(gm, Prune(0.5), Wrong()).step()


def test_optimizer_of_another_model_is_refused(gm: fxopt.CapturedModule) -> None:
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(fxopt.PassError, match="the optimizer trains none of the parameters that are pruned"):
        pruner(gm, optimizer=other)
    late = pruner(gm)
    late.optimizer = other
    with pytest.raises(fxopt.PassError, match=r"wanted\s+parameters of pruner\.gm"):
        late.step()


def test_state_of_another_pruner_is_refused(gm: fxopt.CapturedModule) -> None:
    state = pruner(gm).state_dict()
    with pytest.raises(fxopt.PassError, match="this is no state of a Pruner\n  got  no masks, channels"):
        pruner(gm).load_state_dict({"steps": 1, "fraction": 0.5})
    state["masks"]["a.weight"] = mask(4, 6)
    with pytest.raises(fxopt.PassError, match=r"another graph.*\n.*a\.weight: \(4, 6\)\n.*a\.weight: \(8, 6\)"):
        pruner(gm).load_state_dict(state)


def test_fine_tuning_that_cannot_work_is_refused(gm: fxopt.CapturedModule) -> None:
    own = pruner(gm)
    batches = [X]

    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).sum() * torch.nan  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="epochs is 0; wanted 1 or more"):
        fine_tune(own.gm, batches, loss, epochs=0)
    with pytest.raises(ValueError, match=r"masks another graph than the one that is trained; pass pruner\.gm"):
        fine_tune(gm, batches, loss, epochs=1, pruner=own)
    with pytest.raises(ValueError, match="epoch 1 has no batches"):
        fine_tune(own.gm, [], loss, epochs=1)
    with pytest.raises(ValueError, match="epoch 1 has a loss that is not finite"):
        fine_tune(own.gm.clone(copy_tensors=True), batches, loss, epochs=1)


# ---- the command line

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, image):
        return self.last(self.first(image).relu())
"""


def command(folder: pathlib.Path, passes: str) -> tuple[int, str, str]:
    (folder / "net.py").write_text(NET)
    arguments = ["optimize", "net.py:Net", "--inputs", "f32[batch,3,8,8]", "-o", "net.onnx", "-p", passes]
    with inside(folder):
        result = CliRunner().invoke(app, arguments, prog_name="fxopt")
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.ort
def test_command_prunes_and_shrinks(tmp_path: pathlib.Path) -> None:
    onnx = pytest.importorskip("onnx")
    status, stdout, stderr = command(tmp_path, "prune{fraction=0.5,multiple=2},shrink-masked")
    assert status == 0, stderr
    assert "prune{fraction=0.5,multiple=2}  changed" in stdout
    shapes = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert {(4, 3, 3, 3), (4, 4, 3, 3)} <= shapes


COMMANDS: dict[str, tuple[str, str]] = {
    "fraction above 1": ("prune{fraction=2}", "fraction is 2.0; wanted a share above 0 and below 1 of what goes"),
    "fraction a word": ("prune{fraction=half}", "option 'fraction' of 'prune' is 'half'; wanted float | None"),
    "no fraction": ("prune", "give exactly one of fraction, threshold"),
    "no importance": ("prune{fraction=0.5,importance=l3}", "importance is 'l3'; wanted one of l1, l2"),
    "no option": ("prune{share=0.5}", "pass 'prune' has no option 'share'"),
}


@pytest.mark.parametrize(("passes", "message"), COMMANDS.values(), ids=COMMANDS)
def test_command_that_is_wrong_fails_with_status_2(tmp_path: pathlib.Path, passes: str, message: str) -> None:
    status, _, stderr = command(tmp_path, passes)
    assert status == 2
    assert message in stderr.replace("\n", " ")
    assert "Traceback" not in stderr
    assert not (tmp_path / "net.onnx").exists()
