"""Whole nets: half of the groups of each family are set to 0, removed, and the results compared."""

import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes.prune.groups import families_of
from fxopt.passes.prune.structure import Structure
from tests.passes.prune.nets import captured, every_other, net, shrink, shrunk, zero_groups

N = ({0: "n"},)


def images(channels: int = 3, size: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


# ---- eleven nets that no list of layer types covers


def test_linear_viewed_as_an_image_and_convolved_transposed():
    def forward(self, x):
        return self.up(F.relu(self.fc(x)).view(-1, 8, 3, 3))

    found = shrunk(
        net(forward, fc=nn.Linear(5, 72), up=nn.ConvTranspose2d(8, 4, 3)), torch.randn(2, 5), dynamic=N, onnx=True
    )
    assert found.shape("fc.weight") == (36, 5)
    assert found.shape("up.weight") == (4, 4, 3, 3)


def _attention(self, x):
    query, key, value = self.qkv(x).reshape(x.shape[0], 4, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax(query @ key.transpose(-2, -1) * 0.4, -1)
    return self.out((weights @ value).transpose(1, 2).reshape(x.shape[0], 4, 24))


def _fused_attention(self, x):
    query, key, value = self.qkv(x).reshape(x.shape[0], 4, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
    return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape[0], 4, 24))


def test_heads_of_attention_in_one_matrix():
    for forward in (_attention, _fused_attention):
        model = net(forward, qkv=nn.Linear(8, 72), out=nn.Linear(24, 5))
        found = shrunk(model, torch.randn(2, 4, 8), dynamic=N, prefer="heads", onnx=True)
        assert found.shape("qkv.weight") == (36, 8)
        assert found.shape("out.weight") == (5, 12)
        assert all(family.is_heads for family in found.families)


def test_places_inside_the_heads_of_attention():
    for forward in (_attention, _fused_attention):
        model = net(forward, qkv=nn.Linear(8, 72), out=nn.Linear(24, 5))
        found = shrunk(model, torch.randn(2, 4, 8), dynamic=N, onnx=True)
        assert found.shape("qkv.weight") == (36, 8)
        assert found.shape("out.weight") == (5, 12)


def test_chunks_concatenated_in_another_order():
    def forward(self, x):
        first, second = self.conv(x).chunk(2, 1)
        return self.last(torch.cat([torch.tanh(second), F.relu(first)], 1))

    found = shrunk(net(forward, conv=nn.Conv2d(3, 16, 3), last=nn.Conv2d(16, 4, 3)), images(), dynamic=N, onnx=True)
    assert found.shape("last.weight") == (4, 8, 3, 3)


def test_pixel_shuffle():
    def forward(self, x):
        return self.last(F.relu(F.pixel_shuffle(self.conv(x), 2)))

    found = shrunk(net(forward, conv=nn.Conv2d(3, 32, 3), last=nn.Conv2d(8, 4, 3)), images(), dynamic=N, onnx=True)
    assert found.shape("conv.weight") == (16, 3, 3, 3)


def test_pixel_unshuffle():
    def forward(self, x):
        return self.last(F.relu(F.pixel_unshuffle(self.conv(x), 2)))

    found = shrunk(net(forward, conv=nn.Conv2d(3, 8, 3), last=nn.Conv2d(32, 4, 2)), images(), dynamic=N, onnx=True)
    assert found.shape("last.weight") == (4, 16, 2, 2)


def test_parameters_that_belong_to_no_layer():
    def forward(self, x):
        y = F.conv2d(x, self.first, padding=1)
        return F.conv2d(F.relu(y), torch.tanh(self.second) * 2 - self.second.flip(3), padding=1)

    model = net(forward, first=torch.empty(8, 3, 3, 3), second=torch.empty(4, 8, 3, 3))
    found = shrunk(model, images(), dynamic=N, onnx=True)
    assert found.shape("first") == (4, 3, 3, 3)
    assert found.shape("second") == (4, 4, 3, 3)


def test_lstm():
    def forward(self, x):
        return self.last(self.lstm(self.fc(x))[0])

    model = net(forward, fc=nn.Linear(5, 8), lstm=nn.LSTM(8, 6, batch_first=True), last=nn.Linear(6, 4))
    found = shrunk(model, torch.randn(2, 4, 5), dynamic=N, onnx=True)
    assert found.shape("lstm.weight_ih_l0") == (12, 4)
    assert found.shape("last.weight") == (4, 3)


def test_depthwise_convolution_with_two_outputs_a_channel():
    def forward(self, x):
        return self.last(F.relu(self.depthwise(F.relu(self.conv(x)))))

    model = net(
        forward, conv=nn.Conv2d(3, 8, 1), depthwise=nn.Conv2d(8, 16, 3, groups=8, padding=1), last=nn.Conv2d(16, 4, 1)
    )
    found = shrunk(model, images(), dynamic=N, onnx=True)
    assert found.shape("depthwise.weight") == (8, 1, 3, 3)
    assert found.shape("last.weight") == (4, 8, 1, 1)


def test_a_value_concatenated_with_itself():
    def forward(self, x):
        y = F.relu(self.conv(x))
        return self.last(torch.cat([y, y], 1))

    found = shrunk(net(forward, conv=nn.Conv2d(3, 8, 3), last=nn.Conv2d(16, 4, 3)), images(), dynamic=N, onnx=True)
    assert found.shape("last.weight") == (4, 8, 3, 3)


def test_channels_flattened_with_their_places():
    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).flatten(1))

    found = shrunk(net(forward, conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(128, 4)), images(), dynamic=N, onnx=True)
    assert found.shape("fc.weight") == (4, 64)


