"""What stays although it is masked, and the reason; what could go wrong if it did not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.groups import families_of
from fxopt.passes.prune.removal import classes_of
from fxopt.passes.prune.structure import Structure
from tests.passes.prune.nets import assert_equal, captured, net, shrink

N = ({0: "n"},)


def masked_first(forward, x, dynamic=N, last=8, **parts):
    """Shrink a net of three convolutions' worth of parts whose first layer has four channels that are 0."""
    parts = {"first": nn.Conv2d(3, 8, 1), "last": nn.Conv2d(last, 4, 1), **parts}
    gm = captured(net(forward, **parts), x, dynamic=dynamic)
    with torch.no_grad():
        gm.first.weight[1::2] = gm.first.bias[1::2] = 0.0
    return shrink(gm, x)


def images():
    return torch.randn(2, 3, 4, 4)


# ---- constants beside zeros


def test_shift_of_a_masked_channel_stays_where_zeros_are_padded_beside_it():
    for padding in (1, "same"):
        last = nn.Conv2d(8, 4, 3, padding=padding)
        parts = {"first": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.BatchNorm2d(8), "last": last}
        gm = captured(net(lambda self, x: self.last(self.norm(self.first(x))), **parts), images(), dynamic=N)
        with torch.no_grad():
            gm.first.weight[1::2] = 0.0
        found = shrink(gm, images())
        assert found.shape("last.weight") == (4, 8, 3, 3)
        assert any("zeros are padded beside it" in reason for reason in found.reasons("last.weight", 1))


def test_shift_of_a_masked_channel_stays_in_front_of_a_transposed_convolution():
    parts = {"first": nn.Conv2d(3, 8, 1), "last": nn.ConvTranspose2d(8, 4, 3)}
    gm = captured(net(lambda self, x: self.last(self.first(x)), **parts), images(), dynamic=N)
    with torch.no_grad():
        gm.first.weight[1::2] = 0.0
    assert shrink(gm, images()).shape("first.weight") == (8, 3, 1, 1)


def test_constant_stays_that_is_multiplied_with_a_weight_of_the_input():
    def forward(self, x, weight):
        return F.linear(torch.relu(self.first(x)), weight)

    gm = captured(net(forward, first=nn.Linear(5, 8)), torch.randn(2, 5), torch.randn(4, 8))
    with torch.no_grad():
        gm.first.weight[1::2] = 0.0
        gm.first.bias.fill_(1.0)
    assert shrink(gm, torch.randn(2, 5), torch.randn(4, 8)).shape("first.weight") == (8, 5)


def test_constant_stays_that_is_multiplied_with_a_computed_weight():
    def forward(self, x):
        return F.linear(torch.relu(self.first(x)), self.second(x[0]).view(4, 8))

    gm = captured(net(forward, first=nn.Linear(5, 8), second=nn.Linear(5, 32)), torch.randn(2, 5), dynamic=N)
    with torch.no_grad():
        gm.first.weight[1::2] = 0.0
        gm.first.bias.fill_(1.0)
    assert shrink(gm, torch.randn(2, 5)).shape("first.weight") == (8, 5)


def test_comparison_of_a_constant_is_made_in_its_own_element_type():
    def forward(self, x):
        y = self.first(x)
        return self.last(torch.eq(y, 0.1).float() * 3 + y)

    gm = captured(net(forward, first=nn.Linear(5, 8), last=nn.Linear(8, 4)), torch.randn(2, 5), dynamic=N)
    with torch.no_grad():
        gm.first.weight[1::2] = 0.0
        gm.first.bias[1::2] = 0.1
    assert shrink(gm, torch.randn(2, 5)).shape("last.weight") == (4, 4)


# ---- operators that look at an axis as a whole

