"""Weights in blocks, tables and signs: the layout of ONNX, ORT beside eager, gradients, sizes, refusals."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.export import Session, optimized_model, to_onnx
from fxopt.numerics import measure
from fxopt.passes import BinarizeWeights, CodebookWeights, QuantizeWeights
from fxopt.passes.quantize.binarize import binary_weight, ternary_weight
from fxopt.passes.quantize.blocks import quantize_blocks
from fxopt.passes.quantize.tables import nearest_codes, number_table

X = torch.randn(3, 5, 96)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(96, 128), nn.Linear(128, 96)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.head(F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1))


def captured(net, *inputs):
    return fxopt.capture(net.eval(), inputs)


def small(net, item, *inputs):
    return fxopt.optimize(captured(net, *inputs), [item], strict=True)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The layout of MatMulNBits in numpy: codes from the low bits up."""
    per = 8 // bits
    shifts = np.arange(per) * bits
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)


@settings(max_examples=30)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([16, 32]), st.booleans(), st.integers(17, 70), st.integers(0, 99))
def test_blocks_are_those_of_matmulnbits(bits, block_size, symmetric, width, seed):
    weight = torch.randn(4, width, generator=torch.Generator().manual_seed(seed))
    held = quantize_blocks(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    blocks = -(-width // block_size)
    codes = unpacked(held.packed.numpy(), bits).astype(np.float64)
    assert codes.shape == (4, blocks, block_size)
    zero = np.full((4, blocks), 2.0 ** (bits - 1))
    if held.zero_points is not None:
        zero = unpacked(held.zero_points.numpy(), bits)[:, :blocks]
    scale = held.scales.double().numpy()
    have = ((codes - zero[..., None]) * scale[..., None]).reshape(4, -1)[:, :width]
    padded = np.zeros((4, blocks * block_size))
    padded[:, :width] = weight.double().numpy()
    span = np.ptp(padded.reshape(4, blocks, -1), axis=-1, keepdims=True) + 1e-6
    worst = np.abs(have - weight.double().numpy()).reshape(4, -1)
    limit = np.repeat(span, block_size, axis=-1).reshape(4, -1)[:, :width]
    assert (worst <= limit * (1.0 if bits == 2 else 0.5)).all()
    assert (np.sqrt((worst**2).mean()) <= np.sqrt((limit**2).mean()) / 2 ** (bits - 1)).all()


@pytest.mark.ort
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ort_multiplies_by_blocks(bits, symmetric):
    gm = small(Mlp(), QuantizeWeights(bits=bits, symmetric=symmetric), X)
    file = to_onnx(gm)
    assert len(file.to_bytes()) < 96 * 128 * 2 * bits / 8 + 9000
    kinds = [node.op_type for node in optimized_model(file.to_bytes()).graph]
    assert kinds.count("MatMulNBits") == 2
    for level in ("none", "all"):
        (have,) = Session(file.to_bytes(), optimization=level).run([X])
        torch.testing.assert_close(have, gm(X).detach(), rtol=1e-4, atol=1e-4)


def test_wider_blocks_are_closer():
    gm, net = {}, Mlp()
    for bits in (2, 4, 8):
        gm[bits] = measure(net(X).detach(), small(net, QuantizeWeights(bits=bits), X)(X).detach()).sqnr_db
    assert gm[2] + 8 < gm[4] < gm[8] - 15


def test_a_gradient_reaches_the_input_of_blocks():
    net = nn.Linear(96, 64)
    gm = small(net, QuantizeWeights(bits=8), X)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    gm(x).sum().backward()
    net(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0.05, atol=0.02)


@pytest.mark.ort
def test_embeddings_and_tied_weights_are_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(200, 64)

        def forward(self, ids):
            return F.linear(self.table(ids), self.table.weight)

    ids = torch.randint(0, 200, (2, 7))
    gm = small(Tied(), QuantizeWeights(bits=4, block_size=16), ids)
    assert len([name for name, _ in gm.named_buffers() if name.endswith("_blocks")]) == 1
    assert not list(gm.parameters())
    (have,) = Session(to_onnx(gm).to_bytes()).run([ids])
    torch.testing.assert_close(have, gm(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("item", [QuantizeWeights(), CodebookWeights(), BinarizeWeights(keep_ends=False)])
def test_graphs_are_saved_loaded_and_copied(item, tmp_path):
    gm = small(Mlp(), item, X)
    fxopt.save(gm, tmp_path / "small.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "small.fxopt")(X), gm(X))
    assert torch.equal(copy.deepcopy(gm)(X), gm(X))


def test_small_and_named_weights_stay():
    gm = captured(Mlp(), X)
    assert not QuantizeWeights(min_elements=10**6)(gm).modified
    result = QuantizeWeights(skip=("up.*",))(gm)
    assert sum(node.target is torch.ops.aten.linear.default for node in result.gm.graph.nodes) == 1


@pytest.mark.parametrize(("make", "why"), [
    (lambda: QuantizeWeights(bits=3), "bits is 3"), (lambda: QuantizeWeights(block_size=24), "a power of two of 16"),
    (lambda: CodebookWeights(bits=3), "bits is 3"), (lambda: CodebookWeights(table="random"), "table is 'random'"),
    (lambda: BinarizeWeights(kind="quaternary"), "kind is 'quaternary'"),
])  # fmt: skip
def test_options_that_do_not_exist_are_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()


@settings(max_examples=30)
@given(st.lists(st.integers(-40, 40), min_size=4, max_size=9, unique=True), st.integers(2, 3))
def test_the_table_of_kmeans_is_the_best_one(numbers, entries):
    values = torch.tensor(sorted(numbers), dtype=torch.float32)
    table = number_table(values, entries, "kmeans")

    def error(parts):
        return sum(float(((part - part.mean()) ** 2).sum()) for part in parts)

    cuts = itertools.combinations(range(1, len(values)), entries - 1)
    best = min(error([values[a:b] for a, b in itertools.pairwise((0, *cut, len(values)))]) for cut in cuts)
    have = float(((table[nearest_codes(values, table)] - values) ** 2).sum())
    assert have == pytest.approx(best, rel=1e-4, abs=1e-4)


def test_the_gradient_of_an_entry_is_the_sum_over_its_elements():
    net = nn.Linear(96, 32, bias=False)
    gm = small(net, CodebookWeights(bits=2), X)
    (table,) = gm.parameters()
    gm(X).square().sum().backward()
    codes = nearest_codes(net.weight, table.detach().flatten())
    weight = table.detach().flatten()[codes].requires_grad_()
    F.linear(X, weight).square().sum().backward()
    want = torch.zeros(4).index_add(0, codes.flatten(), weight.grad.flatten())
    torch.testing.assert_close(table.grad.flatten(), want, rtol=1e-3, atol=1e-2)


def test_signs_and_codes_are_those_of_the_papers():
    weight = torch.tensor([[0.5, -1.5, 1.0, -0.1], [2.0, 2.0, -2.0, 2.0]])
    codes, alpha = binary_weight(weight)
    have = torch.tensor([-1.0, 1.0])[codes] * alpha[:, None]
    torch.testing.assert_close(have, torch.tensor([[0.775, -0.775, 0.775, -0.775], [2.0, 2.0, -2.0, 2.0]]))
    codes, alpha = ternary_weight(weight)  # limit 0.7 * 0.775 = 0.5425
    have = torch.tensor([0.0, 1.0, -1.0])[codes] * alpha[:, None]
    torch.testing.assert_close(have, torch.tensor([[0.0, -1.25, 1.25, 0.0], [2.0, 2.0, -2.0, 2.0]]))


@pytest.mark.ort
@pytest.mark.parametrize("item", [
    CodebookWeights(bits=4, min_elements=1), CodebookWeights(bits=2, table="power-of-two", min_elements=1),
    BinarizeWeights(keep_ends=False, min_elements=1), BinarizeWeights(kind="ternary", keep_ends=False, min_elements=1),
], ids=["kmeans", "powers of two", "binary", "ternary"])  # fmt: skip
def test_ort_computes_tables_and_signs(item):
    images = torch.randn(4, 1, 8, 8)
    gm = small(Digits(), item, images)
    file = to_onnx(gm)
    for level in ("none", "all"):
        (have,) = Session(file.to_bytes(), optimization=level).run([images])
        torch.testing.assert_close(have, gm(images).detach(), rtol=1e-4, atol=1e-4)
    assert len(file.to_bytes()) < len(to_onnx(captured(Digits(), images)).to_bytes()) / 1.5


def _fitted(model, images, labels, steps, rate):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(steps):
        chosen = torch.randint(0, len(images), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model


def _accuracy(model, images, labels):
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize(("kind", "lost"), [("binary", 0.05), ("ternary", 0.05), ("table", 0.02)])
def test_fine_tuning_brings_back_most_of_the_accuracy(kind, lost):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    net = _fitted(Digits(), *train, 300, 3e-3)
    full = _accuracy(net, *test)
    gm = fxopt.capture(net.eval(), (images[:8],), dynamic_shapes=({0: "batch"},))
    if kind == "table":
        item = CodebookWeights(bits=2, min_elements=1, min_sqnr_db=-20.0)
        trained = fxopt.optimize(gm, [item], strict=True)
        before = _accuracy(trained, *test)
        after = _accuracy(_fitted(trained, *train, 200, 2e-3), *test)
    else:
        options = {"kind": kind, "keep_ends": False, "min_elements": 1, "min_sqnr_db": -30.0}
        before = _accuracy(fxopt.optimize(gm, [BinarizeWeights(**options)], strict=True), *test)
        trained = _fitted(fxopt.optimize(gm, [BinarizeWeights(train=True, **options)], strict=True), *train, 300, 2e-3)
        packed = fxopt.optimize(trained, [BinarizeWeights(**options)], strict=True)
        torch.testing.assert_close(packed(images[:8]), trained(images[:8]), rtol=1e-4, atol=1e-4)
        after = _accuracy(packed, *test)
    assert after >= full - lost
    assert after > before
