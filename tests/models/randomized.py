"""Give every parameter and statistic of a net a value that is not special."""

import torch
from torch import nn


@torch.no_grad()
def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draw gains near 1, other vectors and batch norm statistics near 0 or 1, and weights that were 0 or nearly so.

    Nets begin with gains of 1, shifts of 0, layer scales of 1e-6 and heads of 0, which hide mistakes.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=draw) * (high - low) + low)

    for name, parameter in net.named_parameters():
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        if is_gain or "layer_scale" in name:
            uniform(parameter, 0.5, 1.5)
        elif parameter.ndim == 1:
            uniform(parameter, -0.2, 0.2)
        elif parameter.abs().max() < 1e-3:
            uniform(parameter, -0.1, 0.1)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            uniform(buffer, -0.2, 0.2)
        elif name.endswith("running_var"):
            uniform(buffer, 0.5, 1.5)
    return net
