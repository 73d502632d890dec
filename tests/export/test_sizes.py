"""Symbolic sizes become the fewest nodes that compute them, and the right ones."""

import pytest
import torch

import fxopt
from fxopt.export import to_onnx
from tests.export.proof import op_types, prove

pytestmark = pytest.mark.ort

SIZES = {
    "plus": lambda n: n + 3,
    "minus": lambda n: n - 1,
    "negative": lambda n: 2 - n,
    "times": lambda n: n * 4,
    "square": lambda n: n * n,
    "half": lambda n: n // 2,
    "half_of_less": lambda n: (n - 3) // 2 + 5,
    "remainder": lambda n: n % 3,
    "remainder_of_negative": lambda n: (1 - n) % 3,
    "maximum": lambda n: max(n, 4),
    "minimum": lambda n: torch.sym_min(n, 4),
    "mixture": lambda n: (n * 6 + 2) // 4 * 2 - 1,
    "ratio": lambda n: n / 4,
    "float": lambda n: torch.sym_float(n) * 0.5,
    "root": lambda n: torch._sym_sqrt(n),
}


@pytest.mark.parametrize("name", SIZES)
def test_arithmetic(name):
    prove(lambda x: x.sum() * SIZES[name](x.shape[0]), torch.randn(7, 2))


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("ratio", "float", "root")])
def test_numbers_as_outputs(name):
    prove(lambda x: (SIZES[name](x.shape[0]), x + 1), torch.randn(7, 2))


def test_conditions_on_sizes_as_outputs():
    prove(lambda x: torch.where(torch.full((1,), 1) > x.shape[0], 1.0, x), torch.randn(7, 2))


def test_a_size_that_shows_only_inside_an_expression():
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        torch.nn.Identity(), (torch.randn(6, 2),), dynamic_shapes=({0: 2 * batch},), strict=False
    )  # the symbol itself is no axis of any input
    gm = fxopt.capture(program)
    to_onnx(gm)


def test_half_of_a_derived_dimension():
    class Half(torch.nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] // 2, 2, 3).sum(1) * (x.shape[0] // 2)

    half = torch.export.Dim("half")
    program = torch.export.export(Half(), (torch.randn(6, 3),), dynamic_shapes=({0: 2 * half},), strict=False)
    file = to_onnx(fxopt.capture(program))
    (got,) = file.session().run([torch.ones(10, 3)])
    assert torch.equal(got, torch.full((5, 3), 10.0))


def test_sizes_that_only_the_data_tells():
    prove(lambda x: x[x > 0] * 2, torch.randn(7, 2))
    prove(lambda x: x[x > 0].sum() * (x > 0).sum(), torch.randn(7, 2))


def test_a_number_read_from_a_tensor():
    def forward(x, n):
        count = n.item()
        torch._check(count >= 0)
        torch._check(count <= x.shape[0])
        return x.narrow(0, 0, count) + count

    gm = fxopt.capture(forward, (torch.randn(4, 2), torch.tensor(2)))
    file = to_onnx(gm)
    x = torch.randn(4, 2)
    for count in (0, 1, 4):
        (got,) = file.session().run([x, torch.tensor(count)])
        assert torch.equal(got, x[:count] + count)


def test_many_uses_of_a_size_cost_one_shape_node():
    def forward(x):
        n = x.shape[0]
        for _ in range(5):
            x = x + torch.zeros(n, 2)
        return x * n

    types = op_types(prove(forward, torch.randn(3, 2)))
    assert types.count("Shape") == 1


def test_sizes_of_neighbouring_axes_are_read_at_once():
    gm = fxopt.capture(
        lambda x: torch.zeros(x.shape[0], x.shape[1], 3),
        (torch.randn(4, 5),),
        dynamic_shapes={"x": {0: "rows", 1: "columns"}},
    )
    assert op_types(to_onnx(gm)) == ["Shape", "Concat", "Expand"]
