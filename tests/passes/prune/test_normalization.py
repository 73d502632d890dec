"""Norms over channels: which may go, what the norm becomes, what stays and why."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM
from fxopt.passes.prune.structure import Structure
from tests.passes.prune.nets import Shrunk, captured, net, shrink, shrunk
from tests.passes.prune.norm_masks import MaskNorms, masked_norms, shrunk_with_norms

N = ({0: "batch"},)
aten = torch.ops.aten


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 4, 4)


def residual(norm: nn.Module) -> nn.Module:
    """A stream of 8 channels that two norms read, around a hidden layer."""

    def forward(self, x):
        x = self.first(x)
        x = x + self.inner(self.before(x)).relu()
        return self.last(self.after(x))

    parts = {"first": nn.Linear(5, 8), "before": norm, "inner": nn.Linear(8, 8)}
    return net(forward, **parts, after=nn.LayerNorm(8), last=nn.Linear(8, 4))


def grouped(groups: int, channels: int = 8) -> nn.Module:
    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())

    parts = {"first": nn.Conv2d(3, channels, 3, padding=1), "norm": nn.GroupNorm(groups, channels)}
    return net(forward, **parts, last=nn.Conv2d(channels, 4, 1))


def masked(model: nn.Module, x: torch.Tensor, masks: dict[str, list[int]], zeros: list[int]) -> fxopt.CapturedModule:
    """Capture, set rows of the first layer and of the norm's parameters to 0, and mask norms (1 is kept)."""
    gm = captured(model, x, dynamic=N)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.startswith(("first", "norm")):
                parameter[zeros] = 0
    return MaskNorms({name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()})(gm).gm


def targets(found: Shrunk) -> list[object]:
    return [node.target for node in found.gm.graph.nodes]


def test_stream_of_layer_norms_loses_masked_channels():
    found = shrunk_with_norms(residual(nn.LayerNorm(8)), torch.randn(2, 3, 5), dynamic=N, onnx=True)
    assert found.shape("before.weight") == (4,)
    assert targets(found).count(aten.layer_norm.default) == 2
    assert [name for name, _ in found.gm.named_buffers()] == []


@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}])
def test_layer_norm_with_options(options):
    shrunk_with_norms(residual(nn.LayerNorm(8, **options)), torch.randn(2, 3, 5), dynamic=N)


def test_without_a_mask_a_layer_norm_keeps_its_channels():
    gm = captured(residual(nn.LayerNorm(8)), torch.randn(2, 3, 5), dynamic=N)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if not name.startswith("last"):
                parameter[3] = 0
    found = shrink(gm, torch.randn(2, 3, 5))
    assert found.shape("first.weight") == (8, 5)
    assert any("its mean and variance would be those of fewer values" in why for why in found.reasons("first.weight"))


def test_plain_norms_say_that_they_want_a_mask_and_masked_ones_do_not():
    gm = captured(residual(nn.LayerNorm(8)), torch.randn(2, 3, 5), dynamic=N)
    structure = Structure(gm)
    ends = [end for end in structure.ends if end.normalizes]
    assert [end.node.target for end in ends] == [aten.layer_norm.default] * 2
    assert all((end.indices == structure.axis(end.node.args[0], -1)).all() for end in ends)
    both = MaskNorms({end.node.name: torch.ones(8, dtype=torch.bool) for end in ends})(gm).gm
    assert [end for end in Structure(both).ends if end.normalizes] == []


def test_group_norm_wants_a_mask_for_channels_inside_its_groups():
    structure = Structure(captured(grouped(2), images(), dynamic=N))
    (end,) = [end for end in structure.ends if end.normalizes]
    assert end.node.target is aten.group_norm.default
    assert len(end.indices) == 4


def test_layer_norm_over_several_axes_keeps_them():
    model = net(
        lambda self, x: self.last(self.norm(self.first(x))), first=nn.Linear(5, 8), norm=nn.LayerNorm((3, 8)),
        last=nn.Linear(8, 4),
    )  # fmt: skip
    gm = captured(model, torch.randn(2, 3, 5), dynamic=N)
    with torch.no_grad():
        gm.get_parameter("first.weight")[2:] = 0
        gm.get_parameter("first.bias")[2:] = 0
    found = shrink(gm, torch.randn(2, 3, 5))
    assert found.shape("first.weight") == (8, 5)
    assert found.reasons("first.weight") == {"it is normalized over, together with other axes"}


def test_masked_channel_goes_whatever_its_values_are():
    model = net(
        lambda self, x: self.last(self.norm(self.first(x))), first=nn.Linear(5, 6), norm=nn.LayerNorm(6),
        last=nn.Linear(6, 4),
    )  # fmt: skip
    gm = captured(model, torch.randn(2, 5), dynamic=N)
    gm = MaskNorms({"layer_norm": torch.tensor([1, 0, 1, 1, 0, 1]).bool()})(gm).gm
    found = shrink(gm, torch.randn(2, 5))
    assert found.shape("first.weight") == (4, 5)  # what the shift adds went into the bias of the last layer
    assert not torch.equal(found.gm.get_parameter("last.bias"), gm.get_parameter("last.bias"))


def test_masked_channels_that_are_read_stay_and_so_does_the_mask():
    def forward(self, x):
        y = self.first(x)
        return self.last(self.norm(y)), y[..., 1]  # the model returns one of those that are masked

    model = net(forward, first=nn.Linear(5, 6), norm=nn.LayerNorm(6), last=nn.Linear(6, 4))
    gm = captured(model, torch.randn(2, 5), dynamic=N)
    gm = MaskNorms({"layer_norm": torch.tensor([1, 0, 1, 1, 0, 1]).bool()})(gm).gm
    found = shrink(gm, torch.randn(2, 5))
    assert found.shape("first.weight") == (5, 5)
    assert targets(found).count(MASKED_LAYER_NORM) == 1
    assert [buffer.tolist() for buffer in found.gm.buffers()] == [[True, False, True, True, True]]


