"""New tensors: constants where the shape is known, computed where it is not."""

import pytest
import torch

from tests.export.proof import in_parts, integers, op_types, prove, prove_each

pytestmark = pytest.mark.ort

X = torch.randn(3, 4)

CASES = {
    "full": lambda x: x + torch.full((4,), 2.5),
    "full_dynamic": lambda x: torch.full((x.shape[0], 2), 7),
    "full_bool": lambda x: torch.full((x.shape[0],), True),
    "full_like": lambda x: torch.full_like(x, 3, dtype=torch.int32),
    "zeros": lambda x: torch.zeros(x.shape[0], 2, dtype=torch.float16),
    "zeros_like": lambda x: torch.zeros_like(x) + x,
    "ones": lambda x: torch.ones(2, x.shape[0], dtype=torch.int64),
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.bool),
    "new_zeros": lambda x: x.new_zeros(x.shape[0] + 1, 2),
    "new_ones": lambda x: x.new_ones(3),
    "new_full": lambda x: x.new_full((2,), 5.0),
    "arange": lambda x: torch.arange(x.shape[0]),
    "arange_float": lambda x: torch.arange(5.0) + x.sum(),
    "arange_dynamic_float": lambda x: torch.arange(x.shape[0], dtype=torch.float32),
    "arange_step": lambda x: torch.arange(1, 10, 3) + x.shape[0],
    "arange_down": lambda x: torch.arange(5, 0, -2) * x.shape[0],
    "arange_fraction": lambda x: torch.arange(0, 1, 0.1) * x.sum(),
    "arange_dynamic_step": lambda x: torch.arange(0, x.shape[0] * 4, 4),
    "arange_down_dynamic": lambda x: torch.arange(x.shape[0] - 1, -1, -1),
    "arange_down_dynamic_float": lambda x: torch.arange(x.shape[0], -1, -1.0),
    "linspace_to_a_size": lambda x: torch.linspace(0.5, x.shape[0] - 0.5, 4),
    "linspace_of_a_size": lambda x: torch.linspace(-1, 1, x.shape[0]),
    "linspace_of_a_size_in_double": lambda x: torch.linspace(x.shape[0], -1, x.shape[0], dtype=torch.float64),
    "linspace": lambda x: torch.linspace(-1, 1, 7) * x.sum(),
    "eye": lambda x: torch.eye(4) + x[:, :1, None],
    "eye_dynamic": lambda x: torch.eye(x.shape[0]),
    "tril_indices": lambda x: torch.tril_indices(3, 4, -1) + x.shape[0],
    "triu_indices": lambda x: torch.triu_indices(3, 4, 1) + x.shape[0],
    "meshgrid": lambda x: torch.meshgrid(torch.arange(3), torch.arange(x.shape[0]), indexing="ij"),
    "meshgrid_xy": lambda x: torch.meshgrid(torch.arange(3), torch.arange(x.shape[0]), indexing="xy"),
    "tensor": lambda x: torch.tensor([1.0, 2.0, 3.0, 4.0]) * x,
    "scalar_tensor": lambda x: x * torch.scalar_tensor(3.0),
    "causal": lambda x: torch.ones(x.shape[0], x.shape[0]).tril(),
}


@pytest.mark.parametrize("names", in_parts(CASES), ids="-".join)
def test_creation(names):
    prove_each({name: (CASES[name], X) for name in names})


def test_constants_are_shared():
    file = prove(lambda x: (x * 2 + 1) * 2 + 1, X)
    assert op_types(file) == ["Mul", "Add", "Mul", "Add"]
    assert sorted(file.model.graph.initializers) == ["float32(1.0)", "float32(2.0)"]


def test_a_number_of_the_input_is_an_output():
    prove(lambda x: (x.shape[0], x.shape[0] * 2 + 1, x.sum() > 0, x.shape[1]), X)


def test_integer_inputs_pass_through():
    prove(lambda x: (x, x + 1), integers(3, 4))
