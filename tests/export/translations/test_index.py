"""Indexing with tensors in all its forms, gather, scatter, and embeddings."""

import functools

import pytest
import torch
import torch.nn.functional as F

from tests.export.proof import in_parts, integers, op_types, prove, prove_each

pytestmark = pytest.mark.ort

aten = torch.ops.aten
X = torch.randn(3, 4, 5)
I = torch.tensor([0, -1, 2])  # noqa: E741
J = torch.tensor([1, 3, -4])
ZEROS = torch.zeros(3, dtype=torch.int64)
PAIR = torch.tensor([[0, 2], [-1, 1]])

INDEXING = {
    "one": lambda x: x[:, I],
    "last": lambda x: x[..., I],
    "matrix": lambda x: x[:, PAIR],
    "two": lambda x: x[:, I, J],
    "new_axis": lambda x: x[:, None, I][..., J],
    "not_adjacent": lambda x: x[ZEROS, :, J],
    "broadcast": lambda x: x[:, PAIR[:, :1], PAIR],
    "with_range": lambda x: x[torch.arange(x.shape[0]), 1],
    "backwards": lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)],
    "from_the_last": lambda x: x[torch.arange(-1, x.shape[0] - 1)],
    "rows_and_columns": lambda x: x[torch.arange(x.shape[0])[:, None], I[None] % 4],
    "all_axes": lambda x: x[ZEROS, I, J],
    "mask": lambda x: x[x > 0],
    "mask_rows": lambda x: x[x[:, 0, 0] > 0],
    "mask_middle": lambda x: x[:, torch.tensor([True, False, True, True])],
    "number": lambda x: x[:, torch.tensor(2)],
    "gather": lambda x: x.gather(1, PAIR.abs()[None].expand(x.shape[0], 2, 2)),
    "take": lambda x: x.take(PAIR.abs()),
    "index_select": lambda x: x.index_select(-1, J.abs()),
    "nonzero": lambda x: x.relu().nonzero(),
    "nonzero_tuple": lambda x: torch.nonzero(x > 0.5, as_tuple=True),
    "where_indices": lambda x: torch.where(x > 0.5),
    "argwhere": lambda x: torch.argwhere(x > 1),
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5, 2.0]), x),
    "bucketize_right": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 0.5]), right=True),
    "isin": lambda x: torch.isin(x.round(), torch.tensor([0.0, 1.0])),
    "cross": lambda x: torch.linalg.cross(x[..., :3], x[..., 2:]),
}

WRITING = {
    "put_row": lambda x: aten.index_put(x, [None, torch.tensor(1)], torch.tensor(7.0)),
    "put_pairs": lambda x: aten.index_put(x, [None, I, J], torch.zeros(1)),
    "put_values": lambda x: aten.index_put(x, [None, I, J], torch.arange(3.0)),
    "put_slices": lambda x: aten.index_put(x, [None, torch.tensor([0, 2])], torch.arange(10.0).view(2, 5)),
    "put_accumulate": lambda x: aten.index_put(x, [None, torch.tensor([1, 1, 2])], torch.ones(3, 5), True),
    "put_mask": lambda x: torch.index_put(x, (x > 0,), torch.tensor(-1.0)),
    "put_mask_rows": lambda x: torch.index_put(x, (x[:, 0, 0] > 0,), torch.tensor(2.0)),
    "put_first": lambda x: torch.index_put(x, (torch.tensor([0]),), torch.tensor(5.0)),
    "scatter": lambda x: x.scatter(1, PAIR.abs()[None].expand(x.shape[0], 2, 2), -x),
    "scatter_value": lambda x: x.scatter(2, PAIR.abs()[None].expand(x.shape[0], 2, 2), 3.0),
    "scatter_add": lambda x: x.scatter_add(1, torch.zeros(x.shape[0], 3, 5, dtype=torch.int64), x[:, :3]),
    "index_add": lambda x: x.index_add(1, torch.tensor([0, 0, 3]), x[:, :3], alpha=2),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([3, 0]), x[:, 1:3]),
    "index_fill": lambda x: x.index_fill(-1, torch.tensor([0, 4]), 9.0),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x.flip(1)),
}


@pytest.mark.parametrize("names", in_parts(INDEXING), ids="-".join)
def test_indexing(names):
    prove_each({name: (INDEXING[name], X) for name in names})


@pytest.mark.parametrize("names", in_parts(WRITING), ids="-".join)
def test_writing(names):
    prove_each({name: (WRITING[name], X) for name in names})


@pytest.mark.parametrize("include_self", [True, False])
def test_scatter_reduce(include_self):
    index = torch.tensor([0, 0, 2, 1])[None, :, None]

    def reduced(x, reduce):
        return x.scatter_reduce(1, index.expand(x.shape[0], 4, 5), x * 2, reduce, include_self=include_self)

    reductions = ("sum", "prod", "amax", "amin", "mean")
    prove_each({reduce: (functools.partial(reduced, reduce=reduce), X) for reduce in reductions})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.int8])
def test_indexing_of_other_types(dtype):
    x = integers(3, 4, 5, low=0, high=2).to(dtype)
    cases = {name: (INDEXING[name], x) for name in ("two", "mask", "mask_rows", "gather", "with_range")}
    prove_each(cases | {"put": (lambda x: aten.index_put(x, [None, I, J], torch.zeros(3, dtype=x.dtype)), x)})


def test_index_of_one_axis_is_one_gather():
    assert op_types(prove(lambda x: x[:, I], X)) == ["Gather"]
    assert op_types(prove(lambda x: x[:, torch.tensor([True, False, True, True])], X)) == ["Compress"]


def test_indices_and_masks_together():
    prove(lambda x, m: x[m, :, :][:, I, J], X, torch.tensor([True, False, True]), dynamic=False)
    prove(lambda x: x.take_along_dim(x.argsort(1), 1), X, dynamic=False)


def test_diagonal_scatter_of_known_sizes():
    prove(lambda x: torch.diagonal_scatter(x, torch.zeros(4)), torch.randn(4, 5), dynamic=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding(dtype):
    weight = torch.randn(10, 6)
    file = prove(lambda i: F.embedding(i, weight, padding_idx=0), integers(3, 4, low=0, high=10, dtype=dtype))
    assert op_types(file) == ["Gather"]


def test_one_hot():
    prove(lambda i: F.one_hot(i, 10), integers(3, 4, low=0, high=10))


WEIGHT = torch.randn(10, 6)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_bags_with_offsets(mode, padding_idx):
    index, offsets = integers(9, low=0, high=10), torch.tensor([0, 4, 4, 9])  # two bags are empty
    prove(lambda i, o: F.embedding_bag(i, WEIGHT, o, mode=mode, padding_idx=padding_idx), index, offsets, dynamic=False)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_equal_length_are_a_matrix(mode):
    file = prove(lambda i: F.embedding_bag(i, WEIGHT, mode=mode), integers(3, 4, low=0, high=10))
    assert "ScatterND" not in op_types(file)


def test_bags_with_weights_and_last_offset():
    index, offsets, scale = integers(9, low=0, high=10), torch.tensor([0, 4, 6, 9]), torch.randn(9)
    prove(
        lambda i, o, s: F.embedding_bag(i, WEIGHT, o, mode="sum", per_sample_weights=s, include_last_offset=True),
        index,
        offsets,
        scale,
        dynamic=False,
    )
    prove(
        lambda i, s: F.embedding_bag(i, WEIGHT, mode="sum", per_sample_weights=s),
        integers(3, 4, low=0, high=10),
        torch.randn(3, 4),
    )
