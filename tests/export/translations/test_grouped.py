"""Products of groups of rows, in ORT: groups of any size, none of them included, and matrices of their own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.grouped_ops import GROUPED_MM
from tests.export.proof import op_types, prove

pytestmark = pytest.mark.ort


class Grouped(nn.Module):
    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.weight = nn.Parameter(torch.randn(3, 4, 6) if turned else torch.randn(3, 6, 4))

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        weight = self.weight.transpose(-2, -1) if self.turned else self.weight
        return GROUPED_MM(x, weight, sizes.abs().cumsum(0).clamp(max=x.shape[0]).int())


@pytest.mark.parametrize("turned", [False, True])
def test_each_group_is_multiplied_by_its_own_matrix(turned: bool) -> None:
    model = Grouped(turned=turned)
    inputs = torch.randn(7, 6), torch.tensor([2, 0, 3])
    file = to_onnx(fxopt.capture(model, inputs, dynamic_shapes=({0: "rows"}, None)))
    counts = Counter(op_types(file))
    assert (counts["MatMul"], counts["Split"], counts["Gather"]) == (3, 1, 0)
    session = Session(file.to_bytes())
    for sizes in ([0, 0, 0], [7, 0, 0], [0, 0, 7], [1, 2, 3], [2, 3, 2]):
        x, given = torch.randn(7, 6), torch.tensor(sizes)
        torch.testing.assert_close(session.run((x, given))[0], model(x, given))


def test_matrices_that_are_computed_are_looked_up() -> None:
    def function(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        return GROUPED_MM(x, weight.relu(), sizes.abs().cumsum(0).clamp(max=x.shape[0]))

    file = prove(function, torch.randn(7, 6), torch.randn(3, 6, 4), torch.tensor([2, 0, 3]), dynamic=False)
    assert Counter(op_types(file))["Gather"] == 3


def test_half_precision_is_computed_in_it() -> None:
    def function(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        return GROUPED_MM(x, weight, sizes.abs().cumsum(0).clamp(max=x.shape[0]))

    prove(function, torch.randn(7, 6).half(), torch.randn(3, 6, 4).half(), torch.tensor([2, 0, 3]), dynamic=False)
