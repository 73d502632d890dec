"""Small students and teachers, and the hooks that an eager training loop would use."""

import copy

import torch
from torch import Tensor, nn

import fxopt
from fxopt.passes.distill import MergeTeacher


class ConvNet(nn.Module):
    """Two stages, the second behind a stride, with batch norm and dropout; pre-processing in front."""

    def __init__(self, channels: int, classes: int = 5, size: int = 8):
        super().__init__()
        self.size = size
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.ReLU())
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(2 * channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = (image - 0.5) / 0.25
        x = torch.relu(self.norm(self.stem(x)))
        x = self.layer2(self.layer1(x))
        return self.head(self.dropout(x.mean((2, 3))))


class Tagger(nn.Module):
    """Token classification: [batch, seq] to [batch, seq, classes]."""

    def __init__(self, width: int, classes: int = 4):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, width), nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


def pair(students: int = 4, teachers: int = 6, **options) -> tuple[ConvNet, ConvNet]:
    """Return a student and a teacher of random weights, whose running statistics are not those of a new net."""
    nets = ConvNet(students, **options), ConvNet(teachers, **options)
    for net in nets:
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return nets


def images(count: int = 4, size: int = 8) -> Tensor:
    """Return random images."""
    return torch.rand(count, 3, size, size)


def captured(net: nn.Module, batch: Tensor, name: str = "image") -> fxopt.CapturedModule:
    """Capture with a dynamic batch."""
    return fxopt.capture(net, (batch,), dynamic_shapes={name: {0: "batch"}})


def merged(student: nn.Module, teacher: nn.Module, batch: Tensor, losses: list, labels=None, **options):
    """Merge, and raise whatever goes wrong."""
    gm = student if isinstance(student, fxopt.CapturedModule) else captured(student, batch)
    return fxopt.optimize(gm, passes=[MergeTeacher(teacher, losses, labels, **options)], strict=True)


def extracted(gm: fxopt.CapturedModule) -> fxopt.CapturedModule:
    """Take the student out again, and raise whatever goes wrong."""
    return fxopt.optimize(gm, passes=["extract-student"], strict=True)


def twin(net: nn.Module) -> nn.Module:
    """Return a copy with weights of its own."""
    return copy.deepcopy(net)


class Hooks:
    """Keeps what modules of an eager net return."""

    def __init__(self, net: nn.Module, *paths: str):
        self.values: dict[str, Tensor] = {}
        for path in paths:
            net.get_submodule(path).register_forward_hook(self._keeper(path))

    def _keeper(self, path: str):
        def keep(module: nn.Module, args: object, result: Tensor) -> None:
            self.values[path] = result

        return keep
