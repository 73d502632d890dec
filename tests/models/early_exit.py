"""A CNN that leaves early: where a small head is sure of every image of the batch, the rest of the net does not run."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.tools.demo_net import Digits, fit

THRESHOLD = 0.95  # of the least sure image of a batch


class EarlyExitNet(nn.Module):
    """A stem, a head after it, and behind it 24 times the work: three residual blocks and their head."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        super().__init__()
        self.threshold = threshold
        self.stem = nn.Sequential(_conv(1, 16), nn.ReLU(), _conv(16, 16), nn.ReLU())
        self.exit = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * 4 * 4, 10))
        self.heavy = nn.Sequential(_conv(16, 32), nn.ReLU(), Block(32), Block(32), Block(32))
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10))

    def forward(self, image: Tensor) -> Tensor:
        """Return a score for each digit, f32[batch, 10], for images f32[batch, 1, 8, 8]."""
        x = self.stem(image)
        scores = self.exit(x)
        if scores.softmax(dim=1).max(dim=1).values.min() > self.threshold:
            return scores
        return self.head(self.heavy(x))

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of both heads, which are trained together."""
        x = self.stem(image)
        return self.exit(x), self.head(self.heavy(x))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv(channels, channels), _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of ``x``."""
        return F.relu(x + self.second(F.relu(self.first(x))))


class WithoutExit(nn.Module):
    """The same layers with the same weights, all of which always run."""

    def __init__(self, net: EarlyExitNet) -> None:
        super().__init__()
        self.stem, self.heavy, self.head = net.stem, net.heavy, net.head
        self.train(net.training)

    def forward(self, image: Tensor) -> Tensor:
        """Return what the last head says."""
        return self.head(self.heavy(self.stem(image)))


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


def train(net: EarlyExitNet, digits: Digits, seed: int = 0, *, epochs: int = 6) -> EarlyExitNet:
    """Train both heads of ``net`` on the digits and return it in eval mode; the random state is left as it was."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        early, final = net.both(images)
        return F.cross_entropy(early, labels) + F.cross_entropy(final, labels)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit(net, digits, loss, epochs=epochs, rate=5e-3)
    return net


def leaves_early(net: EarlyExitNet, images: Tensor) -> Tensor:
    """Return for each image, bool[n], whether ``net`` leaves early where it is alone in its batch."""
    with torch.no_grad():
        # One at a time: a batch may round in another way, and the threshold knows no tolerance.
        sure = [net.exit(net.stem(image[None])).softmax(dim=1).max() > net.threshold for image in images]
    return torch.stack(sure)
