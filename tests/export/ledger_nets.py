"""A small net that passes change step by step, for the tests of the ledger."""

import torch
from torch import nn

import fxopt

PASSES = ["fold-batch-norm", "remove-dead-code", "quantize{recipe=fast}", "fold-constants"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(image)).relu().mean(dim=(2, 3)))


def optimized(passes=PASSES, model=None, example=None, **options) -> fxopt.CapturedModule:
    torch.manual_seed(0)
    example = (torch.randn(8, 3, 8, 8),) if example is None else example
    return fxopt.optimize(model or Net().eval(), passes, example, keep_graphs=True, **options)


def mean_of(gm):
    """Return a metric: the mean of the outputs on the example of the graph, which tells files apart."""
    return lambda model: model(*gm.samples[0].args).double().mean()
