"""Channels evened out through relu6, whose limit none of them comes near, and along residual blocks."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.numerics import measure
from fxopt.passes import EqualizeChannels, Quantize
from fxopt.passes.quantize.equalize_channels import _within

IMAGES = torch.randn(16, 3, 8, 8)
SIZES = torch.logspace(-8, 0, 8, base=2)


def limited(limit, sizes=SIZES):
    """Return a net whose channels in front of a limit of 6 are of very different sizes; the last ones reach it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), limit, nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        wanted = 12 * sizes  # what each channel would reach without the limit
        reached = net[0](IMAGES).amax((0, 2, 3))
        net[0].weight.mul_((wanted / reached)[:, None, None, None])
        net[0].bias.mul_(wanted / reached)
        net[2].weight.div_(wanted[:, None, None, None])
    gm = fxopt.capture(net.eval(), (IMAGES,))
    gm.calibration = [(IMAGES,)]
    return gm


def first(gm):
    """Return what the first layer yields."""
    return nn.functional.conv2d(IMAGES, gm.get_parameter("0.weight"), gm.get_parameter("0.bias")).detach()


def reached(gm):
    """Return what each channel of the first layer reaches, without the limit."""
    return first(gm).amax((0, 2, 3))


def even(gm, **options):
    result = EqualizeChannels(by="activations", alpha=1.0, **options)(gm)
    result.gm.recompile()
    return result.gm


@pytest.mark.parametrize("limit", [nn.ReLU6(), nn.Hardtanh(0.0, 6.0)])
def test_channels_below_a_limit_are_evened_out_and_stay_below_it(limit):
    gm = limited(limit)
    kept, inert = even(gm), even(gm, limits="inert")
    assert torch.equal(reached(kept), reached(gm))
    before, after = reached(gm), reached(inert)
    near = before > 0.9 * 6
    assert 1 <= int(near.sum()) < 8
    assert torch.equal(after[near], before[near])  # where the limit cuts off it does so as before
    assert float(after[~near].max()) <= 0.9 * 6
    assert float(after[~near].min()) > 4 * float(before[~near].min())
    torch.testing.assert_close(inert(IMAGES), gm(IMAGES), rtol=1e-5, atol=1e-6)


def test_it_brings_something_in_eight_bits():
    gm = limited(nn.ReLU6())
    small, other = (
        fxopt.optimize(each, [Quantize(recipe="fast")], strict=True) for each in (even(gm), even(gm, limits="inert"))
    )
    want = gm(IMAGES)
    assert measure(want, other(IMAGES)).sqnr_db > measure(want, small(IMAGES)).sqnr_db + 2


def test_a_channel_that_an_average_hides_at_the_limit_keeps_its_size():
    gm = limited(nn.Sequential(nn.ReLU6(), nn.AvgPool2d(2)))
    pooled = nn.functional.avg_pool2d(nn.functional.relu6(first(gm)), 2).amax((0, 2, 3))
    at_limit = reached(gm) >= 6
    assert float(pooled[at_limit].min()) < 0.9 * 6
    inert = even(gm, limits="inert")
    assert torch.equal(reached(inert)[at_limit], reached(gm)[at_limit])
    assert not torch.equal(reached(inert), reached(gm))
    torch.testing.assert_close(inert(IMAGES), gm(IMAGES), rtol=1e-5, atol=1e-6)


def test_a_limit_of_another_kind_stops_a_factor():
    gm = limited(nn.Hardtanh(-1.0, 6.0))
    assert torch.equal(reached(even(gm, limits="inert")), reached(gm))


class Stream(nn.Module):
    """Two residual blocks on one stream of channels, and what may become of their sums."""

    def __init__(self, joined=torch.add, rectifier=None, tail=None):
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.inner = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Conv2d(8, 4, 1)
        self.joined, self.rectifier, self.tail = joined, rectifier or nn.Identity(), tail
        with torch.no_grad():
            for layer in (self.stem, self.inner[2], self.second[2]):
                layer.weight.mul_(torch.logspace(-4, 4, 8, base=2)[:, None, None, None])

    def forward(self, image):
        x = self.rectifier(self.stem(image))
        x = self.rectifier(self.joined(x, self.inner(x)))
        x = self.rectifier(self.joined(x, self.second(x)))
        return (self.head(x), self.tail(x)) if self.tail else self.head(x)


def spread_of(gm, name="stem.weight"):
    largest = gm.get_parameter(name).detach().abs().amax((1, 2, 3))
    return float(largest.max() / largest.min())


def evened(net, **options):
    gm = fxopt.capture(net.eval(), (IMAGES,))
    gm.calibration = [(IMAGES,)]
    return gm, even(gm, **options)


