"""Layers that find their ranges when they run: which become integers, which do not and why, and what that costs."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.dynamic_ops import DYNAMIC_LINEAR
from fxopt.export import Session, coverage, to_onnx
from fxopt.numerics import measure
from fxopt.passes import Quantize, QuantizeDynamic
from fxopt.passes.quantize.recurrent_weights import row_integers
from fxopt.testing import check_pass
from fxopt.weight_only_ops import GATHER_NBITS
from tests.zoo import real

SMALL = QuantizeDynamic(min_elements=64)
aten = torch.ops.aten


def targets(gm: fxopt.CapturedModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def decibels(want: Tensor, got: Tensor) -> float:
    return measure(want, got).sqnr_db


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40)])
def test_a_layer_multiplies_integers(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(40, 6), torch.randn(shape)
    result = check_pass(SMALL, layer, x, changes=1, skips=[])
    assert targets(result.gm) == [DYNAMIC_LINEAR]
    integers, scale = row_integers(layer.weight.detach(), no_saturation=True)
    low, high = min(float(x.min()), 0), max(float(x.max()), 0)
    step = np.float32(high - low) / np.float32(255)
    zero = np.rint(-low / step)
    rounded = (np.rint(x.numpy() / step) + zero).clip(0, 255) - zero
    want = rounded * float(step) @ (integers.double() * scale.double()[:, None]).numpy().T + layer.bias.tolist()
    got = result.gm(x)
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=1e-5, atol=1e-5)
    assert decibels(layer(x), got) > 30


def test_text():
    check_pass(
        SMALL,
        nn.Linear(64, 3),
        torch.randn(2, 64),
        dynamic_shapes={"input": {0: "batch"}},
        text="""
            %bias = attribute f32[3]
            %input : f32[batch, 64]
            %weight_integers = attribute i8[3, 64]
            %weight_scale = attribute f32[3]
            %0 : f32[batch, 3] = fxopt.dynamic_linear(%input, %weight_integers, %weight_scale, %bias)
            return %0
        """,
    )


class Products(nn.Module):
    """The ways to multiply by a constant matrix f32[in, out]."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(40, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        ways = {
            "matmul": lambda: x @ self.weight,
            "mm": lambda: torch.mm(x, self.weight),
            "addmm": lambda: torch.addmm(self.bias, x, self.weight),
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["matmul", "mm", "addmm"])
def test_products_with_a_matrix_of_columns(way: str) -> None:
    net, x = Products(way), torch.randn(3, 40)
    result = check_pass(SMALL, net, x, changes=1, skips=[])
    assert targets(result.gm) == [DYNAMIC_LINEAR]
    integers, scale = row_integers(net.weight.detach().t(), no_saturation=True)
    assert torch.equal(result.gm(x), DYNAMIC_LINEAR(x, integers, scale, net.bias if way == "addmm" else None))


class Tied(nn.Module):
    """Two layers that share a matrix, and a table of words that is also the last layer."""

    def __init__(self, words: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 40) if words else None
        self.first, self.second = nn.Linear(40, 20), nn.Linear(40, 20)
        self.second.weight = self.first.weight
        if self.words is not None:
            self.words.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.words is None else self.words(x)
        return self.first(x) + self.second(x.tanh())


def test_a_shared_weight_is_stored_once_and_read_by_both():
    result = check_pass(SMALL, Tied(words=False), torch.randn(3, 40), changes=2, skips=[])
    assert targets(result.gm).count(DYNAMIC_LINEAR) == 2
    assert [t.dtype for t in result.gm.buffers()].count(torch.int8) == 1
    assert sorted(name for name, _ in result.gm.named_parameters()) == ["first.bias", "second.bias"]


def test_a_shared_weight_stays_if_something_else_needs_its_floats():
    why = "its weight is also read by embedding (aten.embedding.default)"
    layers = dataclasses.replace(SMALL, kinds=("linear",))
    check_pass(layers, Tied(words=True), torch.randint(0, 20, (2, 3)), changes=0, skips=[why, why])


