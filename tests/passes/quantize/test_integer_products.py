"""Products of integers on this machine are exact, and trials with them agree with trials in floats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes import Quantize
from fxopt.passes.quantize import integer_products, layer_matrix
from fxopt.passes.quantize.correct_bias import channel_means, corrections
from fxopt.passes.quantize.integer_products import (
    IntegerInput,
    IntegerProduct,
    Sums,
    matrix_product,
    sums_here,
)
from fxopt.passes.quantize.quantize import PREPARATION
from fxopt.passes.quantize.simulate import Simulation, signal_to_noise
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.target import ORT_CPU
from fxopt.quantized_ops import rounded

needs_integers = pytest.mark.skipif(sums_here() is Sums.NONE, reason="this machine has no integer products")
MOST = 127 if sums_here() is Sums.EXACT else 64  # of the weights; two products of 64 fit into 16 bits


class OneNumber(nn.Module):
    """A single stride, padding and dilation stand for both axes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, None, [2], [1], [1])


class Transposed(nn.Module):
    """A linear layer and a convolution of what lies in memory the other way round."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(24, 16))
        self.conv = nn.Conv1d(6, 8, 3)

    def forward(self, x):
        y = F.linear(x.transpose(1, 2), self.weight.t())
        return self.conv(y.transpose(1, 2).relu()[:, :6])


IMAGES = (4, 6, 9, 7)


class Strided(nn.Module):
    def forward(self, x):
        return x.as_strided((2, 49), (196, 1))


LAYERS = {
    "linear": (nn.Linear(24, 16), (5, 24)),
    "linear of three axes": (nn.Linear(24, 16, bias=False), (2, 5, 24)),
    "transposed": (Transposed(), (2, 24, 5)),
    "linear, saturated": (nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)), (5, 24)),
    "conv1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 20)),
    "conv2d": (nn.Conv2d(6, 8, 3, padding=1), IMAGES),
    "conv2d of groups": (nn.Conv2d(6, 8, (3, 1), stride=(2, 1), padding=(1, 0), groups=2, bias=False), IMAGES),
    "one number for both axes": (OneNumber(), IMAGES),
    "long windows": (nn.Conv1d(1, 8, 100, stride=4, padding=7), (3, 1, 400)),
    "long windows of two channels": (
        nn.Sequential(nn.Conv2d(2, 6, (40, 2), stride=(3, 1), padding=(5, 1)), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        (3, 2, 90, 6),
    ),
    "depthwise": (nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 4, 1)), IMAGES),
    "pooled": (
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 3)),
        IMAGES,
    ),
    "prelu": (
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.PReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.Hardtanh(-1, 1)),
        IMAGES,
    ),
}


def simulations(name, monkeypatch, channels_last=False):
    """Return a sample, and simulations of the same plan: in integers where they are, and in floats."""
    net, size = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    gm = fxopt.optimize(net.eval(), PREPARATION, (x,), modes="current", check="off")
    plan = Quantize(recipe="fast").make_plan(gm, [(x,)])
    integers = Simulation(gm, plan, ORT_CPU)
    monkeypatch.setattr(integer_products, "sums_here", lambda: Sums.NONE)
    floats = Simulation(gm, plan, ORT_CPU)
    monkeypatch.undo()
    assert not floats.layers
    return [fxopt.Sample((x,)), fxopt.Sample((x.flip(0),))], integers, floats


def long_windows(layers):
    """Return the convolutions of two channels that are multiplied as rows, with other pairs than a runtime adds."""
    return {node for node in layers if node.args[1].meta["val"].shape[1:3] == (2, 40)}


@needs_integers
@pytest.mark.parametrize(
    ("name", "channels_last"),
    [(name, last) for name, (_, size) in LAYERS.items() for last in ([False, True] if len(size) == 4 else [False])],
)
def test_trials_in_integers_agree_with_trials_in_floats(name, channels_last, monkeypatch):
    samples, integers, floats = simulations(name, monkeypatch, channels_last)
    layers = {site.node for site in integers.layout.sites.values() if site.is_layer}
    assert integers.layers.keys() == layers - (long_windows(layers) if sums_here() is Sums.PAIRED else set())
    haves, wants = integers.run(samples), floats.run(samples)
    for (have,), (want,) in zip(haves, wants, strict=True):
        assert have.stride() == want.stride()
        # A tie that float32 rounds the other way moves a number by a step, and there are 255 of them.
        assert float((have - want).abs().max()) <= 0.02 * float(want.abs().max())
    assert signal_to_noise(wants, haves) > 45


@needs_integers
@pytest.mark.parametrize(
    "name",
    [
        "long windows",
        pytest.param(
            "long windows of two channels",
            marks=pytest.mark.skipif(sums_here() is Sums.PAIRED, reason="sums of these pairs overflow here"),
        ),
    ],
)
def test_long_windows_are_rows_of_a_matrix_some_images_at_a_time(name, monkeypatch):
    samples, integers, _ = simulations(name, monkeypatch)
    first = integers.layers[next(iter(integers.layers))]
    assert first.rows is not None
    ((want,), _) = integers.run(samples)
    monkeypatch.setattr(layer_matrix, "_CHUNK", 1)
    ((have,), _) = integers.run(samples)
    assert torch.equal(have, want)


@needs_integers
@pytest.mark.parametrize("asks", [False, True])
def test_images_of_one_channel_get_channels_last_only_where_nobody_asks(asks, monkeypatch):
    x = torch.randn(2, 1, 9, 9)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), Strided() if asks else nn.Identity())
    gm = fxopt.optimize(net.eval(), PREPARATION, (x,), modes="current", check="off")
    simulation = Simulation(gm, Quantize(recipe="fast").make_plan(gm, [(x,)]), ORT_CPU)
    (layer,) = simulation.layers.values()
    assert layer.any_layout is not asks
    found = layer(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))
    assert found.is_contiguous(memory_format=torch.channels_last) is not asks
    assert found.is_contiguous() is asks


@needs_integers
@pytest.mark.parametrize("name", ["linear, saturated", "depthwise", "pooled", "prelu"])
def test_corrections_agree_with_those_in_floats(name, monkeypatch):
    samples, integers, floats = simulations(name, monkeypatch)
    means = {key: mean + 0.5 for key, mean in channel_means(integers.gm, ORT_CPU, samples).items()}
    have, want = (corrections(simulation, samples, means) for simulation in (integers, floats))
    assert have.keys() == want.keys()
    for key, shift in want.items():
        torch.testing.assert_close(have[key], shift, rtol=0.02, atol=0.02)
    shifted, other = (one.run_shifted(samples, want) for one in (integers, floats))
    assert signal_to_noise(other, shifted) > 45
    assert signal_to_noise(other, integers.run(samples)) < 30  # the shifts are no trifle


@needs_integers
def test_a_result_that_integers_alone_read_is_never_a_float(monkeypatch):
    _, integers, _ = simulations("depthwise", monkeypatch)
    (first,) = [node for node in integers.layers if node.name == "conv2d"]
    found = integers.requantized[first]
    assert {node.name for node in found.replaced} == {"conv2d", found.result.name}
    assert found.result.name != "conv2d"
    assert not integers.readers[found.result]


@needs_integers
@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
def test_products_are_exact(zero_point):
    generator = torch.Generator().manual_seed(zero_point)
    inputs = IntegerInput(0.25, zero_point, 255)  # powers of two: no rounding of floats
    images = torch.randint(0, 256, (2, 8, 6, 5), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-MOST, MOST + 1, (4, 8, 3, 3), generator=generator, dtype=torch.int8)
    scale, bias = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, -2.0, 8.0])
    exact = F.conv2d(images.double() - zero_point, weight.double(), padding=1) * 0.25 * scale[:, None, None]
    found = IntegerProduct(inputs, weight, scale, bias, ([1, 1], [1, 1], [1, 1], 1))(images)
    assert torch.equal(found.double(), exact + bias[:, None, None])

    rows, matrix = images.flatten(1), weight.flatten(1)[:, :60].repeat(1, 4)
    exact = (rows.double() - zero_point) @ matrix.double().t() * 0.25 * scale
    assert torch.equal(matrix_product(rows, inputs, matrix, scale).double(), exact)
    assert torch.equal(IntegerProduct(inputs, matrix, scale, bias)(rows).double(), exact + bias)
    transposed = matrix.t().contiguous().t()
    assert torch.equal(IntegerProduct(inputs, transposed, scale, bias)(rows).double(), exact + bias)
    becomes = IntegerInput(float(exact.abs().max()) / 64, 10, 255)
    assert torch.equal(IntegerProduct(inputs, matrix, scale)(rows, None, becomes), becomes.integers(exact.float()))


@needs_integers
@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize(
    ("size", "kernel", "windows"),
    [
        ((5, 1, 33, 8), (2, 1, 7, 7), ([1, 2], [0, 0], [3, 1], 1)),  # of these oneDNN 3.x gets most numbers wrong
        ((5, 16, 13, 20), (16, 1, 1, 2), ([2, 1], [3, 0], [1, 1], 16)),
        ((2, 8, 9, 9), (8, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 8)),
        ((2, 6, 9, 9), (4, 3, 5, 5), ([2, 2], [2, 2], [1, 1], 2)),
    ],
)
def test_every_kind_of_product_is_right(size, kernel, windows, zero_point):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    weight = torch.randint(-MOST, MOST + 1, kernel, generator=generator, dtype=torch.int8)
    product = IntegerProduct(IntegerInput(0.5, zero_point, 255), weight, torch.ones(()), None, windows)
    want = F.conv2d((images.double() - zero_point) * 0.5, weight.double(), None, *windows)
    becomes = IntegerInput(float(want.abs().max()) / 100, 100, 255)
    for _ in range(2):
        torch.testing.assert_close(product(images).double(), want, rtol=1e-5, atol=1e-2)
        steps = product(images, None, becomes).int() - becomes.integers(want.float()).int()
        assert int(steps.abs().max()) <= 1


@needs_integers
def test_a_kind_that_is_wrong_is_computed_in_floats(monkeypatch):
    inputs, weight = IntegerInput(0.5, 3, 255), torch.full((4, 8), 7, dtype=torch.int8)
    rows = torch.arange(24, dtype=torch.uint8).reshape(3, 8)
    product = IntegerProduct(inputs, weight, torch.ones(()))
    right = product(rows)
    monkeypatch.setattr(integer_products, "_right", {})
    monkeypatch.setattr(product, "_product", lambda *arguments: right + 100)
    assert torch.equal(product(rows), right)


@pytest.mark.parametrize(
    ("net", "size"),
    [
        (nn.Conv2d(6, 8, 1, padding=1), (2, 6, 9, 7)),
        (nn.Conv1d(6, 8, 3, padding=3), (2, 6, 20)),
        (nn.Linear(1, 4), (5, 1)),
    ],
)
def test_what_is_known_to_be_wrong_is_left_to_floats(net, size):
    x = torch.randn(size)
    gm = fxopt.optimize(net.eval(), PREPARATION, (x,), modes="current", check="off")
    simulation = Simulation(gm, Quantize(recipe="fast").make_plan(gm, [(x,)]), ORT_CPU)
    assert not simulation.layers
    ((have,),) = simulation.run([fxopt.Sample((x,))])
    assert signal_to_noise([[gm(x).detach()]], [[have]]) > 30


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_stand_for_what_rounding_leaves(bits, signed):
    spec = QuantSpec("activation", bits, signed=signed, symmetric=False, scale=(0.37,), zero_point=(2,))
    inputs = IntegerInput.of(spec)
    x = torch.linspace(-120, 120, 997)
    torch.testing.assert_close(inputs.floats(inputs.integers(x)), rounded(x, 0.37, 2, *spec.limits), rtol=0, atol=1e-5)


def test_sixteen_bits_are_no_bytes():
    assert (
        IntegerInput.of(QuantSpec("activation", 16, signed=False, symmetric=False, scale=(1.0,), zero_point=(0,)))
        is None
    )


KINDS = [
    ((8, 24), None),
    ((8, 7), None),
    ((6, 8, 1, 1), ([1, 1], [0, 0], [1, 1], 1)),
    ((6, 3, 3, 3), ([2, 2], [1, 1], [1, 1], 1)),
    ((6, 5, 1, 4), ([1, 1], [0, 1], [1, 1], 1)),
    ((6, 3, 3, 3), ([1, 1], [0, 0], [1, 1], 2)),
    ((8, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 8)),
    ((8, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 4)),
]


@needs_integers
@pytest.mark.parametrize(("size", "windows"), KINDS)
@pytest.mark.parametrize("second", [1, 2])
def test_products_taken_for_exact_are_exact_for_the_worst_input(size, windows, second, monkeypatch):
    """Two products of 255 with 127 and 1 sum to 32,640 in 16 bits; with 127 and 2 they would to 32,895."""
    weight = torch.zeros(size, dtype=torch.int8)
    weight[::2, :1], weight[::2, 1:2] = 127, second
    weight[1::2, :1], weight[1::2, 1:2] = -127, -second
    product = IntegerProduct(IntegerInput(1.0, 0, 255), weight, torch.ones(()), None, windows)
    shape = (3, size[1]) if windows is None else (3, size[1] * windows[3], 9, 9)
    images = torch.full(shape, 255, dtype=torch.uint8)
    x = images.double()
    want = F.linear(x, weight.double()) if windows is None else F.conv2d(x, weight.double(), None, *windows)
    if second == 1 or size[1] == 1 or sums_here() is Sums.EXACT:
        found = product.unchecked(images) if sums_here() is Sums.PAIRED else product(images)
        assert torch.equal(found.double(), want)
    monkeypatch.setattr(integer_products, "sums_here", lambda: Sums.PAIRED)
    assert integer_products._is_exact(weight, windows, 255) == (second == 1 or size[1] == 1)


def test_layers_whose_pairs_overflow_are_left_to_floats(monkeypatch):
    monkeypatch.setattr(integer_products, "sums_here", lambda: Sums.PAIRED)
    net, x = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)), torch.rand(8, 16)
    with torch.no_grad():
        net[0].weight.fill_(1.0)  # 127 each, unless sums must not overflow
        net[1].weight.copy_(torch.tensor([1.0, -1.0]).repeat(16, 8))
    gm = fxopt.optimize(net.eval(), PREPARATION, (x,), modes="current", check="off")
    for no_saturation, count in ((False, 1), (True, 2)):
        plan = Quantize(recipe="fast", no_saturation=no_saturation).make_plan(gm, [(x,)])
        layers = Simulation(gm, plan, ORT_CPU).layers
        assert len(layers) == count
        assert any(layer.args[0].op == "call_function" for layer in layers)  # the second is always among them


@pytest.fixture
def asked_again():
    """Let the machine be asked anew, before a test and after it."""
    caches = integer_products.sums_here, integer_products._matrix_products_work
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_matrix_products_that_saturate_are_left_to_floats(asked_again, monkeypatch):
    saturating = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *operands: saturating(*operands).clamp_max(2**15 - 1))
    inputs = IntegerInput(0.5, 3, 255)
    rows, weight = torch.full((32, 8), 255, dtype=torch.uint8), torch.full((16, 8), 127, dtype=torch.int8)
    assert torch.equal(matrix_product(rows, inputs, weight, torch.ones(16)), torch.full((32, 16), 8 * 126.0 * 127))


@pytest.mark.parametrize(
    ("most", "found"), [(2**15 - 1, Sums.PAIRED), (2**14, Sums.NONE), (2**31, sums_here())], ids=["16", "15", "none"]
)
def test_what_the_largest_sums_of_pairs_become_tells_of_the_machine(most, found, asked_again, monkeypatch):
    unchecked, pairs = IntegerProduct.unchecked, 32  # of 64 channels, all the same

    def saturating(self, integers):
        return unchecked(self, integers).clamp_max(pairs * most)

    monkeypatch.setattr(IntegerProduct, "unchecked", saturating)
    assert integer_products.sums_here() is found


def test_a_version_without_the_operators_computes_in_floats(asked_again, monkeypatch):
    monkeypatch.setattr(integer_products, "_onednn", lambda name: getattr(torch.ops.onednn, f"no_{name}"))
    assert integer_products.sums_here() is Sums.NONE


@pytest.mark.parametrize(("net", "size"), [(nn.Linear(24, 16), (24,)), (nn.Conv2d(6, 8, 3), (6, 9, 7))])
def test_a_row_or_an_image_without_a_batch_is_computed_in_floats(net, size):
    x = torch.randn(size)
    gm = fxopt.optimize(net.eval(), PREPARATION, (x,), modes="current", check="off")
    simulation = Simulation(gm, Quantize(recipe="fast").make_plan(gm, [(x,)]), ORT_CPU)
    ((have,),) = simulation.run([fxopt.Sample((x,))])
    assert not simulation.layers
    assert signal_to_noise([[gm(x).detach()]], [[have]]) > 30
