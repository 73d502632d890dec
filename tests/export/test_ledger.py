"""The ledger: every number is of its step, what cannot be measured has a reason, and a wrong metric is an error."""

import dataclasses
import json
import math
import sys
import types
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.errors import ExportError, FxoptError, InputError, NumericsError
from fxopt.export import Ledger, LedgerEntry, coverage, ledger, to_onnx
from fxopt.export.bench import in_turn, median_speed
from fxopt.export.ledger_report import StageNumbers
from fxopt.isolation import isolated
from tests.export.ledger_nets import PASSES, Net, mean_of, optimized

pytestmark = pytest.mark.ort

MODULE = sys.modules["fxopt.export.ledger"]  # the package's attribute of this name is the function


@dataclasses.dataclass(frozen=True)
class DoubleWeights(fxopt.Pass):
    """Compute something else on purpose."""

    name: ClassVar[str] = "double-weights"
    contract: ClassVar[fxopt.Contract] = fxopt.Contract.lossy("sqnr_db", -20.0)

    def run(self, rw: fxopt.Rewriter) -> None:
        for node in rw.calls(torch.ops.aten.linear.default):
            twice = rw.insert_call(torch.ops.aten.mul.Tensor, (node.args[1], 2.0), before=node, why="on purpose")
            rw.set_arg(node, "weight", twice, why="on purpose")


@pytest.fixture(scope="module")
def small():
    return optimized()


@pytest.fixture(scope="module")
def book(small):
    return ledger(small, mean_of(small), runs=2)


def test_there_is_an_entry_for_the_captured_graph_and_for_each_step(small, book):
    assert [entry.step for entry in book.entries] == ["captured", *(step.name for step in small.report.steps)]
    statuses = [entry.status for entry in book.entries]
    assert statuses == ["captured", "changed", "unchanged", "changed", "unchanged"]
    assert [entry.numbers.nodes for entry in book.entries[1:]] == [step.nodes[1] for step in small.report.steps]
    bytes_after = [step.parameter_bytes[1] for step in small.report.steps]
    assert [entry.numbers.parameter_bytes for entry in book.entries[1:]] == bytes_after
    assert [entry.changes for entry in book.entries[1:]] == [step.changes for step in small.report.steps]


def test_integers_cover_all_shrink_the_file_and_cost_what_the_report_says(small, book):
    numbers = [entry.numbers for entry in book.entries]
    assert [each.integer_share for each in numbers] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert numbers[3].parameter_bytes < numbers[0].parameter_bytes
    assert (numbers[0].max_abs, numbers[0].sqnr_db) == (0.0, math.inf)
    (told,) = small.report.steps[2].errors
    assert (numbers[3].max_abs, numbers[3].sqnr_db) == (told.max_abs, told.sqnr_db)
    assert all(each.median_ms > 0 and each.speed > 0 for each in numbers)
    assert numbers[0].speed == 1.0


def test_file_bytes_are_those_of_the_file_that_the_pipeline_writes(small, book, tmp_path):
    to_onnx(small, tmp_path / "small.onnx")
    assert book.entries[-1].numbers.file_bytes == (tmp_path / "small.onnx").stat().st_size


def test_integers_shrink_the_file_of_a_net_of_some_size():
    gm = optimized(
        ["quantize{recipe=fast}"], nn.Sequential(nn.Linear(256, 256), nn.ReLU()).eval(), (torch.randn(4, 256),)
    )
    before, after = (entry.numbers.file_bytes for entry in ledger(gm, latency=False, coverage=False).entries)
    assert after < before / 2


def test_score_is_the_metric_of_each_graph_but_for_rounding(small, book):
    graphs = small.report.graphs
    for gm, entry in zip(graphs, book.entries, strict=True):
        with isolated(gm):
            want = float(mean_of(small)(gm))
        assert entry.numbers.score == pytest.approx(want, abs=2e-4)  # integers may fall on another side of a half
    assert book.entries[0].numbers.score != book.entries[-1].numbers.score


def test_a_graph_that_was_handed_on_is_exported_once(small, monkeypatch):
    exported = []
    monkeypatch.setattr(
        MODULE, "to_onnx", lambda gm, *given, **named: exported.append(gm) or to_onnx(gm, *given, **named)
    )
    found = ledger(small, latency=False, coverage=False)
    assert len(exported) == 3
    assert found.entries[1].numbers is found.entries[2].numbers
    assert found.entries[3].numbers is found.entries[4].numbers


def test_a_graph_that_cannot_become_a_file_says_why_and_the_rest_stands():
    gm = optimized(["prepare-qat", "convert-qat"])
    found = ledger(gm, mean_of(gm), runs=2)
    first, middle, last = (entry.numbers for entry in found.entries)
    assert "rounds floats as it does in training with quantizers" in middle.missing["file"]
    assert (middle.file_bytes, middle.score, middle.median_ms, middle.integer_share) == (None,) * 4
    assert middle.max_abs > 0  # the graph itself can be run
    for each in (first, last):
        assert each.missing == {}
        assert None not in (each.file_bytes, each.score, each.median_ms, each.speed, each.integer_share)
    assert "prepare-qat: no file: the graph rounds floats" in str(found)


