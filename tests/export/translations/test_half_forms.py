"""Forms that ONNX Runtime has no kernel for in half precision, or ends the process on when it optimizes them."""

import itertools

import pytest
import torch
from torch import nn

from fxopt.export import to_onnx
from fxopt.export.dtypes import is_cast_with_care
from tests.export.proof import captured, prove

ORDERS = [*itertools.permutations(range(3)), (1, 2, 0, 3), (1, 2, 3, 0), (0, 2, 1, 3), (2, 0, 1, 3)]
SIZES = (2, 3, 4, 5)


def test_the_orders_that_need_care_are_those_that_move_the_first_axis_back():
    with_care = [order for order in ORDERS if is_cast_with_care(order)]
    assert with_care == [(1, 0, 2), (1, 2, 0), (1, 2, 0, 3), (1, 2, 3, 0)]
    assert not is_cast_with_care((1, 0))


class Product(nn.Module):
    """A product with a constant matrix of what was put in another order; the type changes behind that."""

    def __init__(self, order: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.order, self.dtype = order, dtype
        self.layer = nn.Linear(SIZES[order[-1]], 3, bias=bias).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.permute(self.order).to(self.dtype))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_products_of_what_was_transposed_in_half_precision(order):
    x = torch.randn(SIZES[: len(order)]).half()
    prove(Product(order, torch.float16, bias=False), x, dynamic=order[-1] != 0)


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("of", [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8], ids=str)
def test_products_of_what_was_transposed_and_cast(of, to):
    x = (8 * torch.rand(SIZES[:3])).to(of)
    prove(Product((1, 0, 2), to, bias=True), x)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_ragged_bags_in_half_precision(mode):
    bags = nn.EmbeddingBag(20, 8, mode=mode).half()
    prove(bags, torch.randint(0, 20, (12,)), torch.tensor([0, 3, 3, 7]), dynamic=False)


@pytest.mark.parametrize("reduce", ["sum", "amax"])
def test_scattering_with_a_reduction_in_half_precision(reduce):
    index = torch.tensor([[0, 1, 0], [2, 2, 1]])
    prove(
        lambda x, y: x.scatter_reduce(0, index, y, reduce),
        torch.randn(3, 3).half(),
        torch.randn(2, 3).half(),
        dynamic=False,
    )


def test_files_for_other_devices_can_be_opened_on_a_cpu_too():
    gm = captured(Product((1, 0, 2), torch.float16, bias=True), torch.randn(SIZES[:3]).half())
    types = [node.op_type for node in to_onnx(gm, runtime="onnx").model.graph]
    assert types[:3] == ["Cast", "Transpose", "Cast"]
