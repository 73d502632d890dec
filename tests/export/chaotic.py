"""A graph that rounds well on its example and amplifies rounding apart from it."""

import torch
from torch import nn

import fxopt


class StableWhereTrained(nn.Module):
    """Steps that settle for rows of means near 0.1 and 0.9, and are chaotic between; recurrent nets may be so, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 64), 1 / 64))  # a product, whose sum ORT takes in another order

    def forward(self, x):
        rate = 3.95 - 1.95 * torch.tanh(((x @ self.mean.T - 0.5) / 0.2) ** 2)
        y = torch.full_like(rate, 0.3)
        for _ in range(80):
            y = rate * y * (1 - y)
        return y


def stable_where_trained() -> fxopt.CapturedModule:
    example = torch.cat([torch.full((8, 64), 0.1), torch.full((8, 64), 0.9)]) + 0.01 * torch.rand(16, 64)
    return fxopt.capture(StableWhereTrained(), (example,), dynamic_shapes={"x": {0: "batch"}})
