"""What every net of tests/models has."""

import dataclasses
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Example:
    """Inputs of a net: ``net(*args, **kwargs)``; ``dynamic_shapes`` by parameter name, as capture takes it."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    dynamic_shapes: dict[str, Any] | None = None


class Net(nn.Module):
    """A net with an example."""

    def example(self, batch: int = 2) -> Example:
        """Return inputs with ``batch`` rows."""
        raise NotImplementedError

    def _batched(self, *inputs: Tensor, **axes: dict[int, str]) -> Example:
        return Example(inputs, {}, axes or {"x": {0: "batch"}})


def has_batch_norm(net: nn.Module) -> bool:
    """Tell whether ``net`` has a BatchNorm of any rank."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


def settle(net: nn.Module) -> None:
    """Give every BatchNorm of ``net`` statistics, scale (some negative) and shift as training would leave them."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3.0)
            nn.init.uniform_(module.weight, -0.3, 1.5)
            nn.init.normal_(module.bias)
