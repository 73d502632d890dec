"""Views and layouts, with dynamic sizes; what needs no arithmetic on sizes must leave none in the file."""

import pytest
import torch
import torch.nn.functional as F

from tests.export.proof import in_parts, integers, op_types, prove, prove_each

pytestmark = pytest.mark.ort

X = torch.randn(3, 4, 6)

CASES = {
    "view": lambda x: x.view(x.shape[0], 24),
    "view_infer": lambda x: x.view(-1, 2, 12),
    "view_split": lambda x: x.view(x.shape[0], 2, 2, -1),
    "view_merge_dynamic": lambda x: x.reshape(x.shape[0] * 4, 6),
    "view_double": lambda x: x.reshape(x.shape[0] * 2, -1),
    "flatten": lambda x: x.flatten(1),
    "flatten_all": lambda x: x.flatten(),
    "flatten_negative": lambda x: x.flatten(-2, -1),
    "unflatten": lambda x: x.unflatten(-1, (2, 3)),
    "unflatten_infer": lambda x: x.unflatten(1, (-1, 2)),
    "ravel": lambda x: x.ravel(),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "unsqueeze_negative": lambda x: x.unsqueeze(-3),
    "squeeze_dim": lambda x: x.unsqueeze(1).squeeze(1),
    "squeeze_nothing": lambda x: x.squeeze(1),
    "squeeze_dims": lambda x: x[:, None, :, None].squeeze((1, -2)),
    "permute": lambda x: x.permute(2, 0, -2),
    "transpose": lambda x: x.transpose(-1, 1),
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "mT": lambda x: x.mT,
    "movedim": lambda x: x.movedim((0, 1), (-1, 0)),
    "movedim_one": lambda x: x.movedim(-1, 0),
    "expand": lambda x: x[:, :1].expand(-1, 5, 6),
    "expand_new_axis": lambda x: x.expand(2, -1, -1, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x[:, :, :1], (x.shape[0], 4, 7)),
    "repeat": lambda x: x.repeat(1, 2, 3),
    "repeat_new_axis": lambda x: x.repeat(2, 1, 1, 1),
    "tile": lambda x: x.tile(2),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "repeat_interleave_first": lambda x: x.repeat_interleave(2, dim=0),
    "cat": lambda x: torch.cat([x, x[:, :2], x], dim=1),
    "cat_negative": lambda x: torch.cat([x, x * 2], dim=-1),
    "cat_dynamic": lambda x: torch.cat([x, x], 0),
    "cat_promotes": lambda x: torch.cat([x, x.to(torch.int64)], 1),
    "cat_legacy_empty": lambda x: torch.cat([torch.zeros(0), x], 1),
    "stack": lambda x: torch.stack([x, -x], 1),
    "stack_last": lambda x: torch.stack([x, -x], -1),
    "hstack": lambda x: torch.hstack([x, x]),
    "chunk": lambda x: x.chunk(3, -1),
    "chunk_uneven": lambda x: x.chunk(4, -1),
    "split": lambda x: x.split(4, -1),
    "split_sizes": lambda x: x.split([1, 3], 1),
    "tensor_split": lambda x: x.tensor_split(4, dim=2),
    "tensor_split_at": lambda x: x.tensor_split([1, 3], dim=1),
    "unbind": lambda x: x.unbind(1),
    "slice": lambda x: x[:, 1:3],
    "slice_step": lambda x: x[:, ::2, 1::3],
    "slice_negative": lambda x: x[:, -3:-1],
    "slice_beyond": lambda x: x[:, 2:100],
    "slice_empty": lambda x: x[:, 3:2],
    "slice_half": lambda x: torch.cat([x, x])[: x.shape[0]],
    "select": lambda x: x[:, 2],
    "select_last": lambda x: x[..., -1],
    "select_dynamic": lambda x: x[-1],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "narrow_negative": lambda x: x.narrow(2, -3, 2),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad_value": lambda x: F.pad(x, (1, 0, 0, 2), value=3.5),
    "pad_crop": lambda x: F.pad(x, (-1, 2)),
    "pad_reflect": lambda x: F.pad(x, (2, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (0, 3), mode="replicate"),
    "pad_circular": lambda x: F.pad(x, (1, 2), mode="circular"),
    "pad_nothing": lambda x: F.pad(x, (0, 0)),
    "roll": lambda x: x.roll((1, -2), (1, 2)),
    "roll_beyond": lambda x: x.roll(9, 1),
    "roll_flat": lambda x: x[0].roll(5),
    "roll_dynamic": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0, -1),
    "tril": lambda x: x.tril(),
    "triu_offset": lambda x: x.triu(2),
    "tril_negative": lambda x: x.tril(-1),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "diagonal_offset": lambda x: x.diagonal(-1, -1, 1),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "unfold_first": lambda x: torch.cat([x, x, x]).unfold(0, 2, 1),
    "as_strided": lambda x: torch.as_strided(x[0].clone(), (2, 3), (3, 1), 1),
    "masked_select": lambda x: x.masked_select(x > 0),
    "channel_shuffle": lambda x: F.channel_shuffle(x[..., None], 2),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 3),
    "slice_scatter_step": lambda x: torch.slice_scatter(x, x[..., :3] * 2, -1, 0, 6, 2),
    "slice_scatter_dynamic": lambda x: torch.slice_scatter(torch.cat([x, x]), x * 2, 0, 0, x.shape[0]),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, -1),
    "select_scatter_dynamic": lambda x: torch.select_scatter(x, x[0] * 2, 0, 0),
}