@pytest.mark.parametrize("rectifier", [None, nn.ReLU(), nn.LeakyReLU(0.25)], ids=["linear", "relu", "leaky relu"])
def test_a_residual_stream_is_evened_out_bit_for_bit(rectifier):
    gm, other = evened(Stream(rectifier=rectifier))
    assert torch.equal(other(IMAGES), gm(IMAGES))
    assert spread_of(other) < spread_of(gm) / 16
    changed = [name for name, held in gm.named_parameters() if not torch.equal(held, other.get_parameter(name))]
    assert {"stem.weight", "inner.0.weight", "inner.2.weight", "second.2.weight", "head.weight"} <= set(changed)


def test_a_residual_stream_of_linear_layers_is_evened_out_bit_for_bit():
    torch.manual_seed(2)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.first.weight.mul_(torch.logspace(-5, 5, 8, base=2)[:, None])

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.middle(x))

    rows = torch.randn(64, 3)
    gm = fxopt.capture(Rows().eval(), (rows,))
    gm.calibration = [(rows,)]
    other = even(gm)
    assert torch.equal(other(rows), gm(rows))
    assert not torch.equal(other.get_parameter("first.weight"), gm.get_parameter("first.weight"))


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_it_brings_something_in_eight_bits_along_a_stream(by):
    gm = fxopt.capture(Stream().eval(), (IMAGES,))
    gm.calibration = [(IMAGES,)]
    result = EqualizeChannels(by=by)(gm)
    result.gm.recompile()
    small, other = (
        fxopt.optimize(each, [Quantize(recipe="fast")], calibration=[(IMAGES,)], strict=True)
        for each in (gm, result.gm)
    )
    assert measure(gm(IMAGES), other(IMAGES)).sqnr_db > measure(gm(IMAGES), small(IMAGES)).sqnr_db + 1


def halves(x, y):
    return torch.add(x, y, alpha=0.5)


def broadcast(x, y):
    return x + y.mean((2, 3), keepdim=True)


def moved(x, y):
    return x + y + 1.0


@pytest.mark.parametrize(
    "net",
    [
        Stream(joined=halves),
        Stream(joined=broadcast),
        Stream(joined=moved),
        Stream(rectifier=nn.Sigmoid()),
        Stream(tail=nn.Identity()),
        Stream(tail=nn.LayerNorm(8)),
    ],
    ids=["a factor", "broadcast", "a constant", "no homogeneous function", "an output", "read by a norm"],
)
def test_a_stream_that_others_make_or_read_is_left_alone(net):
    gm, other = evened(net)
    assert torch.equal(other.get_parameter("stem.weight"), gm.get_parameter("stem.weight"))


def test_the_promise_depends_on_the_option():
    assert EqualizeChannels(by="activations").contract.kind == "EXACT"
    inert = EqualizeChannels(by="activations", limits="inert", min_sqnr_db=50.0)
    assert inert.contract.floors == (("sqnr_db", 50.0),)
    out = fxopt.optimize(limited(nn.ReLU6()), [inert], calibration=[(IMAGES,)], strict=True)
    assert out.report.steps[0].status == "changed"


def test_what_channels_reach_is_known_from_data_alone():
    with pytest.raises(ValueError, match="what channels reach, and by is 'weights'"):
        EqualizeChannels(limits="inert")


def test_factors_within_a_limit():
    largest, wanted = torch.tensor([8.0, 3.0, 1.0, 0.0, 1.0]), torch.tensor([0.25, 0.25, 0.25, 0.5, 4.0])
    assert _within(wanted, largest, 4.0).tolist() == [1.0, 0.75, 0.25, 0.5, 4.0]


def test_the_recipe_evens_out_what_eight_bits_cannot_hold():
    gm = limited(nn.ReLU6(), torch.logspace(-14, 0, 8, base=2))
    small = fxopt.optimize(gm, [Quantize()], calibration=[(IMAGES,)] * 4, strict=True)
    plain = fxopt.optimize(gm, [Quantize(recipe="fast")], calibration=[(IMAGES,)] * 4, strict=True)
    (note,) = [note for note in small.report.steps[0].notes if note.startswith("equalize") and "kept" in note]
    assert note.endswith(", kept")
    assert measure(gm(IMAGES), small(IMAGES)).sqnr_db > measure(gm(IMAGES), plain(IMAGES)).sqnr_db + 5


def test_the_recipe_asks_all_inputs_what_comes_near_a_limit():
    gm = limited(nn.ReLU6(), torch.logspace(-14, 0, 8, base=2))
    late = [(IMAGES,)] * 8 + [(64 * IMAGES,)]
    small = fxopt.optimize(gm, [Quantize(min_sqnr_db=-99)], calibration=late, strict=True)
    unlike = fxopt.optimize(gm, [Quantize(min_sqnr_db=-99)], calibration=late[:8], strict=True)
    large = 64 * IMAGES
    assert measure(gm(large), small(large)).sqnr_db > measure(gm(large), unlike(large)).sqnr_db + 10
