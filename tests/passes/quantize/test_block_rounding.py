"""GPTQ of matrices in blocks: never worse than nearest, in the order of the graph, and only where it can be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt import CalibrationError
from fxopt.numerics import measure
from fxopt.passes import QuantizeWeights
from fxopt.passes.quantize.block_rounding import gptq_blocks
from fxopt.passes.quantize.blocks import quantize_blocks

FORM = {"bits": 4, "block_size": 16, "symmetric": False}


def correlated(rows, size, seed=0):
    """Inputs of which each holds much of the others, so that an error in one weight can be made up for by others."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, max(2, size // 4), generator=draw)
    mixed = hidden @ torch.randn(max(2, size // 4), size, generator=torch.Generator().manual_seed(7))
    return mixed + 0.1 * torch.randn(rows, size, generator=draw)


def hessian_of(x):
    return 2 * x.double().T @ x.double()


def errors(held, weight, hessian):
    """Return the error ``e H e^T`` of each row, in float64."""
    error = held.floats().double() - weight.double()
    return ((error @ hessian) * error).sum(-1)


@given(
    bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans(), size=st.integers(1, 70), rows=st.integers(1, 90),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_no_row_is_worse_than_to_nearest(bits, symmetric, size, rows, seed):
    torch.manual_seed(seed)
    weight, hessian = torch.randn(5, size), hessian_of(correlated(rows, size, seed))
    held = quantize_blocks(weight, bits=bits, block_size=16, symmetric=symmetric)
    found = gptq_blocks(weight, held, hessian)
    slack = 1e-5 * float(hessian.diagonal().sum()) * float(weight.square().max())  # floats() rounds to float32
    assert (errors(found, weight, hessian) <= errors(held, weight, hessian) + slack).all()
    assert torch.equal(found.scales, held.scales)
    assert found.packed.shape == held.packed.shape


@pytest.mark.parametrize("symmetric", [False, True])
def test_errors_make_up_for_each_other(symmetric):
    weight, hessian = torch.randn(8, 72), hessian_of(correlated(500, 72))  # the last block is half empty
    held = quantize_blocks(weight, bits=4, block_size=16, symmetric=symmetric)
    found = gptq_blocks(weight, held, hessian)
    assert errors(found, weight, hessian).sum() < 0.5 * errors(held, weight, hessian).sum()


def test_a_layer_is_rounded_on_what_the_stored_layers_before_it_yield():
    x, net = correlated(64, 32), nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    pass_ = QuantizeWeights(rounding="gptq", min_elements=1, min_sqnr_db=-100.0, **FORM)
    loader = [(x[:32],), (x[32:],)]
    gm = fxopt.optimize(net, [pass_], (x[:32],), calibration=loader, strict=True)
    first, second = (quantize_blocks(layer.weight.detach(), **FORM) for layer in (net[0], net[2]))
    with torch.no_grad():
        first = gptq_blocks(net[0].weight, first, hessian_of(x))
        hidden = nn.functional.linear(x, first.floats(), net[0].bias).relu()
        second = gptq_blocks(net[2].weight, second, hessian_of(hidden))
    held = gm.state_dict()
    assert torch.equal(held["0.weight_blocks"], first.packed)
    assert torch.equal(held["2.weight_blocks"], second.packed)


@pytest.mark.parametrize("way", ["linear", "mm", "matmul", "addmm", "transposed"])
def test_every_way_to_multiply_gains_on_inputs_that_were_not_calibrated_on(way):
    x, other = correlated(300, 64), correlated(50, 64, seed=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 64) if way in ("linear", "transposed") else torch.randn(64, 16))
            self.bias = nn.Parameter(torch.randn(16))

        def forward(self, x):
            if way == "linear":
                return nn.functional.linear(x, self.weight, self.bias)
            if way == "transposed":
                return x @ self.weight.t()
            return torch.addmm(self.bias, x, self.weight) if way == "addmm" else getattr(torch, way)(x, self.weight)

    torch.manual_seed(0)
    net, found = Net().eval(), []
    for rounding in ("nearest", "gptq"):
        pass_ = QuantizeWeights(rounding=rounding, min_elements=1, min_sqnr_db=-100.0, **FORM)
        gm = fxopt.optimize(net, [pass_], (x[:2],), dynamic_shapes={"x": {0: "n"}}, calibration=[(x,)], strict=True)
        found.append(measure(net(other), gm(other)).sqnr_db)
    assert found[1] > found[0] + 3


class Tied(nn.Module):
    """An embedding, a head of the same matrix, and a layer between them."""

    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(40, 32), nn.Linear(32, 32)

    def forward(self, index):
        return self.layer(self.words(index)).tanh() @ self.words.weight.t()


def test_a_matrix_that_is_read_twice_is_rounded_to_nearest_and_said_so():
    net, index = Tied().eval(), torch.randint(0, 40, (6, 9))
    pass_ = QuantizeWeights(rounding="gptq", min_elements=1, min_sqnr_db=-100.0, **FORM)
    gm = fxopt.optimize(net, [pass_], (index,), strict=True)
    assert torch.equal(gm.state_dict()["words.weight_blocks"], quantize_blocks(net.words.weight, **FORM).packed)
    (step,) = gm.report.steps
    assert step.notes[0] == (
        "1 of 2 matrices rounded by GPTQ, the others, embeddings or read by several calls, to nearest"
    )


def test_calibration_inputs_that_do_not_fit_are_refused():
    pass_ = QuantizeWeights(rounding="gptq", min_elements=1)
    with pytest.raises(CalibrationError):
        fxopt.optimize(nn.Linear(32, 8).eval(), [pass_], (torch.randn(2, 32),), calibration=[], strict=True)


@pytest.mark.parametrize(
    ("options", "told"), [({"rounding": "up"}, "rounding is 'up'"), ({"damping": 0.0}, "damping is 0")]
)
def test_refuses_options(options, told):
    with pytest.raises(ValueError, match=told):
        QuantizeWeights(**options)