def _shuffled(self, x):
    y = F.relu(self.conv(x))
    y = y.view(x.shape[0], 2, 6, 6, 6).transpose(1, 2).reshape(x.shape[0], 12, 6, 6)
    return self.last(F.relu(self.grouped(y)))


def test_shuffled_channels_in_a_grouped_convolution():
    for shuffle in (_shuffled, lambda self, x: self.last(F.relu(self.grouped(F.channel_shuffle(self.conv(x), 2))))):
        model = net(
            shuffle, conv=nn.Conv2d(3, 12, 1), grouped=nn.Conv2d(12, 8, 3, groups=2, padding=1), last=nn.Conv2d(8, 4, 1)
        )
        found = shrunk(model, images(), dynamic=N)
        assert found.shape("grouped.weight")[0] == 4
        assert found.kept < 0.6


def test_squeeze_and_excite():
    def forward(self, x):
        y = F.relu(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return self.last(y * gate)

    model = net(
        forward, conv=nn.Conv2d(3, 8, 3), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), last=nn.Conv2d(8, 4, 3)
    )
    found = shrunk(model, images(), dynamic=N, onnx=True)
    assert found.shape("down.weight") == (2, 4, 1, 1)
    assert found.shape("up.weight") == (4, 2, 1, 1)
    assert found.shape("last.weight") == (4, 4, 3, 3)


# ---- sums, concatenations, groups


def test_channels_of_layers_that_are_added_go_together():
    def forward(self, x):
        y = F.relu(self.first(x))
        return self.last(y + self.second(y))

    parts = {"first": nn.Conv2d(3, 8, 1), "second": nn.Conv2d(8, 8, 3, padding=1), "last": nn.Conv2d(8, 4, 1)}
    found = shrunk(net(forward, **parts), images(), dynamic=N)
    assert len(found.families) == 1
    assert found.shape("second.weight") == (4, 4, 3, 3)


def test_shortcut_that_pads_channels():
    def forward(self, x):
        y = F.relu(self.first(x))
        shortcut = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.last(F.relu(self.second(y) + shortcut))

    parts = {"first": nn.Conv2d(3, 8, 1), "second": nn.Conv2d(8, 16, 3, 2, 1), "last": nn.Conv2d(16, 4, 1)}
    found = shrunk(net(forward, **parts), images(), dynamic=N)
    assert found.shape("second.weight") == (8, 4, 3, 3)