def test_mask_of_ones_becomes_a_plain_norm():
    gm = masked(grouped(2), images(), {"group_norm": [1] * 8}, [])
    found = shrink(gm, images())
    assert not masked_norms(found.gm)
    assert found.shape("first.weight") == (8, 3, 3, 3)


def test_computed_mask_keeps_its_channels():
    def forward(self, x, y):
        return self.last(MASKED_LAYER_NORM(self.first(x), y > 0, self.norm.weight, self.norm.bias, 1e-5))

    model = net(forward, first=nn.Linear(5, 6), norm=nn.LayerNorm(6), last=nn.Linear(6, 4))
    gm = captured(model, torch.randn(2, 5), torch.randn(6))
    found = shrink(gm, torch.randn(2, 5), torch.randn(6))
    assert found.shape("first.weight") == (6, 5)
    assert "it is an input of the model" in found.reasons("first.weight")


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_group_norm_loses_whole_groups_or_the_same_places_of_each(groups):
    found = shrunk_with_norms(grouped(groups), images(), dynamic=N, onnx=groups == 2)
    (norm,) = [node for node in found.gm.graph.nodes if node.target is aten.group_norm.default]
    assert 8 // groups * norm.args[1] in (4, 8)
    assert found.shape("norm.weight") == (4,)


def test_groups_that_lose_other_places_each_but_equally_many():
    gm = masked(grouped(2), images(), {"group_norm": [0, 1, 1, 0, 1, 0, 0, 1]}, [0, 3, 5, 6])
    found = shrink(gm, images())
    assert found.shape("first.weight") == (4, 3, 3, 3)
    assert not masked_norms(found.gm)


def test_groups_that_would_be_left_unequal_lose_as_many_as_the_fullest():
    gm = masked(grouped(2), images(), {"group_norm": [0, 0, 0, 1, 1, 0, 1, 1]}, [0, 1, 2, 5])
    found = shrink(gm, images())
    assert found.shape("first.weight") == (6, 3, 3, 3)
    assert [buffer.tolist() for buffer in found.gm.buffers()] == [[False, False, True, True, True, True]]
    assert targets(found).count(MASKED_GROUP_NORM) == 1
    reasons = found.reasons("first.weight")
    assert any("its groups would be left with unequal numbers of channels" in why for why in reasons)


def test_masked_group_goes_as_a_whole_and_others_lose_their_share():
    gm = masked(grouped(4), images(), {"group_norm": [0, 0, 1, 0, 0, 1, 1, 0]}, [0, 1, 3, 4, 7])
    found = shrink(gm, images())
    assert found.shape("first.weight") == (3, 3, 3, 3)
    (norm,) = [node for node in found.gm.graph.nodes if node.target is aten.group_norm.default]
    assert norm.args[1] == 3


def test_group_without_a_mask_of_its_own_goes_as_a_whole():
    gm = masked(grouped(2), images(), {"group_norm": [1, 0, 1, 1, 1, 1, 1, 1]}, [1])
    with torch.no_grad():
        for name in ("norm.weight", "norm.bias"):
            gm.get_parameter(name)[4:] = 0
    found = shrink(gm, images())
    assert found.shape("first.weight") == (3, 3, 3, 3)
    (norm,) = [node for node in found.gm.graph.nodes if node.target is aten.group_norm.default]
    assert norm.args[1] == 1


def rms(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm, and T5's."""
    return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2))


@pytest.mark.parametrize("eps", [None, 0.1])
def test_rms_norm_needs_no_mask(eps):
    model = net(
        lambda self, x: self.last(self.norm(self.first(x))), first=nn.Linear(5, 8), norm=nn.RMSNorm(8, eps=eps),
        last=nn.Linear(8, 4),
    )  # fmt: skip
    found = shrunk(model, torch.randn(2, 3, 5), dynamic=N, onnx=True)
    assert found.shape("norm.weight") == (4,)


def test_rms_norm_written_by_hand_needs_no_mask():
    model = net(
        lambda self, x: self.last(rms(self, self.first(x))), first=nn.Linear(5, 8), gain=torch.ones(8),
        last=nn.Linear(8, 4),
    )  # fmt: skip
    found = shrunk(model, torch.randn(2, 3, 5), dynamic=N, onnx=True)
    assert found.shape("gain") == (4,)


def test_batch_norm_of_zeros_hands_its_constant_to_the_next_bias():
    def forward(self, x):
        return self.last(self.norm(self.first(x)))

    model = net(forward, first=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), last=nn.Conv2d(8, 4, 1))
    gm = captured(model, images(), dynamic=N)
    with torch.no_grad():
        gm.get_parameter("first.weight")[[1, 6]] = 0
    found = shrink(gm, images())
    assert found.shape("norm.running_mean") == (6,)
    assert not torch.equal(found.gm.get_parameter("last.bias"), gm.get_parameter("last.bias"))


@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_looks_at_each_channel_by_itself(affine):
    parts = {"first": nn.Conv2d(3, 8, 3), "norm": nn.InstanceNorm2d(8, affine=affine), "last": nn.Conv2d(8, 4, 1)}
    found = shrunk(net(lambda self, x: self.last(self.norm(self.first(x))), **parts), images(), dynamic=N)
    assert found.shape("last.weight") == (4, 4, 1, 1)
