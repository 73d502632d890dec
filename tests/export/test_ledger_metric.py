"""The metric of a ledger is asked about files that are called as the model is; what is wrong with it is said."""

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import InputError
from fxopt.export import ledger, to_onnx
from fxopt.export.ledger_model import OrtModel
from fxopt.interface import Interface, output_tree
from tests.export.ledger_nets import optimized

pytestmark = pytest.mark.ort


@dataclasses.dataclass(frozen=True)
class ReturnTwice(fxopt.Pass):
    """Return what the graph returns and, beside it, the same again."""

    name: ClassVar[str] = "return-twice"
    contract: ClassVar[fxopt.Contract] = fxopt.Contract.EXACT
    interface: ClassVar[Interface] = "extended"

    def run(self, rw: fxopt.Rewriter) -> None:
        tree = output_tree(rw.gm)
        if isinstance(tree, torch.fx.Node):
            rw.set_outputs((tree, tree), rw.gm.output_names, why="to test it")


class Outputs(nn.Module):
    def forward(self, x, *, scale):
        return {"sum": [x * scale["by"], None], "rows": x.shape[0], "constant": 3}


def test_a_file_is_called_as_the_model_is_and_returns_what_it_returns():
    x, scale = torch.randn(4, 3), {"by": torch.tensor(2.0)}
    gm = fxopt.capture(
        Outputs().eval(), fxopt.Sample((x,), {"scale": scale}), dynamic_shapes={"x": {0: "n"}, "scale": {"by": {}}}
    )
    model = OrtModel(gm, to_onnx(gm).session())
    for rows in (4, 7):
        want, got = (one(x[:1].repeat(rows, 1), scale=scale) for one in (gm, model))
        assert torch.equal(want.pop("sum")[0], got["sum"][0])
        assert got.pop("sum")[1] is None
        assert want == got == {"rows": rows, "constant": 3}
        assert [type(got[name]) for name in ("rows", "constant")] == [int, int]
    with pytest.raises(InputError, match="rank 1 instead of 2"):
        model(x[0], scale=scale)


def test_a_file_refuses_what_its_guards_refuse():
    def branch(x):
        if x.sum() > 0:
            return x * 2
        return x

    gm = optimized(["specialize-branches{samples=true}"], branch, (torch.ones(3),))
    seen = []

    def metric(model):
        seen.append(model(torch.ones(3)).tolist())
        return float(model(-torch.ones(3)).sum())

    found = ledger(gm, metric, latency=False, coverage=False)
    assert found.entries[0].numbers.score == -3.0
    assert found.entries[1].numbers.score is None
    assert "these inputs ask for the other" in found.entries[1].numbers.missing["score"]
    assert seen == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("metric", "error", "text"),
    [
        (
            lambda model: torch.ones(2),
            TypeError,
            "the metric returned a Tensor for the captured graph; wanted a number",
        ),
        (lambda model: "good", TypeError, "the metric returned a str for the captured graph; wanted a number"),
        (lambda model: math.nan, ValueError, "the metric returned NaN for the captured graph"),
        (lambda model: model(torch.ones(2)), InputError, "rank 1 instead of 4"),
    ],
    ids=["tensor", "text", "nan", "wrong call"],
)
def test_a_wrong_metric_is_an_error_that_names_the_graph(metric, error, text):
    with pytest.raises(error, match=text):
        ledger(optimized(["fold-batch-norm"]), metric, latency=False, coverage=False)


def test_what_a_metric_raises_comes_through_with_the_step():
    gm = optimized(["fold-batch-norm"])
    calls = []

    def fails_late(model):
        calls.append(model)
        if len(calls) == 2:
            raise KeyError("labels")
        return 1.0

    with pytest.raises(KeyError, match="labels") as raised:
        ledger(gm, fails_late, latency=False, coverage=False)
    assert raised.value.__notes__ == ["in the metric of the ledger, called on the graph after step 1, fold-batch-norm"]


def test_a_step_that_takes_another_type_has_no_score_and_a_reason():
    gm = optimized(["cast-half{keep_io=false}"])
    x = torch.randn(8, 3, 8, 8)
    found = ledger(gm, lambda model: model(x).float().mean(), latency=False, coverage=False)
    assert found.entries[0].numbers.score is not None
    assert "another element type" in found.entries[1].numbers.missing["score"]
    assert found.entries[1].numbers.max_abs > 0


def test_a_step_that_returns_something_else_has_no_score_and_a_reason():
    gm = optimized([ReturnTwice()])
    found = ledger(gm, lambda model: model(*gm.samples[0].args).mean(), latency=False, coverage=False)
    assert found.entries[0].numbers.score is not None
    assert found.entries[1].numbers.missing == {"score": "AttributeError: 'tuple' object has no attribute 'mean'"}
    assert found.entries[1].numbers.max_abs == 0.0