WHOLE = {
    "it is rolled": lambda y: y.roll(2, 1),
    "there is no rule for aten.im2col.default": lambda y: F.unfold(y, 2)[:, :8].unsqueeze(-1),
    "there is no rule for aten.index_add.default": lambda y: y.index_add(1, torch.arange(8), y),
    "there is no rule for aten.cdist.default": lambda y: torch.cdist(y, y),
    "there is no rule for aten.view.dtype": lambda y: y.view(torch.int32).float() * 1e-9,
    "there is no rule for aten.as_strided.default": lambda y: y.as_strided((2, 8, 4, 4), (128, 16, 4, 1)),
    "there is no rule for aten.diff.default": lambda y: y.diff(dim=1, prepend=y[:, :1]),
    "its indices are read by number": lambda y: y[:, [7, 1, 2, 3, 4, 5, 6, 0]],
    "it is padded": lambda y: F.pad(y, (0, 0, 0, 0, -1, 1)),
    "each index of it is a value by itself": lambda y: torch.stack(y.unbind(1), 1),
    "its parts overlap, or have sizes that are not fixed": lambda y: torch.cat(y.tensor_split((5, 3), 1), 1)[:, :8],
    "aten.frexp.Tensor yields several values": lambda y: torch.frexp(y)[0],
}


@pytest.mark.parametrize("reason", WHOLE)
def test_channels_stay_since(reason):
    dynamic = None if "as_strided" in reason else N
    found = masked_first(lambda self, x: self.last(WHOLE[reason](self.first(x))), images(), dynamic)
    assert found.shape("first.weight") == (8, 3, 1, 1)
    assert reason in found.reasons("first.weight")


def test_random_numbers_are_drawn_for_all_channels():
    def forward(self, x):
        y = self.first(x)
        return self.last(F.alpha_dropout(y, 0.5, training=True) + y.bernoulli(0.5) + torch.rand_like(y))

    gm = captured(net(forward, first=nn.Conv2d(3, 8, 1), last=nn.Conv2d(8, 4, 1)), images(), dynamic=N)
    with torch.no_grad():
        gm.first.weight[1::2] = gm.first.bias[1::2] = 0.0
    structure = Structure(gm)
    assert families_of(structure) == []
    assert {pin.reason for pin in structure.pins} >= {
        "aten.alpha_dropout.default is random", "aten.bernoulli.p is random", "aten.rand_like.default is random"
    }  # fmt: skip


def test_zero_is_no_constant_behind_dropout_that_is_never_off():
    gm = captured(
        net(lambda self, x: F.alpha_dropout(self.first(x), 0.5, True), first=nn.Linear(3, 8)), torch.randn(2, 3)
    )
    with torch.no_grad():
        gm.first.weight[1::2] = gm.first.bias[1::2] = 0.0
    structure = Structure(gm)
    constants = Constants(structure)
    dropout = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.alpha_dropout.default)
    assert torch.from_numpy(constants.values[structure.axis(dropout, 1)]).isnan().all()


# ---- sizes


def test_axis_that_a_reshape_joins_with_a_dynamic_one_stays():
    def forward(self, x):
        return self.last(self.first(x).transpose(0, 1).flatten(0, 1).view(8, -1, 4, 4).transpose(0, 1))

    found = masked_first(forward, images())
    assert found.shape("first.weight") == (8, 3, 1, 1)
    assert "a reshape joins it with a size that is not fixed" in found.reasons("first.weight")


def test_axis_repeated_a_dynamic_number_of_times_stays():
    def forward(self, x):
        return self.last(self.first(x).repeat(1, x.shape[0], 1, 1)[:, :8])

    found = masked_first(forward, images())
    assert found.shape("first.weight") == (8, 3, 1, 1)
    assert "it is repeated" in found.reasons("first.weight")


def test_type_of_a_value_with_other_sizes():
    def forward(self, x, like):
        return self.last(F.relu(self.first(x).type_as(like).to(x)))

    parts = {"first": nn.Conv2d(3, 8, 1), "last": nn.Conv2d(8, 4, 1)}
    inputs = images(), torch.randn(5, 6, dtype=torch.float64)
    gm = captured(net(forward, **parts), *inputs, dynamic=({0: "n"}, None))
    with torch.no_grad():
        gm.first.weight[1::2] = gm.first.bias[1::2] = 0.0
    assert shrink(gm, *inputs).shape("first.weight") == (4, 3, 1, 1)


def test_product_with_a_dynamic_size_is_no_constant():
    def forward(self, x):
        return self.last(self.first(x) * x.shape[0] + x.shape[0])

    found = masked_first(forward, images())
    assert found.shape("first.weight") == (8, 3, 1, 1)


