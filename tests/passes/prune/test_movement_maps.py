"""One operator between two layers: the channels that are masked in front of it go behind it as well."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.passes.prune import ShrinkMasked
from tests.passes.prune.nets import captured, net, shrink, shrunk

N = ({0: "n"},)
aten = torch.ops.aten

# What is between a layer that makes 8 channels and one that reads some: the number read, and how many of them stay.
BETWEEN = {
    "split_with_sizes": (lambda y: torch.cat(torch.split(y, [2, 6], 1)[::-1], 1), 8, 4),
    "split by a size that does not divide": (lambda y: torch.cat(y.split(3, 1), 1), 8, 4),
    "tensor_split": (lambda y: torch.cat(y.tensor_split((2, 5), 1)[::-1], 1), 8, 4),
    "parts of one index": (lambda y: torch.cat(y[:, 4:].unbind(1) + y[:, :2].unbind(1), 1).unsqueeze(1), 1, 1),
    "unbind of places": (lambda y: torch.stack(y.unbind(3)[::-1], 3), 8, 4),
    "slice": (lambda y: y[:, 2:7], 5, 3),
    "slice from behind": (lambda y: y[:, -3:], 3, 1),
    "slice with steps": (lambda y: y[:, 1::3], 3, 1),
    "slices that overlap": (lambda y: torch.cat([y[:, :5], y[:, 3:]], 1), 10, 5),
    "narrow": (lambda y: y.narrow(1, 1, 4), 4, 2),
    "select of a place": (lambda y: y.select(-1, -1).unsqueeze(-1), 8, 4),
    "select of a channel": (lambda y: y[:, [6]] * y[:, 2:3] + y.select(1, -4).unsqueeze(1), 1, 1),
    "flip": (lambda y: y.flip(1, 2), 8, 4),
    "roll of places": (lambda y: y.roll((1, 2), (2, 3)), 8, 4),
    "stack": (lambda y: torch.stack([y, y.tanh()], 2).flatten(1, 2), 16, 8),
    "glu": (lambda y: F.glu(torch.cat([y, y.sin()], 1), 1), 8, 4),
    "repeat": (lambda y: y.repeat(1, 2, 1, 1), 16, 8),
    "tile": (lambda y: y.tile(2, 1, 1), 16, 8),
    "repeat_interleave": (lambda y: y.repeat_interleave(3, 1, output_size=24), 24, 12),
    "expand": (lambda y: y.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2), 24, 12),
    "expand by sizes": (lambda y: (y.mean((2, 3), keepdim=True).expand(y.shape[0], 8, 5, 5)), 8, 4),
    "expand_as": (lambda y: y.mean((2, 3), keepdim=True).expand_as(y), 8, 4),
    "pad of channels": (lambda y: F.pad(y, (0, 0, 0, 0, 1, 2)), 11, 4),
    "pad of channels and places": (lambda y: F.pad(y, (1, 2, 0, 0, 2, 0)), 10, 4),
    "pad that cuts places": (lambda y: F.pad(y, (-1, -1, 2, 0)), 8, 4),
    "pad by reflection": (lambda y: F.pad(y, (1, 1, 2, 0), mode="reflect"), 8, 4),
    "view_as": (lambda y: y.flatten(2).view_as(y), 8, 4),
    "unflatten": (lambda y: y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), 8, 4),
    "unflatten and permute": (lambda y: y.unflatten(1, (4, -1)).permute(0, 2, 1, 3, 4).reshape(y.shape), 8, 4),
    "movedim": (lambda y: y.movedim(1, -1).flip(1).movedim(-1, 1), 8, 4),
    "squeeze": (lambda y: y.mean((2, 3), keepdim=True).squeeze().unsqueeze(-1).unsqueeze(-1), 8, 4),
    "slice_scatter": (lambda y: torch.slice_scatter(y.cos(), y[:, 2:6] * y[:, 2:6], 1, 2, 6) - y.cos() + y, 8, 4),
    "new_zeros": (lambda y: torch.cat([y.new_zeros(y.shape), y], 1), 16, 5),  # one index of an axis stays
    "zeros_like": (lambda y: torch.cat([torch.zeros_like(y), y], 1), 16, 8),
    "where": (lambda y: torch.where(y > 0, y * 2, y * y), 8, 4),
    "masked_fill": (lambda y: y.masked_fill(y > 1, 0.0), 8, 4),
    "prelu": (lambda y: F.prelu(y, torch.full((8,), 0.5)), 8, 4),
    "double precision and back": (lambda y: (y.double() / 3).type_as(y).to(torch.float32), 8, 4),
    "rrelu in evaluation": (lambda y: F.rrelu(y) / 2, 8, 4),
    "dropout in evaluation": (lambda y: F.dropout(y, 0.5, training=False), 8, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def all_of_them():
    """One net with a branch for each, since a capture takes longer than what is tested: shrunk, and both results."""
    torch.manual_seed(0)
    layers = nn.ModuleDict()
    for number, (_, read, _) in enumerate(BETWEEN.values()):
        layers[f"first{number}"], layers[f"last{number}"] = nn.Conv2d(3, 8, 1), nn.Conv2d(read, 4, 1)

    def forward(self, x):
        cases = enumerate(BETWEEN.values())
        return [layers[f"last{n}"](between(layers[f"first{n}"](x))) for n, (between, _, _) in cases]

    gm = captured(net(forward, layers=layers), torch.randn(2, 3, 4, 4), dynamic=N)
    with torch.no_grad():
        for number in range(len(BETWEEN)):
            first = gm.get_submodule(f"layers.first{number}")
            first.weight[1::2] = first.bias[1::2] = 0.0
    after = ShrinkMasked(random_masks=0)(gm).gm
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        return after, gm(x), after(x)


@pytest.mark.parametrize("name", BETWEEN)
def test_channels_go_on_both_sides_of(name, all_of_them):
    number = list(BETWEEN).index(name)
    read, kept = BETWEEN[name][1:]
    after, wants, gots = all_of_them
    torch.testing.assert_close(gots[number], wants[number], rtol=0, atol=1e-5 * float(wants[number].abs().max()))
    assert after.get_parameter(f"layers.last{number}.weight").shape == (4, kept, 1, 1)
    if read >= 8:
        assert after.get_parameter(f"layers.first{number}.weight").shape == (4, 3, 1, 1)


def test_squeeze_of_an_axis_that_is_of_size_1_only_after_the_cut():
    for squeeze in (lambda y: y.squeeze(1), lambda y: y.squeeze((1, 2)), torch.squeeze):
        model = net(
            lambda self, x, s=squeeze: F.linear(s(self.first(x).unsqueeze(2)).flatten(1), self.last),
            first=nn.Linear(5, 3), last=torch.empty(4, 3),
        )  # fmt: skip
        gm = captured(model, torch.randn(2, 5), dynamic=N)
        with torch.no_grad():
            gm.first.weight[1:] = gm.first.bias[1:] = 0.0
        assert shrink(gm, torch.randn(2, 5)).shape("last") == (4, 1)


# ---- products


def test_einsum():
    def forward(self, x):
        y = torch.einsum("bi,hij->bhj", x, self.first)
        return torch.einsum("bhj,hjo->bo", torch.relu(y), self.second)

    model = net(forward, first=torch.empty(4, 5, 6), second=torch.empty(4, 6, 3))
    assert shrunk(model, torch.randn(2, 5), dynamic=N).shape("second") == (2, 3, 3)


def test_matrix_products_with_parameters_on_either_side():
    def forward(self, x):
        return torch.addmm(self.bias, torch.relu(torch.mm(x, self.first)), self.second) @ self.third

    parts = {"bias": torch.empty(6), "first": torch.empty(5, 8), "second": torch.empty(8, 6), "third": torch.empty(6)}
    found = shrunk(net(forward, **parts), torch.randn(2, 5), dynamic=N)
    assert found.shape("second") == (4, 3)
    assert found.shape("bias") == (3,)


def test_what_is_added_to_a_product_of_zeros_goes_into_the_next_bias():
    def forward(self, x):
        return self.last(torch.relu(torch.addmm(self.bias, x, self.first, beta=2)))

    model = net(forward, bias=torch.empty(8), first=torch.empty(5, 8), last=nn.Linear(8, 4))
    gm = captured(model, torch.randn(2, 5), dynamic=N)
    with torch.no_grad():
        gm.first[:, 1::2] = 0.0
        gm.bias.abs_()
    found = shrink(gm, torch.randn(2, 5))
    assert found.shape("first") == (5, 4)
    assert found.shape("last.weight") == (4, 4)


def test_both_halves_of_a_gated_unit():
    model = net(lambda self, x: self.last(F.glu(self.first(x))), first=nn.Linear(5, 16), last=nn.Linear(8, 4))
    found = shrunk(model, torch.randn(2, 5), dynamic=N)
    assert found.shape("first.weight") == (8, 5)
    assert found.shape("last.weight") == (4, 4)


def test_matrix_products_from_the_left():
    def forward(self, x):
        return torch.matmul(self.second, torch.relu(torch.matmul(self.first, x)))

    model = net(forward, first=torch.empty(8, 5), second=torch.empty(3, 8))
    assert shrunk(model, torch.randn(2, 5, 4), dynamic=N).shape("second") == (3, 4)


def test_batches_of_matrices():
    def forward(self, x):
        y = torch.relu(x.unsqueeze(1) @ self.first)
        return (y @ self.second).sum(1)

    model = net(forward, first=torch.empty(4, 5, 6), second=torch.empty(4, 6, 3))
    gm = captured(model, torch.randn(2, 7, 5), dynamic=N)
    with torch.no_grad():
        gm.first[1::2] = 0.0
    assert shrink(gm, torch.randn(2, 7, 5)).shape("second") == (2, 6, 3)


# ---- lookups


def test_columns_of_an_embedding():
    model = net(lambda self, x: self.last(self.words(x)), words=nn.Embedding(10, 8), last=nn.Linear(8, 3))
    found = shrunk(model, torch.arange(6).view(2, 3), dynamic=N)
    assert found.shape("words.weight") == (10, 4)


def test_columns_of_an_embedding_bag():
    for mode in ("sum", "mean"):
        bag = nn.EmbeddingBag(10, 8, mode=mode)
        model = net(lambda self, x: self.last(self.words(x)), words=bag, last=nn.Linear(8, 3))
        assert shrunk(model, torch.arange(6).view(2, 3), dynamic=N).shape("words.weight") == (10, 4)


def test_column_of_one_number_is_no_constant_of_an_embedding_bag():
    bag = nn.EmbeddingBag(10, 8, mode="sum")
    gm = captured(
        net(lambda self, x: self.last(self.words(x)), words=bag, last=nn.Linear(8, 3)), torch.arange(6).view(2, 3)
    )
    with torch.no_grad():
        gm.words.weight[:, 1::2] = 2.0
    assert shrink(gm, torch.arange(6).view(2, 3)).shape("words.weight") == (10, 8)


def test_columns_of_rows_chosen_by_number():
    def forward(self, x, numbers):
        rows = torch.relu(self.first(x))
        return self.last(rows[numbers] + rows.index_select(0, numbers) + self.table[numbers])

    model = net(forward, first=nn.Linear(5, 8), last=nn.Linear(8, 3), table=torch.empty(6, 8))
    found = shrunk(model, torch.randn(6, 5), torch.tensor([3, 0, 3]))
    assert found.shape("table") == (6, 4)
    assert found.shape("last.weight") == (3, 4)


# ---- what goes in and out


def test_dynamic_places():
    model = net(lambda self, x: self.last(F.relu(self.first(x))), first=nn.Conv2d(3, 8, 1), last=nn.Conv2d(8, 4, 1))
    found = shrunk(model, torch.randn(2, 3, 6, 7), dynamic=({0: "n", 2: "h", 3: "w"},), onnx=True)
    assert found.shape("last.weight") == (4, 4, 1, 1)


def test_dynamic_places_in_a_row():
    def forward(self, x):
        y = F.relu(self.first(x)).flatten(2).transpose(1, 2)
        return self.last(y).transpose(1, 2).view(x.shape[0], -1, *x.shape[2:])

    model = net(forward, first=nn.Conv2d(3, 8, 1), last=nn.Linear(8, 4))
    assert shrunk(model, torch.randn(2, 3, 6, 7), dynamic=({0: "n", 2: "h", 3: "w"},)).shape("last.weight") == (4, 4)


def test_no_dynamic_size():
    model = net(lambda self, x: self.last(F.relu(self.first(x))), first=nn.Linear(5, 8), last=nn.Linear(8, 4))
    assert shrunk(model, torch.randn(3, 5)).shape("last.weight") == (4, 4)


def test_several_outputs():
    def forward(self, x):
        y = F.relu(self.first(x))
        return {"a": self.last(y), "b": (self.other(y), y.sum(1))}

    model = net(forward, first=nn.Linear(5, 8), last=nn.Linear(8, 4), other=nn.Linear(8, 2))
    found = shrunk(model, torch.randn(3, 5), dynamic=N)
    assert found.shape("last.weight") == (4, 4)
    assert found.shape("other.weight") == (2, 4)


def test_input_that_is_returned_and_one_that_is_not_read():
    model = net(lambda self, x, y: (self.last(F.relu(self.first(x))), x), first=nn.Linear(5, 8), last=nn.Linear(8, 4))
    assert shrunk(model, torch.randn(3, 5), torch.randn(2)).shape("last.weight") == (4, 4)
