"""Convolutional nets: BatchNorm next to every kind of conv, residuals, gates and channel movers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.base import Example, Net, settle


class ConvNet(Net):
    """Base of the nets on f32[batch, 4, 9, 7]: ``body`` does it all. Odd sizes show a wrong stride or padding."""

    channels = 4

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, self.channels, 9, 7))


class ConvBnRelu(ConvNet):
    """Conv without bias, BatchNorm with its own eps and momentum, in-place ReLU; then a conv with bias."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6, eps=1e-3, momentum=0.03),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 5, 3),
            nn.BatchNorm2d(5),
            nn.Hardswish(inplace=True),
        )


class Depthwise(ConvNet):
    """Depthwise conv with multiplier 2, its BatchNorm and ReLU6, and the pointwise conv after it."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            nn.Conv2d(8, 3, 1),
        )


class GroupedConv(ConvNet):
    """Grouped and dilated conv with BatchNorm."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))


class TransposedConvBn(ConvNet):
    """Transposed convs with BatchNorm, one of them grouped: their weight is [in, out / groups, kh, kw]."""

    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 3, 2),
            nn.BatchNorm2d(3),
        )


class LinearBn(Net):
    """Linear with BatchNorm1d on f32[batch, features], once with and once without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4)
        )
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 6))


class SameConvBn(ConvNet):
    """``padding="same"`` with an odd and an even kernel (which pads one side more) and BatchNorm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 5, 3, padding="same"),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 3, (2, 4), padding="same", bias=False),
            nn.BatchNorm2d(3),
        )


class BnConv(ConvNet):
    """BatchNorm before a conv: it folds only where the conv does not pad, for padding is not normalized."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1))


class Conv3d(Net):
    """3-d conv, BatchNorm3d, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(2, 4, 3, padding=(0, 1, 1)), nn.BatchNorm3d(4), nn.ELU(), nn.AvgPool3d(2))
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 2, 6, 5, 5))


class Conv1d(Net):
    """1-d conv and BatchNorm1d on f32[batch, channels, length], with a length that varies too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 6, 5, padding=2), nn.BatchNorm1d(6), nn.PReLU(6), nn.AdaptiveMaxPool1d(1)
        )
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(-1)

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 3, 11), x={0: "batch", 2: "length"})


class Residual(Net):
    """Residual block with dropout of an unusual p, in place and not: train mode draws, eval mode must not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, momentum=None)
        self.drop, self.head = nn.Dropout(0.15), nn.Linear(4, 3)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(self.drop(y)))
        y += x
        return self.head(F.dropout(F.relu(y).mean((2, 3)), 0.35, self.training))

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 4, 6, 6))


class SharedConv(Net):
    """One conv called twice, one call followed by BatchNorm: its weight must not be folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x.flip(-1))

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 4, 5, 5))


class SqueezeExcite(Net):
    """Channel gate: global pool, two 1x1 convs, sigmoid, product with the input of the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.expand = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 3, 6, 6))


class UNet(Net):
    """Strided conv, nearest and bilinear upsampling, and a concatenation with the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 3, 3, 1, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.down(x)), scale_factor=2.0, mode="nearest")
        y = F.interpolate(self.up(y), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([x, y], 1))

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 3, 9, 7))


class PixelShuffle(Net):
    """Conv into a pixel shuffle and back: channels move into space, so pruning them is an index puzzle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.pixel_unshuffle(F.relu(self.mid(F.pixel_shuffle(self.up(x), 2))), 2))

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 3, 4, 5))


class ChannelShuffle(Net):
    """ShuffleNet's unit: chunk, a branch of grouped convs, concat, channel shuffle by view and transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        y = torch.cat((left, F.relu(self.branch(right))), dim=1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 3, 5, 4))
