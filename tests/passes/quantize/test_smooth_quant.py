"""SmoothQuant: the paper's formula, where the factors go, what is left alone, and what it brings."""

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt import PassError, graph_text
from fxopt.passes.quantize.insert_qdq import InsertQdq
from fxopt.passes.quantize.quantize import PREPARATION, Quantize
from fxopt.passes.quantize.smooth_quant import ALPHAS, SmoothQuant, capped_factors, product_errors, smoothing_factors
from fxopt.testing import check_pass
from tests.passes.quantize.test_gptq import plan_of, prepared, signal

WIDTH = 16


def outlying(norm):
    """Make two channels of a norm far larger than the others, as they are in language models."""
    with torch.no_grad():
        norm.weight[3], norm.weight[7], norm.bias[7] = 60.0, 30.0, 20.0
    return norm


class Heads(nn.Module):
    """Two linears behind a norm; with ``residual``, a sum reads the norm too."""

    def __init__(self, residual=False, shared=False):
        super().__init__()
        self.norm, self.residual = outlying(nn.LayerNorm(WIDTH)), residual
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        if shared:
            self.key.weight = self.query.weight

    def forward(self, x):
        y = self.norm(x)
        z = self.query(y) * self.key(y).sigmoid()
        return y + z if self.residual else z


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.weight = outlying(nn.LayerNorm(WIDTH)), nn.Parameter(torch.randn(WIDTH, 8))

    def forward(self, x):
        return self.norm(x) @ self.weight


X = torch.randn(64, WIDTH)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula_of_the_paper(alpha):
    largest, weights = torch.rand(6, dtype=torch.float64) * 9 + 0.1, [torch.randn(4, 6), torch.randn(3, 6)]
    columns = np.abs(np.concatenate([w.numpy() for w in weights])).max(0).astype(np.float64)
    want = largest.numpy() ** alpha / columns ** (1 - alpha)
    np.testing.assert_allclose(smoothing_factors(largest, weights, alpha).numpy(), want, rtol=1e-6)


def test_a_channel_without_numbers_keeps_its_size():
    weight = torch.randn(3, 4)
    weight[:, 2] = 0
    factor = smoothing_factors(torch.tensor([0.0, 1.0, 5.0, 2.0], dtype=torch.float64), [weight], 0.5)
    assert factor[0] == factor[2] == 1
    assert bool(factor.isfinite().all())


def test_the_factors_go_into_the_norm_and_the_columns():
    model = Heads()
    gm = prepared(model, X)
    text = graph_text(gm)
    result = check_pass(SmoothQuant(alpha=0.5), gm, skips=[])
    assert graph_text(result.gm) == text  # not a node more
    y = model.norm(X).detach().double()
    columns = torch.cat([model.query.weight, model.key.weight]).detach().double().abs().amax(0)
    s = (y.abs().amax(0) / columns).sqrt()
    for name, want in (
        ("norm.weight", model.norm.weight / s),
        ("norm.bias", model.norm.bias / s),
        ("query.weight", model.query.weight * s),
        ("key.weight", model.key.weight * s),
        ("query.bias", model.query.bias),
    ):
        torch.testing.assert_close(result.gm.get_parameter(name), want.detach().float(), rtol=1e-5, atol=1e-7)


def test_a_product_with_a_matrix_that_lies_the_other_way():
    assert check_pass(SmoothQuant(), prepared(Product(), X)).modified


def test_a_norm_that_a_sum_reads_is_left_alone_or_multiplied_behind():
    gm = prepared(Heads(residual=True), X)
    why = "add reads it too; insert_mul=True multiplies in front of its linears"
    assert not check_pass(SmoothQuant(), gm, skips=[why]).modified
    result = check_pass(SmoothQuant(insert_mul=True), gm, skips=[])
    inserted = [change for change in result.changes if change.kind == "inserted"]
    assert len(inserted) == 1
    (multiplied,) = (node for node in result.gm.graph.nodes if node.name == inserted[0].node)
    assert [user.target for user in multiplied.users] == [torch.ops.aten.linear.default] * 2


def test_a_linear_behind_something_else_is_left_alone():
    gm = prepared(nn.Sequential(nn.GELU(), nn.Linear(WIDTH, 4)), X)
    assert not check_pass(SmoothQuant(insert_mul=True), gm, skips=[]).modified


