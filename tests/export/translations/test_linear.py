"""Matrix products of all ranks; linear layers store their weight once and as the product wants it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.export.proof import integers, op_types, prove

pytestmark = pytest.mark.ort


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 5, 4), (4,)])
def test_linear(shape, bias):
    prove(nn.Linear(4, 6, bias=bias), torch.randn(shape), dynamic=len(shape) > 1)


def test_linear_of_a_matrix_is_one_gemm_with_the_weight_as_it_is():
    layer = nn.Linear(4, 6)
    file = prove(layer, torch.randn(3, 4))
    assert op_types(file) == ["Gemm"]
    assert tuple(file.model.graph.initializers["weight"].shape) == (6, 4)


def test_linear_of_more_axes_stores_the_weight_transposed():
    file = prove(nn.Linear(4, 6), torch.randn(3, 5, 4))
    assert op_types(file) == ["MatMul", "Add"]
    held = file.model.graph.initializers["weight"]
    assert tuple(held.shape) == (4, 6)
    assert held.const_value.metadata_props["fxopt.stored"] == "permuted by [1, 0]"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 4), (4, 5)),
        ((3, 2, 4), (3, 4, 5)),
        ((3, 2, 4), (4, 5)),
        ((3, 1, 2, 4), (6, 4, 5)),
        ((3, 4), (4,)),
        ((4,), (4, 5)),
        ((4,), (4,)),
    ],
)
def test_matmul(left, right):
    prove(lambda x, y: x @ y, torch.randn(left), torch.randn(right), dynamic=False)


def test_matmul_of_integers():
    prove(lambda x, y: x @ y, integers(3, 4), integers(4, 5), dynamic=False)
    prove(lambda x, y: x @ y, integers(3, 4, dtype=torch.int8), integers(4, 5, dtype=torch.int8), dynamic=False)


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2.0), (0, 1)])
def test_addmm_and_baddbmm(beta, alpha):
    prove(
        lambda b, x, y: torch.addmm(b, x, y, beta=beta, alpha=alpha),
        torch.randn(5),
        torch.randn(3, 4),
        torch.randn(4, 5),
        dynamic=False,
    )
    prove(
        lambda b, x, y: torch.baddbmm(b, x, y, beta=beta, alpha=alpha),
        torch.randn(3, 1, 5),
        torch.randn(3, 2, 4),
        torch.randn(3, 4, 5),
    )


def test_addmm_with_a_transposed_weight_is_one_gemm():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight.t())

    file = prove(Layer(), torch.randn(3, 4))
    assert op_types(file) == ["Gemm"]


@pytest.mark.parametrize(("equation", "shapes"), [
    ("bij,bjk->bik", [(3, 2, 4), (3, 4, 5)]),
    ("bhid,bhjd->bhij", [(3, 2, 4, 5), (3, 2, 6, 5)]),
    ("bihd,bjhd->bhij", [(3, 4, 2, 5), (3, 6, 2, 5)]),
    ("bhij,bjhd->bihd", [(3, 2, 4, 6), (3, 6, 2, 5)]),
    ("B G H I D, B G H J D -> B G H I J", [(3, 2, 2, 4, 5), (3, 2, 2, 6, 5)]),
    ("bnd,hdk->bhnk", [(3, 4, 5), (2, 5, 6)]),
    ("bi,bi->b", [(3, 4), (3, 4)]),
    ("bi,bj->bij", [(3, 4), (3, 5)]),
    ("bij->bji", [(3, 4, 5)]),
    ("bij->b", [(3, 4, 5)]),
    ("bii->bi", [(3, 4, 4)]),
    ("...ij,...jk->...ik", [(3, 2, 4), (3, 4, 5)]),
    ("bi,ij,bj->b", [(3, 4), (4, 5), (3, 5)]),
    ("ij,jk", [(3, 4), (4, 5)]),
])  # fmt: skip
def test_einsum(equation, shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    functions = {1: lambda a: torch.einsum(equation, a), 2: lambda a, b: torch.einsum(equation, a, b)}
    function = functions.get(len(tensors), lambda a, b, c: torch.einsum(equation, a, b, c))
    prove(function, *tensors, dynamic=all(t.shape[0] == 3 for t in tensors) and "hdk" not in equation)


def test_einsum_of_attention_is_a_matrix_product():
    file = prove(lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k), torch.randn(3, 2, 4, 5), torch.randn(3, 2, 6, 5))
    assert op_types(file) == ["Transpose", "MatMul"]


def test_outer_inner_bilinear_cdist():
    prove(lambda x, y: torch.outer(x, y), torch.randn(3), torch.randn(4))
    prove(lambda x, y: torch.inner(x, y), torch.randn(3, 4), torch.randn(2, 4), dynamic=False)
    prove(nn.Bilinear(3, 4, 5), torch.randn(6, 3), torch.randn(6, 4))


def test_double_precision_products():
    prove(nn.Linear(4, 6).double(), torch.randn(3, 4, dtype=torch.float64))
    prove(lambda x: F.linear(x, x), torch.randn(3, 4, dtype=torch.float64), dynamic=False)