def test_each_file_must_keep_what_the_passes_up_to_it_promise(small, monkeypatch):
    asked = []
    monkeypatch.setattr(
        MODULE, "to_onnx", lambda *given, **named: asked.append(str(named["contract"])) or to_onnx(*given, **named)
    )
    ledger(small, latency=False, coverage=False)
    assert asked == ["ROUNDING", "ROUNDING", small.report.steps[2].contract]
    assert "LOSSY" in asked[2]


def refuse(graph, error, monkeypatch):
    """Let the export of one graph fail."""

    def export(gm, *given, **named):
        if gm is graph:
            raise error
        return to_onnx(gm, *given, **named)

    monkeypatch.setattr(MODULE, "to_onnx", export)


def test_a_file_that_disagrees_with_its_graph_is_not_measured(small, monkeypatch):
    refuse(small.report.graphs[1], NumericsError("the file computes something else"), monkeypatch)
    found = ledger(small, mean_of(small), runs=1)
    assert found.entries[1].numbers.missing == {"file": "the file computes something else"}
    assert found.entries[1].numbers.median_ms is None
    assert found.entries[3].numbers.median_ms > 0


def test_no_speeds_are_told_where_the_captured_graph_has_no_file(small, monkeypatch):
    refuse(small.report.graphs[0], ExportError("no"), monkeypatch)
    found = ledger(small, runs=1, coverage=False)
    assert [entry.numbers.speed for entry in found.entries] == [None] * 5
    assert found.entries[3].numbers.median_ms > 0
    assert "no speed: the captured graph does not run in ONNX Runtime" in found.notes


def test_a_graph_without_multiply_accumulates_has_no_coverage():
    gm = optimized(["remove-dead-code"], lambda x: x + 1, (torch.randn(3),))
    (numbers, _) = (entry.numbers for entry in ledger(gm, latency=False).entries)
    assert numbers.integer_share is None
    assert numbers.missing == {"coverage": "the graph has no multiply-accumulates"}


def test_coverage_is_that_of_the_file(small, book, tmp_path):
    to_onnx(small.report.graphs[3], tmp_path / "integers.onnx")
    assert book.entries[3].numbers.integer_share == coverage(tmp_path / "integers.onnx").integer_share


# -- what is measured ------------------------------------------------------------------------------------------------


def test_speed_is_the_median_over_pairs_of_runs(small, monkeypatch):
    times = {0: [1.0, 2.0, 3.0], 1: [3.0, 1.0, 2.0], 2: [0.5, 1.0, 1.5]}  # 1: ratios 1/3, 2, 3/2; of medians 1
    monkeypatch.setattr(MODULE, "in_turn", lambda sessions, feeds, runs: [times[i] for i in range(len(sessions))])
    found = ledger(small, runs=3, coverage=False)
    assert [entry.numbers.speed for entry in found.entries] == [1.0, 1.5, 1.5, 2.0, 2.0]
    assert [entry.numbers.median_ms for entry in found.entries] == [2000.0, 2000.0, 2000.0, 1000.0, 1000.0]


def test_files_run_in_turn_in_an_order_that_changes():
    order: list[str] = []
    session = types.SimpleNamespace(
        output_names=("y",), ort=types.SimpleNamespace(run_with_ort_values=lambda names, feed: order.append(feed))
    )
    times = in_turn([session] * 3, ["a", "b", "c"], 4)
    assert [len(each) for each in times] == [4, 4, 4]
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert set(rounds) == {"abc", "bca", "cab"}
    assert rounds[-3:] != [rounds[-1]] * 3


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1))
def test_speeds_of_two_files_against_each_other_are_inverse_for_an_odd_number_of_runs(pairs):
    first, own = zip(*(pairs if len(pairs) % 2 else pairs[:-1] or pairs * 3), strict=True)
    assert median_speed(first, own) * median_speed(own, first) == pytest.approx(1.0)


def test_sizes_are_those_of_the_runs_and_errors_those_of_the_examples():
    gm = optimized(PASSES[:1], dynamic_shapes={"image": {0: "batch"}})
    small, large = (ledger(gm, sizes={"batch": batch}, runs=1) for batch in (2, 5))
    assert (small.measured_on, large.measured_on) == (("image: f32[2, 3, 8, 8]",), ("image: f32[5, 3, 8, 8]",))
    assert small.entries[1].numbers.max_abs == large.entries[1].numbers.max_abs


