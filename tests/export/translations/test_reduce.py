"""Reductions, norms, order and running sums, over axes, negative axes, all axes and none."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.export.proof import in_parts, integers, prove, prove_each

pytestmark = pytest.mark.ort

X = torch.randn(3, 4, 5)

CASES = {
    "sum": lambda x: x.sum(),
    "sum_dim": lambda x: x.sum(-1),
    "sum_dims_keep": lambda x: x.sum((0, -1), keepdim=True),
    "sum_first": lambda x: x.sum(0),
    "sum_no_dims": lambda x: x.sum(dim=()),
    "sum_dtype": lambda x: x.sum(1, dtype=torch.float64),
    "mean": lambda x: x.mean(),
    "mean_dims": lambda x: x.mean((1, 2), keepdim=True),
    "prod": lambda x: x.prod(-1),
    "prod_all": lambda x: x[:, 0, :2].prod(),
    "amax": lambda x: x.amax((0, 2)),
    "amin_keep": lambda x: x.amin(-2, keepdim=True),
    "max_all": lambda x: x.max(),
    "max_dim": lambda x: x.max(-1),
    "min_dim_keep": lambda x: x.min(1, keepdim=True),
    "argmax": lambda x: x.argmax(-1),
    "argmin_keep": lambda x: x.argmin(1, keepdim=True),
    "argmax_all": lambda x: x.argmax(),
    "aminmax": lambda x: torch.aminmax(x, dim=1),
    "any": lambda x: (x > 1).any(-1),
    "any_of_numbers": lambda x: x.any(),
    "all_dims": lambda x: (x > -2).all(dim=1, keepdim=True),
    "count_nonzero": lambda x: torch.count_nonzero(x * (x > 0), 1),
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "var": lambda x: x.var(-1),
    "var_biased": lambda x: x.var((1, 2), correction=0),
    "std": lambda x: x.std(1, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, (1, 2)),
    "std_mean": lambda x: torch.std_mean(x, -1, correction=2),
    "norm": lambda x: x.norm(dim=-1),
    "norm_all": lambda x: x.norm(),
    "norm_1": lambda x: torch.linalg.vector_norm(x, 1, (1, 2)),
    "norm_inf": lambda x: torch.linalg.vector_norm(x, math.inf, 1),
    "norm_minus_inf": lambda x: torch.linalg.vector_norm(x, -math.inf, 1),
    "norm_3": lambda x: torch.linalg.vector_norm(x, 3, 1, keepdim=True),
    "norm_0": lambda x: torch.linalg.vector_norm(x.relu(), 0, 1),
    "normalize": lambda x: torch.nn.functional.normalize(x, dim=1),
    "cosine_similarity": lambda x: torch.nn.functional.cosine_similarity(x, x.flip(1), dim=-1),
    "topk": lambda x: x.topk(2),
    "topk_smallest": lambda x: x.topk(3, dim=1, largest=False),
    "sort": lambda x: x.sort(),
    "sort_descending": lambda x: x.sort(1, descending=True),
    "argsort": lambda x: x.argsort(-1),
    "sort_dynamic": lambda x: x.sort(0),
    "kthvalue": lambda x: x.kthvalue(2, 1),
    "median_dim": lambda x: x.median(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumsum_dynamic": lambda x: x.cumsum(0),
    "cumprod": lambda x: x.cumprod(1),
    "cummax": lambda x: x.cummax(1),
    "cummin": lambda x: x.cummin(-1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "nansum": lambda x: torch.where(x > 1, math.nan, x).nansum(1),
    "nanmean": lambda x: torch.where(x > 1, math.nan, x).nanmean((0, 1)),
    "diff": lambda x: x.diff(dim=1),
}
EXACT_TYPES = [
    "sum",
    "sum_dim",
    "prod",
    "amax",
    "max_dim",
    "argmax",
    "any_of_numbers",
    "cumsum",
    "topk",
    "sort",
    "count_nonzero",
    "median_dim",
]


@pytest.mark.parametrize("names", in_parts(CASES), ids="-".join)
def test_reduction(names):
    prove_each({name: (CASES[name], X) for name in names})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_reduction_of_integers(dtype):
    distinct = torch.randperm(60).view(3, 4, 5)  # ties may be broken either way
    small, distinct = (distinct % 7).to(dtype), distinct.to(dtype)
    prove_each({name: (CASES[name], small if name == "prod" else distinct) for name in EXACT_TYPES})


def test_reduction_of_booleans():
    names, x = ("sum", "sum_dim", "any_of_numbers", "count_nonzero", "cumsum", "amax"), X > 0
    prove_each({name: (CASES[name], x) for name in names})


def test_reduction_before_opset_20():
    names = ("mean_dims", "amax", "var", "norm", "max_dim", "any")
    prove_each({name: (CASES[name], X) for name in names}, opset=18)


def test_reduction_of_a_tensor_without_axes():
    functions = (torch.sum, torch.mean, torch.amax, torch.max, torch.argmax, torch.prod, torch.any)
    x = torch.tensor(2.5)
    prove_each({function.__name__: (function, x) for function in functions})


@pytest.mark.parametrize("function", [
    lambda x: x.var((1, 2)), lambda x: x.std(), lambda x: x.mean((0, 2), keepdim=True), lambda x: x.sum(),
    lambda x: F.adaptive_avg_pool2d(x[None], 1), lambda x: F.adaptive_avg_pool2d(x, 1),
])  # fmt: skip
def test_a_million_numbers_keep_their_digits(function):
    # ORT adds up the numbers of one reduction in a row, in single precision.
    prove(function, torch.rand(2, 1200, 1100, generator=torch.Generator().manual_seed(0)) * 2 + 1, dynamic=False)


def test_variance_over_a_dynamic_axis():
    prove(lambda x: (x + torch.arange(5)).var(0, correction=0), torch.randn(3, 5))


def test_extremes_of_two_tensors():
    prove(lambda x, y: torch.max(x, y) - torch.min(x, y), integers(3, 4), integers(3, 4))