def test_concatenations_of_all_layers_so_far():
    def forward(self, x):
        values = [self.first(x)]
        for layer in (self.second, self.third):
            values.append(layer(F.relu(torch.cat(values, 1))))
        return self.last(torch.cat(values, 1))

    parts = {"first": nn.Conv2d(3, 8, 1), "second": nn.Conv2d(8, 4, 1), "third": nn.Conv2d(12, 4, 1)}
    found = shrunk(net(forward, **parts, last=nn.Conv2d(16, 4, 1)), images(), dynamic=N)
    assert found.shape("third.weight") == (2, 6, 1, 1)
    assert found.shape("last.weight") == (4, 8, 1, 1)


def _grouped():
    def forward(self, x):
        return self.last(F.relu(self.grouped(F.relu(self.first(x)))))

    parts = {"first": nn.Conv2d(3, 12, 1), "grouped": nn.Conv2d(12, 8, 3, padding=1, groups=4)}
    return net(forward, **parts, last=nn.Conv2d(8, 4, 1))


def test_grouped_convolution_by_groups():
    found = shrunk(_grouped(), images(), dynamic=N)
    assert found.shape("grouped.weight") == (4, 3, 3, 3)
    assert found.shape("first.weight") == (6, 3, 1, 1)


def test_grouped_convolution_by_places_in_its_groups():
    gm = captured(_grouped(), images(), dynamic=N)
    with torch.no_grad():
        gm.first.weight[1::3] = gm.first.bias[1::3] = 0.0
        gm.grouped.weight[::2] = gm.grouped.bias[::2] = 0.0
    found = shrink(gm, images())
    assert found.shape("first.weight") == (8, 3, 1, 1)
    assert found.shape("grouped.weight") == (4, 2, 3, 3)


def test_grouped_convolution_whose_groups_lose_different_channels_stays():
    gm = captured(_grouped(), images(), dynamic=N)
    with torch.no_grad():
        gm.first.weight[[0, 4]] = gm.first.bias[[0, 4]] = 0.0
    assert shrink(gm, images()).shape("first.weight") == (12, 3, 1, 1)


def test_grouped_transposed_convolution():
    def forward(self, x):
        return self.last(F.relu(self.up(F.relu(self.first(x)))))

    parts = {"first": nn.Conv2d(3, 12, 1), "up": nn.ConvTranspose2d(12, 8, 3, 2, 1, 1, groups=4)}
    found = shrunk(net(forward, **parts, last=nn.Conv2d(8, 4, 1)), images(), dynamic=N)
    assert found.shape("up.weight") == (6, 2, 3, 3)


def test_convolutions_of_one_and_three_axes():
    for axes, conv in ((1, nn.Conv1d), (3, nn.Conv3d)):
        model = net(lambda self, x: self.last(F.relu(self.first(x))), first=conv(3, 8, 2), last=conv(8, 4, 2))
        assert shrunk(model, torch.randn(2, 3, *[4] * axes), dynamic=N).shape("last.weight")[:2] == (4, 4)


def test_down_and_up_with_skipped_connections():
    def forward(self, x):
        high = F.relu(self.first(x))
        low = F.relu(self.down(F.max_pool2d(high, 2)))
        return self.last(F.relu(self.merge(torch.cat([self.up(low), high], 1))))

    model = net(
        forward, first=nn.Conv2d(3, 8, 3, padding=1), down=nn.Conv2d(8, 12, 3, padding=1),
        up=nn.ConvTranspose2d(12, 6, 2, 2), merge=nn.Conv2d(14, 8, 3, padding=1), last=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    found = shrunk(model, images(), dynamic=({0: "n", 2: torch.export.Dim("half") * 2},))
    assert found.shape("up.weight") == (6, 3, 2, 2)
    assert found.shape("merge.weight") == (4, 7, 3, 3)


# ---- weights that are used twice


def test_layer_called_twice():
    def forward(self, x):
        return self.last(F.relu(self.shared(F.relu(self.shared(self.first(x))))))

    parts = {"first": nn.Conv2d(3, 8, 1), "shared": nn.Conv2d(8, 8, 3, padding=1), "last": nn.Conv2d(8, 4, 1)}
    found = shrunk(net(forward, **parts), images(), dynamic=N)
    assert found.shape("shared.weight") == (4, 4, 3, 3)


def test_embedding_that_is_the_last_layer_as_well():
    def forward(self, x):
        return F.linear(F.relu(self.hidden(self.words(x))), self.words.weight)

    found = shrunk(
        net(forward, words=nn.Embedding(10, 8), hidden=nn.Linear(8, 8)), torch.arange(6).view(2, 3), dynamic=N
    )
    assert found.shape("words.weight") == (10, 4)
    assert found.shape("hidden.weight") == (4, 4)


def test_one_weight_under_two_names():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(self.input(x))))))

    model = net(forward, input=nn.Linear(5, 8), first=first, second=second, last=nn.Linear(8, 3))
    found = shrunk(model, torch.randn(2, 5), dynamic=N)
    assert found.gm.first.weight is found.gm.second.weight
    assert found.shape("first.weight") == (4, 4)