def test_capped_factors_leave_channels_below_the_limit_alone():
    largest = torch.tensor([1.0, 100.0, 2.0, 10.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    first, second = capped_factors(largest)
    assert first.tolist() == [1, 10, 1, 1, 1, 1, 1, 1]
    assert second.tolist() == [1, 50, 1, 5, 1, 1, 1, 1]


def test_leaves_a_weight_that_something_else_reads():
    gm = prepared(Heads(shared=True), X)
    assert not check_pass(SmoothQuant(), gm, skips=["something else reads its weight too"]).modified


def test_a_norm_without_weight():
    gm = prepared(nn.Sequential(nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 4)), X)
    why = "it has no weight by channel; insert_mul=True multiplies in front of its linears"
    assert not check_pass(SmoothQuant(), gm, skips=[why]).modified
    assert check_pass(SmoothQuant(insert_mul=True), gm).modified


@pytest.mark.parametrize("alpha", [0.6, None])
def test_the_quantized_net_is_better(alpha):
    gm = prepared(Heads(), X)
    x = torch.randn(64, WIDTH)
    quantize = Quantize(method="minmax", recipe="fast")
    smooth = SmoothQuant(alpha=alpha, method="minmax")(gm).gm
    before = signal(gm, InsertQdq(quantize.make_plan(gm))(gm).gm, x)
    after = signal(gm, InsertQdq(quantize.make_plan(smooth))(smooth).gm, x)
    assert after > before + 3


def test_a_search_takes_the_best_of_the_errors_or_leaves_the_norm_alone():
    gm = prepared(Heads(), X)
    weights = [gm.get_parameter(f"{name}.weight").detach() for name in ("query", "key")]
    gain, shift = gm.get_parameter("norm.weight"), gm.get_parameter("norm.bias")
    rows = nn.functional.layer_norm(X, [WIDTH], gain, shift).detach()
    largest = rows.abs().amax(0).double()
    factors = [smoothing_factors(largest, weights, alpha) for alpha in ALPHAS] + list(capped_factors(largest))
    errors = product_errors(rows, weights, factors)
    smooth = SmoothQuant(alpha=None)(gm).gm
    best = factors[int(np.argmin(errors))]
    torch.testing.assert_close(smooth.get_parameter("query.weight"), weights[0] * best.float(), rtol=1e-5, atol=1e-6)
    flat, same = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
    with torch.no_grad():
        flat.weight.zero_()
        flat.bias.fill_(1.0)
        same.weight.fill_(0.5)
    even = prepared(nn.Sequential(flat, same), X)
    result = SmoothQuant(alpha=None)(even)
    assert [skip.why for skip in result.skips] == ["no alpha makes its products a twentieth better"]


def test_the_error_of_products_is_that_of_eight_bits():
    rows, weight = torch.rand(200, 32), torch.randn(16, 32)
    one = torch.ones(32, dtype=torch.float64)
    x = rows.double().numpy()
    scale = x.max() / 255
    steps = np.abs(weight.double().numpy()).max(1, keepdims=True) / 127
    got = (np.round(x / scale) * scale) @ (np.round(weight.double().numpy() / steps) * steps).T
    exact = x @ weight.double().numpy().T
    want = (((got - exact) ** 2).sum(1) / (exact**2).sum(1)).mean()
    assert product_errors(rows, [weight], [one], "minmax") == [pytest.approx(want, rel=0.05)]


def test_refuses_what_it_cannot_work_on():
    gm = prepared(Heads(), X)
    with pytest.raises(PassError, match="the graph is quantized already, and smooth-quant works on floats"):
        SmoothQuant()(InsertQdq(plan_of(gm, 8))(gm).gm)
    with pytest.raises(ValueError, match=r"alpha is 1.5; wanted 0 to 1, or None to search"):
        SmoothQuant(alpha=1.5)
    with pytest.raises(ValueError, match="there is no range method 'best'"):
        SmoothQuant(method="best")


@pytest.mark.slow
@pytest.mark.zoo
def test_real_sentences():
    from tests.zoo import data, real

    sentences = real.REAL["minilm_l6"]
    ids, mask = data.tokens(len(data.SENTENCES))
    gm = fxopt.optimize(sentences.load(), PREPARATION, (ids[:2], mask[:2]), dynamic_shapes=sentences.dynamic_shapes)
    gm.calibration = list(zip(ids[:24].split(8), mask[:24].split(8), strict=True))
    quantize = Quantize(method="minmax", recipe="fast")
    smooth = SmoothQuant(alpha=0.7, insert_mul=True)(gm).gm
    scores = [sentences.score(real.eager(InsertQdq(quantize.make_plan(g))(g).gm)) for g in (gm, smooth)]
    assert scores[1] > scores[0] + 0.003