OF_ALL_TYPES = ("view_merge_dynamic", "flatten", "unbind", "cat_negative", "pad", "roll", "select_last", "expand")


@pytest.mark.parametrize("names", in_parts(CASES), ids="-".join)
def test_view(names):
    prove_each({name: (CASES[name], X) for name in names})


@pytest.mark.parametrize("x", [integers(3, 4, 6), X > 0, X.half()], ids=lambda x: str(x.dtype))
def test_view_of_other_types(x):
    prove_each({name: (CASES[name], x) for name in OF_ALL_TYPES})


def test_pixel_shuffle_both_ways():
    prove(lambda x: F.pixel_shuffle(x, 2), torch.randn(3, 8, 2, 3))
    prove(lambda x: F.pixel_unshuffle(x, 2), torch.randn(3, 2, 4, 6))


def test_two_dynamic_sizes():
    prove(
        lambda x, y: torch.cat([x.expand(y.shape[0], -1, -1).transpose(0, 1).reshape(x.shape[0], -1), x.flatten(1)], 1),
        torch.randn(1, 2, 3),
        torch.randn(4, 2),
        dynamic=False,
    )


@pytest.mark.parametrize(
    "name",
    [
        "view",
        "view_infer",
        "view_split",
        "flatten",
        "flatten_all",
        "unflatten",
        "expand_as",
        "chunk",
        "split",
        "slice",
        "pad",
        "roll",
        "select_last",
        "cat_dynamic",
        "repeat",
        "movedim",
        "slice_negative",
    ],
)
def test_known_sizes_need_no_arithmetic(name):
    types = op_types(prove(lambda x: CASES[name](x), X))
    assert not {"Shape", "Range", "Mul", "Gather"} & set(types) or name == "select_last"
    assert name in ("roll", "cat_dynamic") or "Concat" not in types


@pytest.mark.parametrize("name", ["squeeze_nothing", "pad_nothing"])
def test_a_view_that_changes_nothing_leaves_nothing(name):
    assert op_types(prove(lambda x: CASES[name](x) * 2, X)) == ["Mul"]


def test_two_permutations_become_one():
    assert op_types(prove(lambda x: x.permute(1, 2, 0).permute(1, 2, 0), X)) == ["Transpose"]
    assert op_types(prove(lambda x: x.transpose(1, 2).relu().transpose(1, 2), X)).count("Transpose") == 2


def test_the_same_size_is_computed_once():
    def forward(x):
        n = x.shape[0]
        return x.sum() * n + n * 2, x.reshape(n * 4, 6), x.new_zeros(n * 2 + 1)

    types = op_types(prove(forward, X))
    assert types.count("Shape") == 1
