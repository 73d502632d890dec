"""convert-qat: the trained graph as integers, which ORT computes as the graph in eval mode did."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.export.session import optimized_model
from fxopt.numerics import measure
from fxopt.passes import DEFAULT, ConvertQat, PrepareQat, Quantize
from fxopt.quantized_ops import DEQUANTIZE, FAKE_QUANTIZE
from fxopt.tools.demo_net import Digits, accuracy, fit, load_digits, train
from tests.models import NETS
from tests.models.base import settle
from tests.passes.quantize.nets import Gate, Residual

NAMES = (
    "ChannelShuffle", "Conv1d", "Conv3d", "ConvBnRelu", "Depthwise", "GroupedConv", "LinearBn", "SameConvBn",
    "SharedConv", "SqueezeExcite", "UNet", "Mlp", "TiedLm", "MiniViT", "MaskedEncoder", "LstmNet", "StochasticDepth",
)  # fmt: skip


def calls(gm: fxopt.CapturedModule) -> Counter[str]:
    return Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def sample_of(gm: fxopt.CapturedModule) -> tuple[Any, ...]:
    return gm.samples[0].clone().args


def trained(gm: fxopt.CapturedModule, steps: int = 2, **options: Any) -> fxopt.CapturedModule:
    """Return the graph after a few steps with quantizers in it, in eval mode."""
    graph = fxopt.optimize(gm.clone(copy_tensors=True), [PrepareQat(**options)], strict=True).train()
    optimizer = torch.optim.AdamW(graph.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = graph.flat_outputs(*sample_of(graph))
        sum(out.square().mean() for out in outputs if out is not None and out.requires_grad).backward()
        optimizer.step()
    return graph.eval()


def captured(name: str) -> fxopt.CapturedModule:
    net = NETS[name]().train()
    example = net.example(4)
    return fxopt.capture(net, fxopt.Sample(example.args, example.kwargs))


@pytest.mark.parametrize(
    ("name", "learn_scales"), [*((name, True) for name in NAMES), *((name, False) for name in NAMES[3:6])]
)
def test_integers_yield_what_the_trained_graph_yields(name: str, learn_scales: bool) -> None:
    gm = captured(name)
    graph = trained(gm, weight_bits=4, learn_scales=learn_scales)
    integers = fxopt.optimize(graph, [ConvertQat(min_sqnr_db=50)], strict=True)
    assert FAKE_QUANTIZE not in {node.target for node in integers.graph.nodes}
    plain = fxopt.optimize(gm.clone().eval(), [Quantize(weight_bits=4, recipe="fast", min_sqnr_db=-99)], strict=True)
    assert calls(integers) == calls(plain)
    inputs = sample_of(graph)
    session = Session(to_onnx(integers, validate=False).to_bytes(), optimization="none")
    want = [out for out in graph.flat_outputs(*inputs) if out is not None]
    got = session.run([leaf for leaf in integers.flatten_inputs(*inputs) if isinstance(leaf, Tensor)])
    assert min(measure(w.detach(), g).sqnr_db for w, g in zip(want, got, strict=True)) >= 50


@pytest.mark.parametrize("name", ["Depthwise", "SqueezeExcite", "MiniViT"])
def test_ort_runs_the_kernels_that_it_runs_after_quantize(name: str) -> None:
    gm = captured(name)
    integers = fxopt.optimize(trained(gm, weight_bits=7), [ConvertQat()], strict=True)
    plain = fxopt.optimize(gm.clone().eval(), [Quantize(weight_bits=7, recipe="fast", min_sqnr_db=-99)], strict=True)
    kernels = []
    for graph in (integers, plain):
        model = optimized_model(to_onnx(graph, validate=False).to_bytes())
        kernels.append(Counter(node.op_type for node in model.graph))
    assert kernels[0] == kernels[1]
    assert any(kind.startswith("QLinear") or kind == "MatMulIntegerToFloat" for kind in kernels[0])


def test_seven_bits_are_the_same_in_ort_with_its_optimizer_on() -> None:
    x = torch.randn(4, 3, 8, 8)
    net = Residual()
    settle(net)
    graph = trained(fxopt.capture(net.train(), x), weight_bits=7)
    integers = fxopt.optimize(graph, [ConvertQat()], strict=True)
    model = to_onnx(integers, contract=fxopt.Contract.lossy("sqnr_db", 30.0)).to_bytes()
    for optimization in ("none", "all"):
        (got,) = Session(model, optimization=optimization).run([x])  # type: ignore[arg-type]  # two of its texts
        assert measure(graph(x).detach(), got).sqnr_db > 40
    kinds = Counter(node.op_type for node in optimized_model(model).graph)
    assert (kinds["QLinearConv"], kinds["QLinearAdd"], kinds["Relu"]) == (3, 1, 0)


def test_weights_and_biases_are_integers_and_relu_is_gone() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU6())
    settle(net)
    graph = trained(fxopt.capture(net.train(), torch.randn(4, 2, 6, 6)), weight_bits=4)
    factor = graph.get_parameter("1.weight") / (graph.get_buffer("1.running_var") + 1e-5).sqrt()
    step = graph.get_buffer("0.weight_scale")
    integers = fxopt.optimize(graph, [ConvertQat()], strict=True)
    found = {node.target for node in integers.graph.nodes}
    assert not found & {torch.ops.aten.relu.default, torch.ops.aten.relu6.default, torch.ops.aten.batch_norm.default}
    conv = next(node for node in integers.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    weight, bias = fxopt.tensor_arg(conv, "weight"), fxopt.tensor_arg(conv, "bias")
    assert weight.target is bias.target is DEQUANTIZE
    held = [integers.get_buffer(str(fxopt.tensor_arg(node, "q").target)) for node in (weight, bias)]
    assert [tensor.dtype for tensor in held] == [torch.int8, torch.int32]
    sign = factor.detach().sign().reshape(-1, 1, 1, 1)
    own = (graph.get_parameter("0.weight").detach() / step.reshape(-1, 1, 1, 1)).round().clamp(-7, 7)
    assert torch.equal(held[0].float(), own * sign)  # negative gamma too
    scale = integers.get_buffer(str(fxopt.tensor_arg(weight, "scale").target))
    torch.testing.assert_close(scale, (step * factor.abs()).detach())


def test_a_channel_with_gamma_zero_is_its_bias() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Sigmoid())
    nn.init.constant_(net[1].bias, 0.75)
    nn.init.zeros_(net[1].weight)
    gm = fxopt.capture(net.eval(), torch.randn(4, 2, 6, 6))
    graph = fxopt.optimize(gm, [PrepareQat(weight_bits=4)], strict=True)
    integers = fxopt.optimize(graph, [ConvertQat(min_sqnr_db=60)], strict=True)
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(integers(x), graph(x))


def test_sides_of_a_branch_are_converted_too() -> None:
    x = torch.randn(4, 3, 6, 6)
    gm = fxopt.capture(Gate().train(), [x + 1, x - 1])
    graph = trained(gm, weight_bits=7, learn_scales=True)
    integers = fxopt.optimize(graph, [ConvertQat(min_sqnr_db=50)], strict=True)
    inner = [node.target for m in integers.modules() if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes]
    assert FAKE_QUANTIZE not in inner
    assert inner.count(DEQUANTIZE) >= 3 * 3
    for sample in (x + 1, x - 1):
        assert measure(graph(sample).detach(), integers(sample).detach()).sqnr_db > 50


def test_a_norm_behind_dropout_is_folded_too() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.Dropout2d(0.2), nn.BatchNorm2d(4), nn.ReLU6())
    settle(net)
    x = torch.randn(4, 2, 6, 6)
    graph = trained(fxopt.capture(net.train(), x), weight_bits=4)
    integers = fxopt.optimize(graph, [ConvertQat(min_sqnr_db=50)], strict=True)
    assert calls(integers)["aten.batch_norm.default"] == 0
    assert calls(integers)["fxopt.quantize.default"] == 2  # the input and the result
    (got,) = Session(to_onnx(integers, validate=False).to_bytes(), optimization="none").run([x])
    assert measure(graph(x).detach(), got).sqnr_db > 50


def test_both_in_one_run_are_quantization_without_training() -> None:
    gm = captured("ConvBnRelu").eval()
    both = fxopt.optimize(gm, [PrepareQat(), ConvertQat()], strict=True)
    plain = fxopt.optimize(gm, [Quantize(recipe="fast", min_sqnr_db=-99)], strict=True)
    assert calls(both) == calls(plain)
    assert measure(plain(*sample_of(gm)), both(*sample_of(gm))).sqnr_db > 30


def test_cleanup_in_between_keeps_what_is_trained() -> None:
    gm = captured("ConvBnRelu").eval()
    graph = fxopt.optimize(gm, [PrepareQat(weight_bits=4, learn_scales=True)], strict=True)
    tidy = fxopt.optimize(graph, DEFAULT, strict=True)
    assert {name for name, _ in tidy.named_parameters()} == {name for name, _ in graph.named_parameters()}
    torch.testing.assert_close(tidy(*sample_of(gm)), graph(*sample_of(gm)))
    assert calls(fxopt.optimize(tidy, [ConvertQat()], strict=True))["fxopt.dequantize.default"]


def test_the_trained_graph_is_left_alone_and_trains_on() -> None:
    gm = trained(captured("ConvBnRelu"), weight_bits=4)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    fxopt.optimize(gm, [ConvertQat()], strict=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in gm.state_dict().items())
    gm.train()
    gm(*sample_of(gm)).sum().backward()


def test_a_saved_graph_converts_to_the_same_integers(tmp_path: Any) -> None:
    gm = trained(captured("SameConvBn"), weight_bits=3, learn_scales=True)
    fxopt.save(gm, tmp_path / "trained.fxopt")
    first, second = (
        fxopt.optimize(g, [ConvertQat()], strict=True) for g in (gm, fxopt.load(tmp_path / "trained.fxopt"))
    )
    assert torch.equal(first(*sample_of(gm)), second(*sample_of(gm)))
    fxopt.save(first, tmp_path / "integers.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "integers.fxopt")(*sample_of(gm)), first(*sample_of(gm)))


# ---- what it is for


@pytest.fixture(scope="module")
def digits() -> Digits:
    pytest.importorskip("sklearn")
    return load_digits()


def test_training_makes_up_for_most_of_what_few_bits_lose(digits: Digits) -> None:
    net = train(digits, epochs=6)
    x = digits.train_images[:64]
    gm = fxopt.capture(net, x, dynamic_shapes={"image": {0: "batch"}})
    kept = {"calibration": list(digits.train_images[:256].split(64)), "strict": True}
    widths = {"weight_bits": 3, "bits": 4}
    after = fxopt.optimize(gm, [Quantize(**widths, recipe="fast", min_sqnr_db=-99)], **kept)
    graph = fxopt.optimize(gm.clone(copy_tensors=True), [PrepareQat(**widths, learn_scales=True)], **kept)
    fit(graph, digits, lambda images, labels: F.cross_entropy(graph(images), labels), epochs=3, rate=5e-3)
    integers = fxopt.optimize(graph, [ConvertQat()], strict=True)
    scores = Session(to_onnx(integers, validate=False).to_bytes(), optimization="none").run([digits.test_images])[0]
    with torch.no_grad():
        before, rounded = (accuracy(g(digits.test_images), digits.test_labels) for g in (gm, after))
        assert float((scores.argmax(1) == graph(digits.test_images).argmax(1)).double().mean()) > 0.99
    in_ort = accuracy(scores, digits.test_labels)
    assert before > 0.95
    assert before - rounded > 0.03
    assert before - in_ort < 0.4 * (before - rounded)


# ---- refusals and notes


def test_weights_that_can_overflow_are_named() -> None:
    gm = fxopt.capture(nn.Linear(8, 4).train(), torch.randn(4, 8))
    graph = fxopt.optimize(gm.clone(copy_tensors=True), [PrepareQat()], strict=True)
    assert not ConvertQat()(graph.eval()).notes
    with torch.no_grad():
        graph.get_parameter("weight").fill_(10.0)
    assert [note for note in ConvertQat()(graph).notes if "linear: 4 channels can overflow" in note]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learn_scales", [True, False])
def test_a_graph_that_is_not_converted_is_not_exported(learn_scales: bool, training: bool) -> None:
    gm = fxopt.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).train(), torch.randn(4, 8))
    graph = fxopt.optimize(gm, [PrepareQat(learn_scales=learn_scales)], strict=True).train(training)
    with pytest.raises(fxopt.ExportError) as caught:
        to_onnx(graph)
    message = str(caught.value)
    assert message.startswith("the graph rounds floats as it does in training with quantizers")
    assert 'fxopt.optimize(graph.eval(), ["convert-qat"]), and export the graph that it returns' in message
    to_onnx(fxopt.optimize(graph.eval(), ["convert-qat"]), contract=fxopt.Contract.lossy("sqnr_db", 20.0))


def test_a_graph_in_train_mode_is_refused() -> None:
    gm = fxopt.optimize(nn.Linear(3, 3).train(), [PrepareQat()], torch.randn(2, 3), strict=True)
    with pytest.raises(fxopt.PassError, match=r"in train mode, and integers are for evaluation"):
        ConvertQat()(gm.train())


def test_floats_and_integers_are_refused() -> None:
    gm = fxopt.capture(nn.Linear(3, 3).eval(), torch.randn(2, 3))
    with pytest.raises(fxopt.PassError, match="prepare-qat before training"):
        ConvertQat()(gm)
    integers = ConvertQat()(PrepareQat()(gm).gm).gm
    with pytest.raises(fxopt.PassError, match="a graph of integers, converted already"):
        ConvertQat()(integers)


def test_a_diverged_scale_is_refused() -> None:
    gm = PrepareQat(learn_scales=True)(fxopt.capture(nn.Linear(3, 3).eval(), torch.randn(2, 3))).gm
    with torch.no_grad():
        gm.get_parameter("input_1_growth").fill_(torch.nan)
    with pytest.raises(fxopt.PassError, match="no number above 0") as error:
        ConvertQat()(gm)
    assert "lower learning rate" in str(error.value)


def test_wrong_options_fail_at_once() -> None:
    with pytest.raises(ValueError, match="abacus"):
        ConvertQat(target="abacus")