def test_a_table_that_layers_share_is_looked_up_in_blocks_of_its_own():
    net, index = Tied(words=True), torch.randint(0, 20, (2, 3))
    result = check_pass(SMALL, net, index, changes=3, skips=[])
    assert targets(result.gm).count(DYNAMIC_LINEAR) == 2
    assert targets(result.gm).count(GATHER_NBITS) == 1
    assert sorted(name for name, _ in result.gm.named_parameters()) == ["first.bias", "second.bias"]


@pytest.mark.parametrize("options", [{"skip": ("first",)}, {"kinds": ("embedding",)}], ids=str)
def test_a_table_stays_if_a_layer_goes_on_to_read_it(options):
    why = "its weight is also read by linear (aten.linear.default)"
    pass_ = dataclasses.replace(SMALL, **options)
    result = pass_(fxopt.capture(Tied(words=True).eval(), (torch.randint(0, 20, (2, 3)),)))
    assert not result.modified
    assert result.skips[0].why == why


class Refused(nn.Module):
    """Layers that keep their floats, one for each reason."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
        self.weight = nn.Parameter(torch.randn(8, 40))
        self.square = nn.Parameter(torch.randn(40, 40))
        self.stack = nn.Parameter(torch.randn(3, 40, 8))

    def forward(self, x: Tensor) -> object:
        linear = nn.functional.linear
        ways = {
            "computed": lambda: linear(x, self.weight * 2),
            "sum": lambda: (linear(x, self.weight), self.weight.sum()),
            "both ways": lambda: (linear(x, self.square), x @ self.square),
            "alpha": lambda: torch.addmm(x, x, self.square, alpha=2),
            "rows": lambda: torch.addmm(x, x, self.square),
            "stack": lambda: x @ self.stack,
            "scalar bias": lambda: linear(x, self.weight, self.weight[0, :1]),
            "activations": lambda: x @ x.t(),
        }
        return ways[self.reason]()


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("computed", ["its weight is computed when the graph runs"]),
        ("sum", ["its weight is also read by sum_1 (aten.sum.default)"]),
        ("both ways", ["its weight is read transposed by matmul", "its weight is read transposed by matmul"]),
        ("alpha", ["alpha or beta is not 1"]),
        ("rows", ["what is added is no vector of its outputs"]),
        ("stack", ["its constant operand has 3 axes, not 2"]),
        ("scalar bias", ["its weight is also read by select (aten.select.int)"]),
        ("activations", []),
    ],
)
def test_leaves_alone_and_says_why(reason: str, why: list[str]) -> None:
    check_pass(SMALL, Refused(reason), torch.randn(3, 40), changes=0, skips=why)


def test_leaves_weights_alone_by_name_size_and_type():
    x = torch.randn(2, 40)
    check_pass(QuantizeDynamic(min_elements=1, skip=("wei*",)), nn.Linear(40, 8), x, skips=["its name is one to skip"])
    check_pass(QuantizeDynamic(min_elements=1, skip=("linear",)), nn.Linear(40, 8), x, changes=0)
    check_pass(QuantizeDynamic(), nn.Linear(40, 8), x, skips=["its weight has 320 elements, fewer than 4096"])
    check_pass(SMALL, nn.Linear(40, 8).double(), x.double(), skips=["its weight is torch.float64"])
    check_pass(QuantizeDynamic(kinds=("lstm",)), nn.Linear(400, 80), torch.randn(2, 400), changes=0, skips=[])


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
@pytest.mark.parametrize("layer", [nn.Linear(40, 8), nn.LSTM(40, 8), nn.GRU(40, 8)], ids=["linear", "lstm", "gru"])
def test_broken_weights_are_refused_with_the_line(layer: nn.Module, broken: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y if isinstance(y, Tensor) else y[0]

    gm = fxopt.capture(Net().eval(), (torch.randn(2, 3, 40),))
    with torch.no_grad():
        next(gm.parameters())[1, 2] = broken
    result = SMALL(gm)
    assert not result.modified
    (skip,) = result.skips
    assert skip.why == "its weight holds NaN or infinity"
    assert "test_quantize_dynamic.py" in skip.source
    assert "self.layer(x)" in skip.source


def test_leaves_alone_what_is_quantized_already():
    net, x = nn.Sequential(nn.Linear(40, 80), nn.ReLU(), nn.Linear(80, 40)), torch.randn(8, 40)
    gm = fxopt.optimize(net.eval(), [Quantize()], (x,), calibration=[x], strict=True)
    why = "its weight is quantized already"
    check_pass(SMALL, gm, changes=0, skips=[why, why])


def test_leaves_alone_what_a_branch_is_handed():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return self.layer(x)
            return x * 2

    why = "its weight is handed in when the graph runs"
    check_pass(SMALL, Branch(), torch.randn(3, 40), changes=0, skips=[why])


def test_gradients_reach_what_stands_before_and_biases():
    net = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 8))
    gm = fxopt.optimize(net, [QuantizeDynamic(min_elements=320)], (torch.randn(2, 4),), strict=True)
    gm.train()
    gm(torch.randn(2, 4)).sum().backward()
    gradients = {name: float(parameter.grad.abs().sum()) for name, parameter in gm.named_parameters()}
    assert sorted(gradients) == ["0.bias", "0.weight", "1.bias"]
    assert all(size > 0 for size in gradients.values())


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_go_through_text():
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 8))
    passes = "quantize-dynamic{kinds=linear|lstm,skip=1.*,min_elements=64,no_saturation=false}"
    gm = fxopt.optimize(net, passes, (torch.randn(2, 40),), strict=True)
    assert [skip.why for skip in gm.report.steps[0].skips] == ["its name is one to skip"]
    integers = gm.get_buffer("0.weight_integers")
    assert integers.abs().amax(1).tolist() == [127] * 40


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"kinds": ("conv",)}, ValueError, "kinds holds 'conv'; wanted linear, lstm, gru, rnn, embedding"),
        ({"kinds": ()}, ValueError, "kinds is empty"),
        ({"kinds": "lstm"}, TypeError, "wanted a tuple, such as"),
        ({"min_elements": -1}, ValueError, "min_elements is -1; wanted 0 or more"),
        ({"skip": "head"}, TypeError, "skip is 'head'; wanted a tuple of patterns"),
        ({"weights_only": "head"}, TypeError, "weights_only is 'head'; wanted a tuple of patterns"),
    ],
)
def test_refuses_options(options: dict[str, object], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        QuantizeDynamic(**options)


@pytest.mark.parametrize("between", [nn.Tanh(), nn.Dropout()], ids=["one mode", "two modes"])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_breaks_the_floor_is_put_back(between, training):
    net = nn.Sequential(nn.Linear(40, 40), between, nn.Linear(40, 40)).train(training)
    with torch.no_grad():
        net[0].weight[:, 0] = 1e-6  # reads a unit that is 10,000 times the others
    x = torch.randn(16, 40)
    x[:, 0] = 1e4
    gm = fxopt.optimize(net, [QuantizeDynamic(min_elements=64, min_sqnr_db=25.0)], (x,))
    assert "partly rolled back" in str(gm.report)
    assert targets(gm).count(DYNAMIC_LINEAR) == targets(gm).count(aten.linear.default) == 1
    assert decibels(net.eval()(x), gm.eval()(x)) > 25


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.zoo
@pytest.mark.ort
@pytest.mark.slow
def test_sentences_stay_near_what_they_were_near():
    model = real.REAL["minilm_l6"]
    scores = {}
    for skip in ((), ("*layer.0.output.dense*",)):
        gm = fxopt.optimize(
            model.load(), [QuantizeDynamic(skip=skip)], model.inputs(4), dynamic_shapes=model.dynamic_shapes,
            check="samples", strict=True,
        )  # fmt: skip
        file = to_onnx(gm)
        integer, every = coverage(file).kernels["linear"]
        assert integer == every - len(skip) == 37 - len(skip)
        session = Session(file.to_bytes())
        scores[skip] = model.score(lambda *given, session=session: session.run(list(given)))
    assert min(scores.values()) >= 0.98