def test_given_inputs_take_the_place_of_the_examples(small):
    other = torch.randn(8, 3, 8, 8) * 3
    found = ledger(small, inputs=other, latency=False, coverage=False)
    wanted, got = (gm(other).detach() for gm in (small.report.graphs[0], small.report.graphs[3]))
    assert found.entries[3].numbers.max_abs == float((wanted.double() - got.double()).abs().max())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"near": self.near(x) * 1e-3, "far": self.far(x)}


def test_the_error_is_that_of_the_worst_output_on_the_worst_example():
    examples = [(torch.ones(2, 4) * scale,) for scale in (0.1, 1.0, 0.3)]
    gm = optimized([DoubleWeights()], TwoHeads().eval(), examples)
    want, got = (one(examples[1][0])["far"].detach() for one in gm.report.graphs)
    numbers = ledger(gm, latency=False, coverage=False).entries[1].numbers
    assert numbers.max_abs == float((want.double() - got.double()).abs().max())
    noise = (want.double() - got.double()).square().sum()
    assert numbers.sqnr_db == pytest.approx(float(10 * torch.log10(want.double().square().sum() / noise)))


def test_a_graph_that_was_trained_since_is_measured_as_it_is():
    gm = optimized(["fold-batch-norm"])
    gm.conv.weight = nn.Parameter(torch.zeros_like(gm.conv.weight))  # a new tensor: the kept graph has the old one
    found = ledger(gm, mean_of(gm), latency=False, coverage=False)
    with torch.no_grad():
        assert found.entries[-1].numbers.score == pytest.approx(float(gm(*gm.samples[0].args).mean()), abs=1e-5)
    assert found.entries[-1].numbers.max_abs > 1e-3


def test_a_graph_that_was_switched_to_training_says_so(small):
    gm = optimized(["remove-dead-code"])
    gm.train()
    found = ledger(gm, latency=False, coverage=False)
    assert "the graph is in train mode" in found.entries[-1].numbers.missing["file"]
    assert found.entries[0].numbers.missing == {}


def test_a_report_is_as_good_as_its_graph(small):
    of_graph, of_report = (ledger(one, latency=False, coverage=False) for one in (small, small.report))
    assert of_graph == of_report


# -- what is refused -------------------------------------------------------------------------------------------------


def test_graphs_must_have_been_kept():
    gm = fxopt.optimize(Net().eval(), PASSES[:1], (torch.randn(1, 3, 8, 8),))
    for one in (gm, gm.report):
        with pytest.raises(FxoptError, match=r"the report holds no graphs[^$]*keep_graphs=True"):
            ledger(one)
    with pytest.raises(FxoptError, match=r"no pass was run on this graph[^$]*keep_graphs=True"):
        ledger(fxopt.capture(Net().eval(), (torch.randn(1, 3, 8, 8),)))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"runs": 0}, ValueError, "runs is 0; wanted 1 or more"),
        ({"sizes": {"batch": 2}}, ValueError, "sizes names batch; the graph has none"),
        ({"sizes": {}, "inputs": torch.ones(1)}, ValueError, "leave out one of them"),
        ({"inputs": torch.ones(1)}, InputError, "rank 1 instead of 4"),
    ],
    ids=["runs", "unknown size", "both", "misfit"],
)
def test_wrong_options_are_refused(small, options, error, text):
    with pytest.raises(error, match=text):
        ledger(small, **options)


def test_what_is_no_graph_is_refused():
    with pytest.raises(TypeError, match="got a Linear"):
        ledger(nn.Linear(1, 1))


# -- text and JSON ---------------------------------------------------------------------------------------------------


def test_json_holds_all_that_the_ledger_does(book, tmp_path):
    text = book.save(tmp_path / "ledger.json").read_text()
    plain = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert plain == book.to_dict()
    assert Ledger.from_dict(plain) == book
    assert plain["entries"][0]["sqnr_db"] == "inf"


NUMBER = st.none() | st.floats(allow_nan=False)
NUMBERS = st.builds(
    StageNumbers, st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(0, 9), NUMBER, NUMBER, NUMBER, NUMBER,
    NUMBER, NUMBER, st.dictionaries(st.text(), st.text()),
)  # fmt: skip


@given(st.lists(st.builds(LedgerEntry, st.text(), st.text(), NUMBERS), min_size=1))
def test_json_comes_back_as_it_was(entries):
    made = Ledger(tuple(entries), ("x: f32[1]",), 3, None, ("a note",))
    assert Ledger.from_dict(json.loads(made.to_json())) == made


def test_table_leaves_out_what_was_not_asked_for(small, book):
    assert "integer MACs" in str(book)
    _, head, *_ = str(ledger(small, latency=False, coverage=False)).splitlines()
    assert " ".join(head.split()) == "step status pass s check s nodes parameter bytes file bytes max error SQNR dB"


def test_other_suffixes_are_refused(book, tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot tell the format of [^$]*wanted +a name that ends in \.html or \.json"
    ):
        book.save(tmp_path / "ledger.txt")
