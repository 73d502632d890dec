"""The validator has teeth: each kind of wrong model is refused, saying what, where, and what to try."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import Emitter, to_onnx, validate
from fxopt.export.kernel_noise import kernel_noise
from fxopt.export.registry import TRANSLATIONS
from tests.export.chaotic import stable_where_trained
from tests.export.proof import captured

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """Two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        return {"y": y, "count": (y > 0).sum()}


def graph() -> fxopt.CapturedModule:
    return fxopt.capture(Net().eval(), (torch.randn(3, 6),), dynamic_shapes={"x": {0: "batch"}})


@pytest.fixture
def tanh(monkeypatch):
    """Return a function that replaces the translation of tanh."""
    return lambda translation: monkeypatch.setitem(TRANSLATIONS, torch.ops.aten.tanh.default, translation)


def _only_for_batch_one(emit: Emitter, x):
    rows = emit("Shape", x, start=0, end=1)
    wrong = emit("Cast", emit("Equal", rows, 1), to=1)
    return emit("Add", emit("Tanh", x), wrong)


SPOILED = {
    "doubled": lambda emit, x: emit("Mul", emit("Tanh", x), 2.0),
    "zeroed": lambda emit, x: emit("Mul", emit("Tanh", x), 0.0),
    "shifted": lambda emit, x: emit("Add", emit("Tanh", x), 1e-4),
    "slightly scaled": lambda emit, x: emit("Mul", emit("Tanh", x), 1.0001),
    "negated": lambda emit, x: emit("Neg", emit("Tanh", x)),
    "nan": lambda emit, x: emit("Mul", emit("Tanh", x), float("nan")),
    "infinite": lambda emit, x: emit("Div", emit("Tanh", x), 0.0),
    "another function": lambda emit, x: emit("Softsign", x),
    "in half precision": lambda emit, x: emit.cast(emit.cast(emit("Tanh", x), torch.float16), torch.float32),
    "wrong for one row": _only_for_batch_one,
    "transposed within": lambda emit, x: emit("Slice", emit("Tanh", x), [-1], [-100], [1], [-1]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_value_is_refused(name, tanh):
    tanh(SPOILED[name])
    with pytest.raises(fxopt.NumericsError):
        to_onnx(graph())


def test_the_right_value_is_accepted():
    report = to_onnx(graph()).validation
    assert report.contract == "ROUNDING"
    assert report.notes == []
    assert {result.case for result in report.results} == {
        "sample 0",
        "other values",
        "batch = 1",
        "batch = 2",
        "batch = 5",
    }
    assert {result.optimization for result in report.results} == {"none", "all"}


def test_the_message_says_what_where_and_what_to_try(tanh):
    tanh(SPOILED["shifted"])
    gm = graph()
    with pytest.raises(fxopt.NumericsError) as caught:
        to_onnx(gm)
    message = str(caught.value)
    assert message.startswith("output 'y' breaks contract ROUNDING on sample 0, ORT optimizer 'none'")
    assert "exceeds the ROUNDING bound" in message
    assert "of f32[3, 4]: eager " in message
    assert "elements differ)" in message
    assert "node    tanh (aten.tanh.default)" in message
    assert "source  test_validate.py:" in message
    assert "y = torch.tanh(self.layer(x))" in message
    assert "passes  (none)" in message
    assert "try     compare intermediate values" in message


def _renamed(gm, **changes):
    """Return the model of ``gm`` with its outputs changed."""
    return to_onnx(gm, **changes)


def test_another_element_type_is_refused():
    wrong = to_onnx(captured(lambda x: (x.double(), x.sum()), torch.randn(3, 6)))
    with pytest.raises(fxopt.NumericsError, match=r"dtype changed from torch\.float32 to torch\.float64"):
        validate(wrong, captured(lambda x: (x * 1, x.sum()), torch.randn(3, 6)))


def test_another_shape_is_refused():
    wrong = to_onnx(captured(lambda x: x[:, :2] * 1, torch.randn(3, 6)))
    with pytest.raises(fxopt.NumericsError, match=r"shape changed from \(3, 6\) to \(3, 2\)"):
        validate(wrong, captured(lambda x: x * 1, torch.randn(3, 6)))


def test_missing_and_extra_outputs_are_refused():
    one, two = captured(lambda x: x * 1, torch.randn(3, 6)), captured(lambda x: (x * 1, x + 1), torch.randn(3, 6))
    for wrong, right in ((one, two), (two, one)):
        with pytest.raises(fxopt.NumericsError, match="the model has other outputs than the graph"):
            validate(to_onnx(wrong), right)


def test_other_inputs_are_refused():
    wrong = to_onnx(captured(lambda x, y: x + y, torch.randn(3, 6), torch.randn(3, 6)))
    with pytest.raises(fxopt.NumericsError, match="the model has other inputs than the graph"):
        validate(wrong, captured(lambda x: x + 1, torch.randn(3, 6)))


def test_a_wrong_integer_is_refused():
    wrong = to_onnx(captured(lambda x: (x >= 0).sum(1), torch.zeros(3, 6)))
    with pytest.raises(fxopt.NumericsError, match="3 of 3 elements differ"):
        validate(wrong, captured(lambda x: (x > 0).sum(1), torch.zeros(3, 6)))


def test_nan_in_both_agrees():
    to_onnx(captured(lambda x: x / x, torch.eye(3, 6)))


def test_a_lossy_contract_has_a_floor():
    gm = captured(lambda x: x * 1.01, torch.randn(30, 6))
    right = to_onnx(captured(lambda x: x * 1.0, torch.randn(30, 6)))
    report = validate(right, gm, contract=fxopt.Contract.lossy("sqnr_db", 30.0))
    assert report.contract == "LOSSY(sqnr_db >= 30)"
    with pytest.raises(fxopt.NumericsError, match="sqnr_db is 40"):
        validate(right, gm, contract=fxopt.Contract.lossy("sqnr_db", 50.0))


class Chaos(nn.Module):
    """Doubles every difference in each of many steps where the gain is large, and forgets it where it is small."""

    def __init__(self, wave=torch.cos):
        super().__init__()
        self.wave = wave

    def forward(self, x, gain):
        for _ in range(40):
            x = self.wave(x * gain)
        return x


GAINS = torch.cat([torch.full((45,), 0.5), torch.full((6,), 40.0), torch.full((45,), 0.5)])
FLOOR = fxopt.Contract.lossy("sqnr_db", 8)


def test_a_floor_is_not_held_against_a_file_where_the_graph_itself_is_as_far_off():
    gm = captured(Chaos(), torch.linspace(0, 1, 96)[torch.randperm(96)], GAINS, dynamic=False)
    report = validate(to_onnx(gm, validate=False), gm, contract=FLOOR)
    assert report.notes
    assert all("other values" in note and "and the graph itself in float32 is only" in note for note in report.notes)


def test_on_the_users_own_values_it_is():
    gm = captured(Chaos(), torch.rand(96), torch.full((96,), 40.0), dynamic=False)
    with pytest.raises(fxopt.NumericsError, match="on sample 0"):
        validate(to_onnx(gm, validate=False), gm, contract=FLOOR)


def test_a_file_that_is_further_off_than_the_graph_itself_is_refused():
    class Sized(nn.Module):
        def __init__(self, more):
            super().__init__()
            self.more = more

        def forward(self, x):
            return x * (1 + self.more * (x.shape[0] - 2))

    gm, other = (captured(Sized(more), torch.randn(2, 5)) for more in (0, 1))
    with pytest.raises(fxopt.NumericsError, match="sqnr_db is"):
        validate(to_onnx(other, validate=False), gm, contract=FLOOR)


def test_the_contract_of_lossy_passes_is_the_default():
    gm = captured(lambda x: x * 1.01, torch.randn(30, 6))
    gm.report = fxopt.Report(contract="LOSSY(sqnr_db >= 30, cosine >= 0.9)")
    right = to_onnx(captured(lambda x: x * 1.0, torch.randn(30, 6)))
    assert validate(right, gm).contract == "LOSSY(sqnr_db >= 30, cosine >= 0.9)"


def test_inputs_of_ones_own():
    gm = graph()
    report = validate(to_onnx(gm), gm, inputs=[(torch.randn(9, 6),), (torch.zeros(1, 6),)], sizes=False)
    assert {result.case for result in report.results} == {"sample 0", "sample 1"}


def test_sizes_outside_the_range_are_not_tried():
    gm = fxopt.capture(lambda x: x + 1, (torch.randn(4, 2),), dynamic_shapes={"x": {0: "3<=batch<=4"}})
    cases = {result.case for result in to_onnx(gm).validation.results}
    assert cases == {"sample 0", "other values", "batch = 3"}


def test_what_the_graph_cannot_run_is_noted():
    class Picky(nn.Module):
        def forward(self, x, index):
            return x[index]

    gm = fxopt.capture(
        Picky(), (torch.randn(5, 2), torch.tensor([4, 0, 1])), dynamic_shapes={"x": {0: "rows"}, "index": None}
    )
    report = to_onnx(gm).validation
    assert any(note.startswith("not compared on rows = 1: the graph itself cannot run it") for note in report.notes)


def test_report_as_text_and_as_dictionary():
    report = to_onnx(graph()).validation
    text = str(report).splitlines()
    assert text[0] == "contract ROUNDING, 10 runs, worst of all:"
    assert text[1].split() == [
        "output",
        "ORT",
        "optimizer",
        "max",
        "abs",
        "max",
        "rel",
        "SQNR",
        "dB",
        "cosine",
        "top-1",
    ]
    assert [line.split()[:2] for line in text[2:]] == [["y", "none"], ["count", "none"], ["y", "all"], ["count", "all"]]
    plain = report.to_dict()
    assert len(plain["results"]) == 20
    assert set(plain["results"][0]) >= {
        "output",
        "case",
        "optimization",
        "max_abs",
        "max_rel",
        "sqnr_db",
        "cosine",
        "top1_agreement",
    }
    import json

    assert json.loads(json.dumps(plain)) == plain


def test_approximations_of_ort_are_not_taken_for_errors():
    """ORT's sigmoid is accurate to its range, not to its value: 3e-8 off at 2e-4."""
    to_onnx(captured(lambda x: torch.sigmoid(x - 9), torch.rand(3, 4)))
    with pytest.raises(fxopt.NumericsError):
        validate(
            to_onnx(captured(lambda x: torch.sigmoid(x - 9) + 1e-5, torch.rand(3, 4))),
            captured(lambda x: torch.sigmoid(x - 9), torch.rand(3, 4)),
        )


def test_buffers_and_random_state_are_left_alone():
    gm = fxopt.capture(nn.BatchNorm1d(4), (torch.randn(5, 4),)).eval()
    before = gm.get_buffer("running_mean").clone()
    state = torch.get_rng_state()
    to_onnx(gm)
    assert torch.equal(gm.get_buffer("running_mean"), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_output_is_not_called_equal():
    gm = fxopt.capture(lambda x: x + torch.rand_like(x), torch.randn(2, 3))
    file = to_onnx(gm, validate=False)
    with pytest.raises(fxopt.NumericsError, match=r"draws random numbers \(aten.rand_like.default\)") as caught:
        validate(file, gm)
    assert "test_validate.py" in str(caught.value)


def test_an_output_without_a_number_proves_nothing():
    with pytest.raises(fxopt.NumericsError, match="output 0 is NaN in every element on every input"):
        to_onnx(captured(lambda x: x.abs().neg().log(), torch.rand(3, 6) + 1))


def test_a_graph_that_drowns_in_rounding_proves_nothing():
    def chaotic(x):
        for _ in range(60):
            x = 3.9 * x * (1 - x) + 1e-9 * torch.tanh(x)
        return x

    right, wrong = (captured(lambda x, k=k: chaotic(x * k), torch.rand(8, 8)) for k in (1.0, 0.5))
    file = to_onnx(right, validate=False)
    with pytest.raises(fxopt.NumericsError, match="ROUNDING bound"):
        validate(file, wrong)


def test_values_on_which_a_graph_is_chaotic_are_replaced_by_some_near_the_example():
    gm = stable_where_trained()
    file = to_onnx(gm)
    cases = {result.case for result in file.validation.results}
    assert "other values" not in cases
    assert {"sample 0", "other values near the example's"} <= cases
    assert any("one rounding of the inputs moves half of all digits" in note for note in file.validation.notes)
    assert file.validation.max_abs < 1e-5


def test_noise_of_kernels_keeps_half_precision():
    gm = fxopt.capture(nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3)).half().eval(), (torch.rand(2, 4).half(),))
    (noise,) = kernel_noise(gm, [torch.rand(2, 4).half()])
    assert 0 < noise < 0.01