def test_part_with_bounds_that_are_computed():
    def forward(self, x, row):
        y, n = self.first(x), row.shape[0]
        return self.last(torch.cat([y[:, :n], y[:, n:]], 1))

    parts = {"first": nn.Conv2d(3, 8, 1), "last": nn.Conv2d(8, 4, 1)}
    inputs = images(), torch.randn(3)
    gm = captured(net(forward, **parts), *inputs, dynamic=(None, {0: torch.export.Dim("n", max=6)}))
    with torch.no_grad():
        gm.first.weight[1::2] = gm.first.bias[1::2] = 0.0
    found = shrink(gm, *inputs)
    assert found.shape("first.weight") == (8, 3, 1, 1)
    assert "a part of it is read whose bounds are computed" in found.reasons("first.weight")
    assert "it is concatenated of sizes that are not fixed" in found.reasons("last.weight", 1)


def test_sizes_of_an_input_that_others_take_over():
    def forward(self, x, like):
        y = self.first(x).flatten(1)
        return y.view_as(like), self.first(x)[:, :1].expand_as(like)

    parts = {"first": nn.Conv2d(3, 8, 1)}
    inputs = images(), torch.randn(2, 8, 4, 4)
    gm = captured(net(forward, **parts), *inputs)
    views = [node for node in gm.graph.nodes if "_as" in str(node.target)]
    assert len(views) == 2
    structure = Structure(gm)
    classes = classes_of(structure.count, structure.equal)
    like = structure.axis(next(node for node in gm.graph.nodes if node.name == "like"), 1)
    for view in views:
        assert (classes[structure.axis(view, 1)] == classes[like]).all()


def test_weight_of_one_row_and_no_axis():
    def forward(self, x):
        return F.linear(F.relu(self.first(x)), self.row)

    gm = captured(net(forward, first=nn.Linear(5, 8), row=torch.empty(8)), torch.randn(8, 5))
    with torch.no_grad():
        gm.first.weight[1::2] = gm.first.bias[1::2] = 0.0
    found = shrink(gm, torch.randn(8, 5))
    assert found.shape("row") == (8,)
    assert "its weight is one row" in found.reasons("row")


# ---- graphs inside the graph


def test_values_that_the_branches_of_a_condition_read_stay():
    def forward(self, x):
        y = self.first(x)
        if x.sum() > 0:
            y = y.sin() + self.scale
        return self.last(y)

    found = masked_first(forward, images(), scale=torch.empty(8, 1, 1))
    assert found.shape("first.weight") == (8, 3, 1, 1)
    assert found.reasons("first.weight") == {
        "a branch or a loop reads or yields it, and nothing is removed inside these"
    }


def test_parameter_that_a_branch_and_a_layer_outside_read():
    def forward(self, x):
        y = x.mean(1, keepdim=True)
        if x.sum() > 0:
            y = F.conv2d(x, self.first.weight).mean(1, keepdim=True)
        return self.last(F.relu(self.first(x))) * y

    x = images()
    found = masked_first(forward, x)
    assert found.shape("first.weight") == (8, 3, 1, 1)
    for given in (x.abs(), -x.abs()):
        assert_equal(found.masked, found.gm, given)


# ---- element types


def test_complex_numbers():
    def forward(self, x):
        y = torch.view_as_complex(self.first(x).unflatten(1, (4, 2)).movedim(2, -1).contiguous())
        return self.last(torch.view_as_real(y * self.turn).movedim(-1, 2).flatten(1, 2))

    found = masked_first(forward, images(), turn=torch.randn(4, 1, 1, dtype=torch.complex64))
    assert found.shape("first.weight") == (8, 3, 1, 1)


def test_integers_are_not_rounded_away():
    def forward(self, x):
        return self.last((self.first(x) + 0.5).to(torch.int32).float() + self.first(x))

    gm = captured(net(forward, first=nn.Linear(5, 8), last=nn.Linear(8, 4)), torch.randn(2, 5), dynamic=N)
    with torch.no_grad():
        gm.first.weight[1::2] = 0.0
    assert shrink(gm, torch.randn(2, 5)).shape("last.weight") == (4, 4)