# ---- constants that are not 0


def test_shift_of_a_masked_channel_goes_into_the_next_bias():
    def forward(self, x):
        return self.last(F.relu(self.norm(self.first(x))))

    for bias in (True, False):
        parts = {"first": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "last": nn.Conv2d(8, 4, 3, bias=bias)}
        gm = captured(net(forward, **parts), images(), dynamic=N)
        with torch.no_grad():
            gm.first.weight[::2] = 0.0
        found = shrink(gm, images())
        assert found.shape("last.weight") == (4, 4, 3, 3)
        assert found.shape("norm.running_mean") == (4,)


def test_bias_of_a_masked_unit_goes_through_activations_into_the_next_bias():
    def forward(self, x):
        return self.last(torch.sigmoid(F.gelu(self.first(x)) * 2 - 1))

    gm = captured(net(forward, first=nn.Linear(5, 8), last=nn.Linear(8, 4)), torch.randn(2, 5), dynamic=N)
    with torch.no_grad():
        gm.first.weight[::2] = 0.0
    assert shrink(gm, torch.randn(2, 5)).shape("last.weight") == (4, 4)


def test_shared_bias_is_not_written_for_one_of_its_readers():
    def forward(self, x):
        return F.linear(F.relu(self.first(x)), self.second, self.bias) + F.linear(x, self.third, self.bias)

    model = net(forward, first=nn.Linear(5, 8), second=torch.empty(4, 8), third=torch.empty(4, 5), bias=torch.empty(4))
    gm = captured(model, torch.randn(2, 5), dynamic=N)
    with torch.no_grad():
        gm.first.weight[::2] = 0.0
        gm.first.bias.abs_()
    assert shrink(gm, torch.randn(2, 5)).shape("second") == (4, 4)


def test_channels_that_nothing_reads_go_without_masks():
    def forward(self, x):
        return self.last(F.relu(self.first(x))[:, 2:6])

    gm = captured(net(forward, first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(4, 4, 3)), images(), dynamic=N)
    assert shrink(gm, images()).shape("first.weight") == (4, 3, 3, 3)


def test_channels_that_are_read_with_zeros_go():
    gm = captured(
        net(lambda self, x: self.last(F.relu(self.first(x))), first=nn.Linear(5, 8), last=nn.Linear(8, 4)),
        torch.randn(2, 5), dynamic=N,
    )  # fmt: skip
    with torch.no_grad():
        gm.last.weight[:, 1::2] = 0.0
    assert shrink(gm, torch.randn(2, 5)).shape("first.weight") == (4, 5)


# ---- both modes


def test_graph_with_both_modes_trains_on_after_the_cut():
    def forward(self, x):
        return self.last(self.drop(F.relu(self.norm(self.first(x)))))

    parts = {"first": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "drop": nn.Dropout(0.5)}
    gm = fxopt.capture(net(forward, **parts, last=nn.Conv2d(8, 4, 1)).train(), (images(),), dynamic_shapes=N)
    zero_groups(gm, every_other(families_of(Structure(gm))))
    found = shrink(gm.eval(), images())
    assert found.shape("last.weight") == (4, 4, 1, 1)
    found.gm.train()
    before = found.gm.norm.running_mean.clone()
    found.gm(images()).sum().backward()
    assert (found.gm.norm.running_mean != before).all()
    assert found.gm.first.weight.grad.abs().sum() > 0
