"""Capture takes every form of model and input, keeps names and ties, and explains what it cannot take."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.models import NETS, RANDOM_IN_EVAL, Mlp, TiedLm


def leaves(outputs: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(outputs)


def assert_same(want: Any, got: Any) -> None:
    assert torch.utils._pytree.tree_structure(want) == torch.utils._pytree.tree_structure(got)
    for w, g in zip(leaves(want), leaves(got), strict=True):
        assert torch.equal(w, g) if isinstance(w, Tensor) else w == g


@pytest.mark.parametrize("name", ["DictOutput", "KeywordOnly", "NestedInputs", "LstmNet", "GruNet", "MixedDtype"])
def test_inputs_and_outputs_keep_their_structure_at_any_batch(name: str) -> None:
    net = NETS[name]().eval()
    example = net.example(1)
    gm = fxopt.capture(net, fxopt.Sample(example.args, example.kwargs), dynamic_shapes=example.dynamic_shapes)
    assert "batch" in gm.dims
    assert name not in RANDOM_IN_EVAL
    for batch in (1, 2, 5):
        now = net.example(batch)
        with torch.no_grad():
            assert_same(net(*now.args, **now.kwargs), gm(*now.args, **now.kwargs))
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")


def test_every_form_of_model_gives_the_same() -> None:
    net = Mlp().eval()
    (x,) = net.example().args
    want = net(x)
    program = torch.export.export(net, (x,))
    forms = [net, lambda x: net(x), torch.fx.symbolic_trace(net), program]
    graphs = [fxopt.capture(form, None if form is program else (x,)) for form in forms]
    graphs.append(fxopt.capture(graphs[0]))
    for gm in graphs:
        assert isinstance(gm, fxopt.CapturedModule)
        assert torch.equal(gm(x), want)
    assert graphs[3].modes == "eval"
    with pytest.raises(
        TypeError, match="wanted a module, a GraphModule, an ExportedProgram or a function; pass an inst"
    ):
        fxopt.capture(Mlp, (x,))
    with pytest.raises(TypeError, match="model is 3"):
        fxopt.capture(3, (x,))


def test_several_samples_tell_the_dynamic_sizes() -> None:
    gm = fxopt.capture(lambda x, y: x.sum(1) + y, [(torch.ones(2, s), torch.ones(2)) for s in (3, 4)])
    assert [spec.shape for spec in gm.inputs] == [(2, "x_1"), (2,)]
    gm = fxopt.capture(lambda x, y: x.sum(1) + y, [(torch.ones(b, s), torch.ones(b)) for b, s in ((2, 3), (4, 7))])
    assert [spec.shape for spec in gm.inputs] == [("batch", "x_1"), ("batch",)]
    assert gm(torch.ones(5, 2), torch.ones(5)).tolist() == [3.0] * 5
    assert len(gm.samples) == 2
    with pytest.raises(fxopt.CaptureError, match="different ranks"):
        fxopt.capture(lambda x: x + 1, [(torch.ones(2),), (torch.ones(2, 2),)])


@pytest.mark.parametrize("net", [nn.Linear(4, 3), nn.LSTM(4, 3, batch_first=True)], ids=["linear", "lstm"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_example_that_is_part_of_a_larger_tensor_says_nothing_about_sizes(
    net: nn.Module, requires_grad: bool
) -> None:
    batch = torch.randn(3, 9, 4)
    example = batch[:, :7].requires_grad_(requires_grad)
    gm = fxopt.capture(net, (example,), dynamic_shapes=({0: "batch", 1: "length"},))
    assert gm.samples[0].args[0] is example
    for x in (batch, batch[1:, 2:5], batch.transpose(0, 1), batch[:, ::2], batch[:1].expand(2, -1, -1)):
        wanted, got = net(x), gm(x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_bounds_as_text_hold() -> None:
    gm = fxopt.capture(lambda x: x * 2, (torch.ones(3, 4),), dynamic_shapes={"x": {0: "batch", 1: "2<=seq<9"}})
    assert (gm.dims["seq"].min, gm.dims["seq"].max) == (2, 8)
    assert gm(torch.ones(1, 8)).shape == (1, 8)
    for size in (1, 9):
        with pytest.raises(fxopt.InputError, match=f"seq = {size} is outside 2<=seq<=8"):
            gm(torch.ones(3, size))
    with pytest.raises(ValueError, match="allows no size: 5 > 3"):
        fxopt.capture(lambda x: x, (torch.ones(3),), dynamic_shapes={"x": {0: "5<=n<=3"}})
    with pytest.raises(fxopt.CaptureError, match=r"dynamic_shapes names 'z'(.|\n)*any of 'x'"):
        fxopt.capture(lambda x: x + 1, (torch.ones(3),), dynamic_shapes={"z": {0: "n"}})


def test_inputs_that_do_not_fit_are_named() -> None:
    shapes = {"x": {0: "batch"}, "y": {0: "batch"}}
    gm = fxopt.capture(lambda x, y: x + y, (torch.ones(2, 3), torch.ones(2, 3)), dynamic_shapes=shapes)
    x = torch.ones(2, 3)
    for args, message in [
        ((x, x.double()), "input 'y' does not fit the captured graph: another element type"),
        ((x, torch.ones(2, 4)), "size 4 instead of 3 along axis 1"),
        ((x, torch.ones(2)), "rank 1 instead of 2"),
        ((x, torch.ones(3, 3)), "batch is 2 in 'x' and 3 here"),
        ((x, 1.0), "a float is not a tensor"),
        ((x,), "other arguments than it was captured with"),
    ]:
        with pytest.raises(fxopt.InputError, match=message):
            gm(*args)
    assert torch.equal(gm(y=x, x=x), 2 * x)


def test_tied_weights_stay_one_and_names_stay() -> None:
    net = TiedLm().eval()
    gm = fxopt.capture(net, net.example().args)
    assert list(gm.state_dict()) == list(net.state_dict())
    assert {id(p) for p in gm.parameters()} == {id(p) for p in net.parameters()}
    other = TiedLm().eval()
    twin = fxopt.capture(other, other.example().args)
    twin.load_state_dict(net.state_dict(), strict=True)
    args = gm.samples[0].args
    assert_same(net(*args), twin(*args))


def test_an_unused_parameter_is_kept() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)
            self.register_buffer("kept", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net = Spare()
    gm = fxopt.capture(net, (torch.ones(1, 2),))
    assert list(gm.state_dict()) == list(net.state_dict())
    gm.load_state_dict(net.state_dict(), strict=True)


def test_the_length_of_a_recurrent_layer_is_dynamic() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True).eval()
    gm = fxopt.capture(lstm, (torch.randn(2, 5, 3),), dynamic_shapes={"input": {0: "batch", 1: "length"}})
    for batch, length in ((1, 1), (3, 9)):
        x = torch.randn(batch, length, 3)
        assert_same(lstm(x), gm(x))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_the_batch_of_a_recurrent_cell_is_dynamic(kind: type[nn.RNNCellBase]) -> None:
    cell = kind(3, 4).eval()
    gm = fxopt.capture(cell, (torch.randn(2, 3),), dynamic_shapes={"input": {0: "batch"}})
    results = [node.meta["val"] for node in gm.graph.output_node().all_input_nodes]
    assert {str(result.shape[0]) for result in results} == {gm.dims["batch"].symbol}
    for batch in (1, 5):
        x = torch.randn(batch, 3)
        assert_same(cell(x), gm(x))


def branches(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x[:1]
    return x - 1


def returns_text(x: Tensor) -> Any:
    return x, "text"


def raises(x: Tensor) -> Tensor:
    return x @ torch.ones(7)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (branches, ["the two sides of a branch cannot become one value", "if x.sum() > 0:", "f32[1, 3] on one side"]),
        (returns_text, ["returns something that is neither a tensor nor a number", "str 'text'"]),
        (raises, ["the model itself raises on the example inputs: RuntimeError", "x @ torch.ones(7)", "f32[2, 3]"]),
    ],
)
def test_models_that_cannot_be_captured(model: Any, parts: list[str]) -> None:
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(model, (torch.ones(2, 3),))
    assert [part for part in parts if part not in str(caught.value)] == []


def scripted_forms() -> dict[str, tuple[Any, list[str]]]:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    stored = io.BytesIO()
    torch.jit.save(torch.jit.script(net), stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    function = torch.jit.trace(lambda x: x + 1, torch.ones(2, 3))
    nested = nn.Sequential(nn.Linear(3, 3), nn.Sequential(torch.jit.script(nn.Linear(3, 3))))
    return {
        "scripted": (torch.jit.script(net), ["TorchScript cannot be captured", "RecursiveScriptModule of Sequential"]),
        "traced": (torch.jit.trace(net, torch.ones(2, 3)), ["TopLevelTracedModule of Sequential"]),
        "loaded": (loaded, ["RecursiveScriptModule of Sequential", "load_state_dict"]),
        "method": (loaded.forward, ["ScriptMethod of forward"]),
        "function": (function, ["ScriptFunction", "the module or function that the script was made from"]),
        "nested": (nested, ["submodule '1.0' is TorchScript", "RecursiveScriptModule of Linear"]),
    }


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("form", ["scripted", "traced", "loaded", "method", "function", "nested"])
def test_torchscript_is_refused_by_its_type(form: str) -> None:
    model, parts = scripted_forms()[form]
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.optimize(model, "fold-constants", (torch.ones(2, 3),))
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_function_that_eager_code_calls_is_traced() -> None:
    function = torch.jit.trace(lambda x: x * 2, torch.ones(2, 3))
    gm = fxopt.capture(lambda x: function(x) + 1, (torch.ones(2, 3),))
    assert gm(torch.full((2, 3), 4.0)).tolist() == [[9.0] * 3] * 2


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "example_inputs are missing"),
        ([], "empty list"),
        ((torch.ones(0, 3),), r"holds no element(.|\n)*f32\[0, 3\]"),
        (("text",), "neither a tensor nor a number"),
        ((torch.ones(2), torch.ones(2)), "do not fit the model: too many positional arguments"),
        ({"z": torch.ones(2)}, "do not fit the model: missing a required argument: 'x'"),
    ],
)
def test_example_inputs_that_cannot_be_used(example: Any, message: str) -> None:
    with pytest.raises(fxopt.CaptureError, match=message):
        fxopt.capture(lambda x: x + 1, example)


def test_nan_weights_are_named() -> None:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight[1, 0] = float("nan")
    with pytest.raises(fxopt.CaptureError, match=r"parameter 'weight' holds NaN(.|\n)*1 of 6 elements"):
        fxopt.capture(net, (torch.ones(1, 3),))
